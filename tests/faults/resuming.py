"""Stopped after a round and taken up with another number of ranks, again and again: bit by bit the same."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

from faults import injections
from faults.ledger import Row
from faults.processes import Job
from faults.runs import METHODS, equal, logged, rounds_there, train
from fdiff.config import Config
from fdiff.plan import host_of, plan_round

RANKS = (4, 2, 1, 4)  # each but the last is stopped
STOPS = len(RANKS) - 1
FIRST = 8  # the first stop of a run is after one of so many rounds
LAST = FIRST + STOPS
CLIENTS, FRACTION = 4, 0.75
KEEPING = ("--optim.ema", 0.9, "--federation.keep_optimizer", "true", "--federation.fraction", FRACTION)


def resumes(row: Row, cases: range, folder: Path) -> None:
    """Runs on 4, 2, 1 and 4 ranks: SIGTERM within the round after each of three in a row; every such stop is a case.

    Cases go by runs, a run's three together; 32 runs are four methods with eight rounds to begin with.
    """
    for i in range(cases.start // STOPS, -(-cases.stop // STOPS)):
        _one_run(row, folder, f"run-{i}", METHODS[i % 4], first_stop(i), random.Random(i))


def first_stop(i: int) -> int:
    """The round after which a run is stopped first."""
    return 1 + (i // 4 + 2 * (i % 4)) % FIRST


def training(method: str, round: int, ranks: int) -> list[int]:
    """The ranks that train in a round: only there a step can be the last."""
    plan = plan_round(method, CLIENTS, round, Config().run.seed, FRACTION)
    return sorted({host_of(client, CLIENTS, ranks) for client in plan.selected})


def _one_run(row: Row, folder: Path, name: str, method: str, first: int, chance: random.Random) -> None:
    run = folder / name
    for leg, ranks in enumerate(RANKS):
        stop, goal = first + leg, LAST if leg == STOPS else 10_000
        arguments = train(name, method, goal, *KEEPING, "--run.checkpoint_every", 4, resume=leg > 0)
        victim = chance.choice(training(method, stop + 1, ranks))
        fault = partial(injections.stop_in_round, stop + 1, 1 + chance.randrange(2), victim)
        job = Job(arguments, ranks, folder, fault if leg < STOPS else None)
        ended = job.wait(120)
        status, there = (0, LAST) if leg == STOPS else (128 + signal.SIGTERM, stop)
        right = ended and set(job.statuses()) == {status} and rounds_there(run)[-1:] == [there]
        right = right and [r["round"] for r in logged(run)] == list(range(1, there + 1))
        silent = right and not equal(run, there, method, *KEEPING)
        if not right or silent:
            row.notes.append(f"{name} {method} {stop} on {ranks}, {silent=}: {job.statuses()} {job.said()[-300:]}")
        found = {"silent": silent, "hung": not ended, "left_over": job.left_over}
        if leg < STOPS:
            row.saw(right, **found)
        else:  # the end of the run, after its last stop
            row.also(**found, lost=not right)
