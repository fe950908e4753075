"""Clients whose training fails, and disks that take no more."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults import injections
from faults.ledger import Row
from faults.processes import Job
from faults.runs import LOADING, METHODS, committed, goes_on, logged, lost, rounds_there, train


def clients(row: Row, cases: range, folder: Path) -> None:
    """An exception, a refusing allocator or a loss that is not finite in one or two clients of four, both policies."""
    for i in cases:
        chance, run = random.Random(i), folder / f"run-{i}"
        how, policy, method = injections.FAILURES[i % 3], ("stop", "drop")[i % 2], METHODS[i // 2 % 4]
        ranks, failing = (1, 2, 4)[i // 3 % 3], tuple(sorted(chance.sample(range(4), 1 + chance.randrange(2))))
        more = ["--federation.on_client_failure", policy, "--runtime.timeout_s", 60, "--optim.ema", 0.9]
        more += LOADING if i % 5 == 2 else ()
        job = Job(train(run.name, method, 3, *more), ranks, folder, partial(injections.fail_client, how, failing, 2))
        ended = job.wait(120)
        statuses = set(job.statuses())
        if policy == "drop":
            dropped = [sorted(map(int, r["dropped"])) for r in logged(run)]
            right = statuses == {0} and dropped == [[], list(failing), []]
        else:
            errors = job.errors()
            right = statuses == {1} and len(errors) == 1 and f"client {failing[0]}, round 2" in errors[0]
        if not right:
            row.notes.append(f"{i} {how} {policy} {method} {failing}: {job.statuses()} {job.said()[-400:]}")
        gone = lost(run, 3 if policy == "drop" else 1)
        row.saw(right, lost=gone, hung=not ended, left_over=job.left_over)


def disks(row: Row, cases: range, folder: Path) -> None:
    """A disk that is full, or turns read-only, while a run commits to it; then there is room again and it goes on."""
    for i in cases:
        disk = folder / f"disk-{i}"
        with small_disk(disk):
            _one_disk(row, i, disk, folder, random.Random(i))


def _one_disk(row: Row, i: int, disk: Path, folder: Path, chance: random.Random) -> None:
    run, method, ranks = disk / f"run-{i}", METHODS[i // 2 % 4], 1 + (i + i // 2) % 2
    job = Job(train(str(run), method, 10_000, "--optim.ema", 0.9), ranks, folder)
    while job.alive() and not rounds_there(run) and time.monotonic() < job.began + 60:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.5))
    with read_only(run / "checkpoints") if i % 2 else filled(disk / "ballast"):
        ended = job.wait(40)
    # What is mounted over the folder also hides what is being written there.
    hidden = ("Read-only file system", "No such file", "is missing", "has vanished")
    words, errors = hidden if i % 2 else ("No space left on device",), job.errors()
    right = set(job.statuses()) == {1} and len(errors) == 1 and any(w in errors[0] for w in words)
    if not right:
        row.notes.append(f"{i}: {job.statuses()} {job.said()[-500:]}")
    gone = lost(run, committed(folder, run.name))
    right = goes_on(row, run, ranks, method, "--optim.ema", 0.9) and right
    row.saw(right, lost=gone, hung=not ended, left_over=job.left_over)


@contextlib.contextmanager
def small_disk(path: Path, size: str = "12m") -> Iterator[None]:
    """A file system of its own in memory; needs root."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def filled(ballast: Path) -> Iterator[None]:
    """No block of its file system is free."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nothing can be made in the folder, not by root either. (A file system with open files cannot be remounted.)"""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
