"""An array file as checkpoints are made of, for the tests of its format and of damage to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiff.checkpoint.file import write_file

ARRAYS = {
    "parts/encoder": np.linspace(-1, 1, 300, dtype=np.float32),
    "parts/decoder": np.arange(200, dtype=np.float64),
    "samples": np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4),
    "step": np.array(7, np.int64),
}
HEADER = {"round": 3, "note": "päper", "clients": {}}


def write_one(folder: Path) -> Path:
    """A sound file with these arrays and this header."""
    path = folder / "global.h5"
    write_file(path, ARRAYS, HEADER)
    return path
