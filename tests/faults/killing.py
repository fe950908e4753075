"""Processes that die, are stopped or are asked to stop."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults import injections
from faults.ledger import Row
from faults.processes import Job
from faults.runs import GRACE_S, LOADING, METHODS, committed, equal, goes_on, logged, lost, rounds_there, train

TIMEOUT_S = 5.0
HELD_S = 30.0
START_S = 60.0  # a machine under load


def commits(row: Row, cases: range, folder: Path) -> None:
    """SIGKILL of rank 0 at random points of a commit; the same run is taken up again and again, and at the end is
    bit by bit what it would have been."""
    run, reached = folder / "run", 0
    for i in cases:
        # every fourth time on two ranks, of which the second has to end by itself
        ranks = 2 if i % 4 == 3 else 1
        arguments = train("run", "udec", 10_000, "--runtime.timeout_s", TIMEOUT_S, resume=run.exists())
        job = Job(arguments, ranks, folder, partial(injections.kill_in_commit, i))
        _until(job, lambda job=job: 0 not in job.alive())
        ended = job.wait(TIMEOUT_S + GRACE_S)
        done, visible = committed(folder, "run"), max(rounds_there(run), default=0)
        went_on = done >= reached and job.statuses()[0] == -signal.SIGKILL
        if not went_on:
            row.notes.append(f"{i}: {job.statuses()} {job.said()[-300:]}")
        row.saw(
            went_on and job.statuses()[1:] in ([], [1]),
            lost=lost(run, max(done, reached)) + (visible < reached),
            hung=not ended,
            left_over=job.left_over,
        )
        reached = max(visible, done)
    if not equal(run, reached, "udec"):
        row.notes.append(f"the last checkpoint, round {reached}, is not that of a run never stopped")
        row.also(silent=1)
    goes_on(row, run, 1, "udec")


def segfaults(row: Row, cases: range, folder: Path) -> None:
    """SIGSEGV of a client rank of four, as `ranks`."""
    ranks(row, cases, folder, signal.SIGSEGV)


def ranks(row: Row, cases: range, folder: Path, number: signal.Signals = signal.SIGKILL) -> None:
    """The end of a client rank of four: in training, between the vote and a collective, within one; four methods, both
    reductions. What was summed in order is then taken up."""
    die = injections.segfault if number == signal.SIGSEGV else injections.die
    for i in cases:
        place, method, reduction = injections.PLACES[i % 3], METHODS[i % 4], ("fast", "ordered")[i // 4 % 2]
        victim, run = random.Random(i).randrange(1, 4), folder / f"run-{i}"
        more = ("--runtime.reduction", reduction, *(LOADING if i // 3 % 4 == 1 else ()))
        # in the third round: round 2 is being committed, and that began when round 1 was there
        fault = partial(injections.kill_rank, place, victim, 3, i, die=die)
        job = Job(train(run.name, method, 4, "--runtime.timeout_s", TIMEOUT_S, *more), 4, folder, fault)
        _until(job, lambda job=job, victim=victim: victim not in job.alive())
        began = time.monotonic()
        ended = job.wait(TIMEOUT_S + GRACE_S)
        named = len(job.errors()) == 1 and _names(victim, job.errors()[0])
        others = [s for r, s in enumerate(job.statuses()) if r != victim]
        detected = job.statuses()[victim] == -number and others == [1, 1, 1] and named
        if not detected:
            row.notes.append(f"{i} {place} {method} rank {victim}: {job.statuses()} {job.said()[-400:]}")
        gone, after_s = lost(run, max(committed(folder, run.name), 1)), max(job.ended_s.values()) - began
        if reduction == "ordered":
            detected = goes_on(row, run, 1 + i % 3, method) and detected
        row.saw(detected, lost=gone, hung=not ended, left_over=job.left_over, after_s=after_s)


def stopped(row: Row, cases: range, folder: Path) -> None:
    """SIGSTOP of one rank of four at a random time after the first round; then the run is taken up."""
    for i in cases:
        chance, run = random.Random(i), folder / f"run-{i}"
        more = ("--runtime.timeout_s", TIMEOUT_S, *(LOADING if i % 3 == 1 else ()))
        job = Job(train(run.name, METHODS[i % 4], 10_000, *more), 4, folder)
        _until(job, lambda run=run: bool(rounds_there(run)))
        time.sleep(chance.uniform(0, 1))
        victim, began = chance.randrange(4), time.monotonic()
        job.signal(victim, signal.SIGSTOP)
        ended = job.wait(TIMEOUT_S + GRACE_S, besides=[victim])
        others = [s for r, s in enumerate(job.statuses()) if r != victim]
        named = [e for e in job.errors() if _names(victim, e)]
        detected = others == [1, 1, 1] and len(named) == 1
        if not detected:
            row.notes.append(f"{i} rank {victim}: {job.statuses()} {job.said()[-400:]}")
        gone, after_s = lost(run, committed(folder, run.name)), max(job.ended_s[r] for r in {0, 1, 2, 3} - {victim})
        detected = goes_on(row, run, 1 + i % 2, METHODS[i % 4]) and detected
        row.saw(detected, lost=gone, hung=not ended, left_over=job.left_over, after_s=after_s - began)


def locks(row: Row, cases: range, folder: Path) -> None:
    """A rank of four holds the interpreter's lock for 30 s: with the default time-out the run goes on, bit-equal; with
    one of 5 s the rank is named."""
    for i in cases:
        victim, run, patient = random.Random(i).randrange(1, 4), folder / f"run-{i}", i % 2 == 0
        more = () if patient else ("--runtime.timeout_s", TIMEOUT_S)
        fault = partial(injections.hold_in_round, 2, HELD_S, victim=victim, hold=injections.hold_the_lock)
        job = Job(train(run.name, METHODS[i // 2 % 4], 3, *more), 4, folder, fault)
        _until(job, lambda job=job: (folder / "held").exists())
        began = time.monotonic()
        ended = job.wait(HELD_S + START_S)
        (folder / "held").unlink()
        named = [e for e in job.errors() if _names(victim, e)]
        if patient:
            detected = job.statuses() == [0] * 4 and equal(run, 3, METHODS[i // 2 % 4])
        else:
            others = max(job.ended_s[r] for r in {0, 1, 2, 3} - {victim}) - began
            detected = set(job.statuses()) == {1} and len(named) == 1 and others < TIMEOUT_S + GRACE_S
        if not detected:
            row.notes.append(f"{i} {patient=} rank {victim}: {job.statuses()} {job.said()[-400:]}")
        row.saw(detected, lost=lost(run, committed(folder, run.name)), hung=not ended, left_over=job.left_over)


def _names(rank: int, error: str) -> bool:
    return re.search(rf"\branks? (\d, )*{rank}\b", error) is not None


def _until(job: Job, true: Callable[[], bool]) -> None:
    """Wait for it as long as the job lives and has not had time enough."""
    while job.alive() and not true() and time.monotonic() < job.began + START_S:
        time.sleep(0.02)


def signals(row: Row, cases: range, folder: Path) -> None:
    """SIGTERM or SIGUSR2 at a random time, to one rank or to all: the last complete round is committed, the status
    tells why, and the run is taken up."""
    for i in cases:
        chance, run, ranks = random.Random(i), folder / f"run-{i}", 1 + i % 3
        number, method = (signal.SIGTERM, signal.SIGUSR2)[(i + i // 4) % 2], METHODS[i % 4]
        more = ("--run.checkpoint_every", 5, "--runtime.timeout_s", 60, *(LOADING if i % 3 == 1 else ()))
        job = Job(train(run.name, method, 10_000, *more), ranks, folder)
        _until(job, lambda run=run: bool(logged(run)))
        time.sleep(chance.uniform(0, 2))
        hit = range(ranks) if i // 2 % 2 else [chance.randrange(ranks)]
        began = time.monotonic()
        for rank in hit:  # with all that it has started, as launchers do
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pids[rank], number)
        ended = job.wait(30)
        complete = logged(run)[-1]["round"] if logged(run) else 0
        right = set(job.statuses()) == {128 + number} and rounds_there(run)[-1:] == [complete]
        if not right:
            row.notes.append(f"{i}: {job.statuses()} {rounds_there(run)} of {complete}: {job.said()[-300:]}")
        gone, after_s = lost(run, complete, keep=1), max(job.ended_s.values()) - began
        right = goes_on(row, run, 1 + (i + 1) % 3, method) and right
        row.saw(right, lost=gone, hung=not ended, left_over=job.left_over, after_s=after_s)
