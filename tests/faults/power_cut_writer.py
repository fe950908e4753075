"""Commits rounds until it is cut off, and says so after each: `power_cut_writer.py {sound,careless} FOLDER`."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np

from fdiff import checkpoint
from fdiff.checkpoint.file import write_file

ARRAY = np.random.default_rng(0).random(100_000, dtype=np.float32)


def sound(run: Path, round: int) -> None:
    """As fdiff does it."""
    target = checkpoint.temporary_folder(run, round, "here")
    target.mkdir(parents=True)
    write_file(target / "global.h5", {"parts/decoder": ARRAY + round}, {"round": round})
    checkpoint.make_visible(target, run, round, keep=2)


def careless(run: Path, round: int) -> None:
    """Straight into the final place, the oldest one removed as soon as there is a newer one; nothing synced."""
    os.fsync = lambda _: None
    final = checkpoint.root(run) / checkpoint.generation_name(round)
    final.mkdir(parents=True)
    write_file(final / "global.h5", {"parts/decoder": ARRAY + round}, {"round": round})
    checkpoint.prune(run, keep=2)


if __name__ == "__main__":
    how, run = {"sound": sound, "careless": careless}[sys.argv[1]], Path(sys.argv[2])
    for round in itertools.count(1):
        how(run, round)
        print(round, flush=True)
