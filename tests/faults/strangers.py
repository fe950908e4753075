"""Ranks that do not belong together, and rounds of which a part is there already."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

from faults import injections
from faults.ledger import Row
from faults.processes import Job
from faults.runs import METHODS, goes_on, rounds_there, train

OTHER = {
    "optim.lr": 0.05,
    "run.seed": 7,
    "federation.rounds": 4,
    "federation.local_epochs": 2,
    "data.partition": "label-skew",
    "method": "usplit",
    "model.dim": 16,
    "optim.batch_size": 4,
    "runtime.reduction": "fast",
    "data.limit": 60,
}


def settings(row: Row, cases: range, folder: Path) -> None:
    """One rank was started with another value of a field: all end, and name field and rank, before anything is made."""
    fields = list(OTHER)
    for i in cases:
        field, ranks = fields[i % len(fields)], (2, 4)[i % 2]
        victim = random.Random(i).randrange(ranks)
        fault = partial(injections.ask_otherwise, field, OTHER[field], victim)
        job = Job(train(f"run-{i}", "full", 3), ranks, folder, fault)
        ended, errors = job.wait(60), job.errors()
        right = set(job.statuses()) == {2} and len(errors) == 1 and field in errors[0]
        if not right:
            row.notes.append(f"{i} {field} on rank {victim} of {ranks}: {job.statuses()} {job.said()[-400:]}")
        row.saw(right, silent=(folder / f"run-{i}" / "checkpoints").exists(), hung=not ended, left_over=job.left_over)


def parts(row: Row, cases: range, folder: Path) -> None:
    """SIGTERM within a client's training, when others of the round are done: what goes on is bit-equal."""
    for i in cases:
        chance, method, ranks = random.Random(i), METHODS[i % 4], (1, 2)[i // 4 % 2]
        more = ("--optim.ema", 0.9) if i % 3 else ()
        steps = 1 + chance.randrange(2 * 4 // ranks)  # of the victim, whose clients take two each
        fault = partial(injections.stop_in_round, 2, steps, chance.randrange(ranks))
        run = folder / f"run-{i}"
        job = Job(train(run.name, method, 10_000, *more), ranks, folder, fault)
        ended = job.wait(60)
        right = set(job.statuses()) == {128 + signal.SIGTERM} and rounds_there(run)[-1:] == [1]
        if not right:
            row.notes.append(f"{i} {method} step {steps} on {ranks}: {job.statuses()} {job.said()[-400:]}")
        right = goes_on(row, run, ranks, method, *more) and right
        row.saw(right, hung=not ended, left_over=job.left_over)
