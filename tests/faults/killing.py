"""Processes that die, are stopped or are asked to stop."""

from __future__ import annotations

import random
import re
import signal
import time
from functools import partial
from pathlib import Path

from faults import plants
from faults.ledger import Row
from faults.processes import Job, left_over
from faults.runs import GRACE_S, METHODS, logged, lost, rounds_there, train

TIMEOUT_S = 5.0
START_S = 60.0  # a machine under load


def commits(count: int, folder: Path, seed: int) -> Row:
    """SIGKILL of rank 0 at random points of a commit; the same run is taken up again and again."""
    row = Row("SIGKILL of rank 0 during a commit")
    run, reached = folder / "run", 0
    for i in range(count):
        # every fourth time on two ranks, of which the second has to end by itself
        ranks = 2 if i % 4 == 3 else 1
        arguments = train("run", "udec", 10_000, "--runtime.timeout_s", TIMEOUT_S, resume=i > 0)
        job = Job(arguments, ranks, folder, partial(plants.kill_in_commit, seed + i))
        while job.processes[0].is_alive() and time.monotonic() < job.began + START_S:
            time.sleep(0.01)
        ended = job.wait(TIMEOUT_S + GRACE_S)
        committed = int((run / "committed").read_text().split()[-1]) if (run / "committed").exists() else 0
        visible = max(rounds_there(run), default=0)
        went_on = committed >= reached and job.statuses()[0] == -signal.SIGKILL
        if not went_on:
            row.notes.append(f"{i}: {job.statuses()} {job.said()[-300:]}")
        row.saw(
            went_on and job.statuses()[1:] in ([], [1]),
            lost=lost(run, max(committed, reached)) + (visible < reached),
            hung=not ended,
            left_over=left_over(job.pids),
        )
        reached = max(visible, committed)
    return row


def ranks(count: int, folder: Path, seed: int) -> Row:
    """SIGKILL of a client rank of four: in training, between the vote and a collective, within one; four methods."""
    row = Row("SIGKILL of a client rank")
    for i in range(count):
        place, method = plants.PLACES[i % 3], METHODS[i // 3 % 4]
        victim = random.Random(seed + i).randrange(1, 4)
        run = folder / f"run-{i}"
        # in the third round: round 2 is being committed, and that began when round 1 was there
        fault = partial(plants.kill_rank, place, victim, 3, seed + i)
        fast = ("--runtime.timeout_s", TIMEOUT_S, "--runtime.reduction", "fast")
        job = Job(train(run.name, method, 4, *fast), 4, folder, fault)
        _until_dead(job, victim)
        committed = max(rounds_there(run), default=0)
        began = time.monotonic()
        ended = job.wait(TIMEOUT_S + GRACE_S)
        statuses, errors = job.statuses(), job.errors()
        named = len(errors) == 1 and re.search(rf"\branks? (\d, )*{victim}\b", errors[0]) is not None
        others = [s for r, s in enumerate(statuses) if r != victim]
        detected = statuses[victim] == -signal.SIGKILL and others == [1, 1, 1] and named
        if not detected:
            row.notes.append(f"{i} {place} {method} rank {victim}: {statuses} {job.said()[-400:]}")
        row.saw(
            detected,
            lost=lost(run, max(committed, 1)),
            hung=not ended,
            left_over=left_over(job.pids),
            after_s=max(job.ended_s.values()) - began,
        )
    return row


def _until_dead(job: Job, victim: int) -> None:
    while job.processes[victim].is_alive() and time.monotonic() < job.began + START_S:
        time.sleep(0.01)


def stopped(count: int, folder: Path, seed: int) -> Row:
    """SIGSTOP of one rank of four at a random time after the first round."""
    row = Row("SIGSTOP of one rank")
    for i in range(count):
        chance, run = random.Random(seed + i), folder / f"run-{i}"
        job = Job(train(run.name, METHODS[i % 4], 10_000, "--runtime.timeout_s", TIMEOUT_S), 4, folder)
        _until_round(job, run, 1)
        time.sleep(chance.uniform(0, 1))
        victim, began = chance.randrange(4), time.monotonic()
        committed = max(rounds_there(run), default=0)
        job.signal(victim, signal.SIGSTOP)
        ended = job.wait(TIMEOUT_S + GRACE_S, besides=[victim])
        others = [s for r, s in enumerate(job.statuses()) if r != victim]
        named = [e for e in job.errors() if re.search(rf"\branks? (\d, )*{victim}\b", e)]
        if others != [1, 1, 1] or len(named) != 1:
            row.notes.append(f"{i} rank {victim}: {job.statuses()} {job.said()[-400:]}")
        row.saw(
            others == [1, 1, 1] and len(named) == 1,
            lost=lost(run, committed),
            hung=not ended,
            left_over=left_over(job.pids),
            after_s=max(t for r, t in job.ended_s.items() if r != victim) - began,
        )
    return row


def _until_round(job: Job, run: Path, round: int) -> None:
    while job.alive() and max(rounds_there(run), default=0) < round and time.monotonic() < job.began + START_S:
        time.sleep(0.02)


def signals(count: int, folder: Path, seed: int) -> Row:
    """SIGTERM or SIGUSR2 at a random time, to one rank or to all: the last complete round is committed, the status
    tells why, and the run can be taken up."""
    row = Row("SIGTERM or SIGUSR2 at a random time")
    for i in range(count):
        chance, run = random.Random(seed + i), folder / f"run-{i}"
        number = (signal.SIGTERM, signal.SIGUSR2)[i % 2]
        arguments = train(run.name, METHODS[i % 4], 10_000, "--run.checkpoint_every", 5, "--runtime.timeout_s", 60)
        job = Job(arguments, 1 + i % 3, folder)
        while job.alive() and not logged(run) and time.monotonic() < job.began + START_S:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2))
        hit = range(1 + i % 3) if i % 4 < 2 else [chance.randrange(1 + i % 3)]
        began = time.monotonic()
        for rank in hit:
            job.signal(rank, number)
        ended = job.wait(30)
        complete = logged(run)[-1]["round"] if logged(run) else 0
        right = set(job.statuses()) == {128 + number} and rounds_there(run)[-1:] == [complete]
        if not right:
            row.notes.append(f"{i}: {job.statuses()} {rounds_there(run)} of {complete}: {job.said()[-300:]}")
        row.saw(
            right,
            lost=lost(run, complete, keep=1),
            hung=not ended,
            left_over=left_over(job.pids),
            after_s=max(job.ended_s.values()) - began,
        )
    return row
