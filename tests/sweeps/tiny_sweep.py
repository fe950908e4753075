"""A sweep of a few seconds, its file, and a line of a table."""

from __future__ import annotations

from pathlib import Path

import yaml

from fdiff.config import RuntimeConfig
from fdiff.sweeps import Result

ALONE = RuntimeConfig(threads=1)

TINY = {
    "federation": {"rounds": 2, "local_epochs": 1},
    "data": {"limit": 64, "image_side": 8, "channels": 1, "test_limit": 100},
    "model": {"dim": 8, "dim_mults": [1, 2], "head_dim": 8},
    "optim": {"batch_size": 8},
    "sample": {"sampler": "ddim", "steps": 2, "every": 0},
}


def sweep_file(folder: Path, **more) -> Path:
    file = folder / "tiny.yaml"
    grid = {"federation.clients": [2], "method": ["full", "udec"]}
    score = {"images": 100, "rounds": [1, 2], "local": True}
    file.write_text(yaml.safe_dump({"fields": TINY, "grid": grid, "score": score, **more}))
    return file


LINE = Result(
    cell="a", method="udec", partition="label-skew", clients=5, local_epochs=2, varied={}, round=15, metric="fd_fmnist",
    ema=False, score=70.24, deviation=28.31, worst=120.5, local=False, n=100, n_real=500, split="the test split",
    sampler="ddim", steps=20, extractor="fmnist-cnn", checksum="0123456789abcdef", resized_from=16,
    communicated_parameters=1_234_567,
    saving=0.736, wire_bytes=5_000_000, seconds=61.2,
)  # fmt: skip
