"""What `tests/gpu.sh` runs on a machine with a GPU: five steps, and the tests that only a real one can pass."""
