"""The jobs on which faults are injected, and the processes of jobs that a launcher started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import forked_jobs

from faults import injections

TAG = "FDIFF_FAULT_JOB"  # in the environment of jobs that a launcher starts

Fault = Callable[[int], None]  # called in each rank with its number, before the command


class Job(forked_jobs.Job):
    """`fdiff ARGUMENTS` on so many ranks, which note their commits; `fault` is a module's function or a partial."""

    def __init__(self, arguments: Sequence[object], ranks: int, cwd: Path, fault: Fault | None = None) -> None:
        super().__init__(arguments, ranks, cwd, partial(_prepare, fault))


def _prepare(fault: Fault | None, rank: int) -> None:
    injections.note_commits()
    if fault:
        fault(rank)


def tagged(tag: str) -> set[int]:
    """The processes whose environment has this tag; what has ended has no environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found
