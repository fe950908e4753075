"""Measurements, each beside its baseline or its bound in the same run: `fdiff.bench.X.run(config, comm, device)`."""
