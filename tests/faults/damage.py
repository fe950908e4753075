"""Checkpoints damaged in one of many ways: it is reported, and the one before is used."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np

from faults import forging
from faults.ledger import Row
from faults.processes import Job
from faults.runs import equal, rounds_there, train
from fdiff import checkpoint
from fdiff.checkpoint.file import Damaged, read_file
from fdiff.federation import snapshot

KINDS = ("truncated", "zero length", "bit flipped", "file missing", "dataset missing", "shape", "dtype", "version")
STARTS = 4  # how many of the damaged runs are also taken up by a job
MORE = ("--optim.ema", 0.9, "--run.keep_checkpoints", 99)


def a_run(folder: Path, method: str = "udec", rounds: int = 2) -> Path:
    """A finished run to damage copies of."""
    job = Job(train(f"sound-{method}", method, rounds, *MORE), 1, folder)
    assert job.wait(120) and job.statuses() == [0], job.said()
    return folder / f"sound-{method}"


def files(row: Row, cases: range, folder: Path) -> None:
    """The newest checkpoint damaged: found out before anything of it is used, or without effect on what is loaded.

    A wrong shape or dtype has a right checksum, and every other time a manifest that agrees; another version, both.
    """
    sound = a_run(folder)
    for i in cases:
        chance, run, kind = random.Random(i), folder / "run", KINDS[i % len(KINDS)]
        shutil.copytree(sound, run)
        newest = checkpoint.generations(run)[-1].path
        files = [newest / checkpoint.GLOBAL] if kind == "version" else sorted(newest.iterdir())
        file = chance.choice(files)
        before = read_file(file)
        harm(file, kind, chance, forged=i // len(KINDS) % 2 == 1)
        detected = snapshot.newest_sound(run).round == 1
        # a flipped bit may be where no data is, so that all is loaded as it was written
        silent = not detected and loads_otherwise(file, before)
        detected = detected or (kind == "bit flipped" and not silent)
        if kind == "version":
            detected = detected and "has layout version 99" in checkpoint.verify(newest)[0]
        if i % max(1, len(cases) // STARTS) == 0:
            detected = _is_taken_up(folder) and detected
        if not detected:
            row.notes.append(f"{i} {kind} of {file.name}")
        row.saw(detected, silent=silent)
        shutil.rmtree(run)


def harm(file: Path, kind: str, chance: random.Random, forged: bool) -> None:
    """Damage a file of a checkpoint; `forged`: a replaced dataset is what the manifest says."""
    size = file.stat().st_size
    if kind == "truncated":
        os.truncate(file, chance.randrange(1, size))
    elif kind == "zero length":
        os.truncate(file, 0)
    elif kind == "file missing":
        file.unlink()
    elif kind == "bit flipped":
        content = bytearray(file.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "version":
        header = read_file(file)[1] | {"version": 99}
        forging.replace(file, "header", forging.as_array(header), manifest=True)
    else:
        _harm_dataset(file, kind, chance, forged)


def _harm_dataset(file: Path, kind: str, chance: random.Random, forged: bool) -> None:
    name = chance.choice(forging.names(file))
    with h5py.File(file, "r+") as opened:
        array = opened[name][()]
        if kind == "dataset missing":
            del opened[name]
    if kind == "shape":
        longer = np.concatenate([array.reshape(-1), array.reshape(-1)[:1]])
        forging.replace(file, name, longer, manifest=forged)
    elif kind == "dtype":
        forging.replace(file, name, array.astype(np.float64), manifest=forged)


def loads_otherwise(file: Path, before: tuple[dict[str, np.ndarray], dict]) -> bool:
    """Whether a file is read as sound and holds something else than before."""
    try:
        arrays, header = read_file(file)
    except Damaged:
        return False
    same = arrays.keys() == before[0].keys() and all(
        np.array_equal(arrays[n], before[0][n]) and arrays[n].dtype == before[0][n].dtype for n in arrays
    )
    return not (same and header == before[1])


def _is_taken_up(folder: Path) -> bool:
    job = Job(train("run", "udec", 3, *MORE, resume=True), 1, folder)
    ended = job.wait(120) and job.statuses() == [0] and not job.left_over
    return ended and rounds_there(folder / "run") == [1, 2, 3] and equal(folder / "run", 3, "udec", *MORE[:2])
