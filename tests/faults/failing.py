"""Clients whose training fails, and disks that take no more."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults import plants
from faults.ledger import Row
from faults.processes import Job, left_over
from faults.runs import METHODS, logged, lost, rounds_there, train


def clients(count: int, folder: Path, seed: int) -> Row:
    """An exception, a refusing allocator or a loss that is not finite in one or two clients of four, both policies."""
    row = Row("exception, out of memory or bad loss in a client")
    for i in range(count):
        chance, run = random.Random(seed + i), folder / f"run-{i}"
        how, policy, method = plants.FAILURES[i % 3], ("stop", "drop")[i % 2], METHODS[i // 2 % 4]
        failing = tuple(sorted(chance.sample(range(4), 1 + chance.randrange(2))))
        more = ["--federation.on_client_failure", policy, "--runtime.timeout_s", 60, "--optim.ema", 0.9]
        job = Job(
            train(run.name, method, 3, *more), (1, 2, 4)[i % 3], folder, partial(plants.fail_client, how, failing, 2)
        )
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
        committed = 3 if policy == "drop" else 1
        row.saw(right, lost=lost(run, committed), hung=not ended, left_over=left_over(job.pids))
    return row


def disks(count: int, folder: Path, seed: int) -> Row:
    """A disk that is full, or turns read-only, while a run commits to it; then there is room again and it goes on."""
    row = Row("disk full or read-only during a commit")
    for i in range(count):
        disk = folder / f"disk-{i}"
        with small_disk(disk):
            _one_disk(row, i, disk, folder, random.Random(seed + i))
    return row


def _one_disk(row: Row, i: int, disk: Path, folder: Path, chance: random.Random) -> None:
    run = disk / "run"
    job = Job(train(str(run), METHODS[i // 2 % 4], 10_000, "--optim.ema", 0.9), 1 + i % 2, folder)
    while job.alive() and not rounds_there(run) and time.monotonic() < job.began + 60:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.5))
    with read_only(run / "checkpoints") if i % 2 else filled(disk / "ballast"):
        ended = job.wait(40)
    committed, errors = max(rounds_there(run), default=0), job.errors()
    # What is mounted over the folder also hides what is being written there.
    hidden = ("Read-only file system", "No such file", "is missing", "has vanished")
    words = hidden if i % 2 else ("No space left on device",)
    right = set(job.statuses()) == {1} and len(errors) == 1 and any(w in errors[0] for w in words)
    damage = lost(run, committed)
    again = Job(train(str(run), METHODS[i // 2 % 4], committed + 1, "--optim.ema", 0.9, resume=True), 1 + i % 2, folder)
    ended = again.wait(60) and ended
    right = right and set(again.statuses()) == {0} and rounds_there(run)[-1] == committed + 1
    if not right:
        row.notes.append(f"{i}: {job.statuses()} {job.said()[-500:]} then {again.statuses()} {again.said()[-300:]}")
    row.saw(right, lost=damage, hung=not ended, left_over=left_over(job.pids + again.pids))


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
