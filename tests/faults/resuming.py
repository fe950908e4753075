"""Stopped after a round and taken up with another number of ranks: the same last checkpoint, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from jobs import arrays

from faults.ledger import Row
from faults.processes import Job, left_over
from faults.runs import METHODS, logged, train
from fdiff import checkpoint

ROUNDS = 7
CHANGES = ((4, 2), (2, 1), (1, 4), (4, 4))
KEEPING = ("--optim.ema", 0.9, "--federation.keep_optimizer", "true", "--federation.fraction", 0.75)


def resumes(count: int, folder: Path, seed: int) -> Row:
    """Stop after each of 6 rounds, four methods, four changes of the number of ranks; 96 in all.

    Stopped means that the newest checkpoint is that round's; what the logs say of later ones has to be forgotten.
    """
    row = Row("stopped and resumed on other numbers of ranks")
    cases = [(method, stop, change) for stop in range(1, 7) for method in METHODS for change in CHANGES]
    step = max(1, len(cases) // count)
    step -= step > 1 and step % 2 == 0  # odd, so that methods and changes take turns
    for method, stop, (before, after) in cases[::step][:count]:
        whole = _whole(folder, method, before)
        run = Path(shutil.copytree(whole, folder / "run"))
        for later in (g for g in checkpoint.generations(run) if g.round > stop):
            shutil.rmtree(later.path)
        job = Job(train("run", method, ROUNDS, *KEEPING, "--run.keep_checkpoints", 99, resume=True), after, folder)
        ended = job.wait(120)
        expected, got = arrays(whole, ROUNDS), arrays(run, ROUNDS) if ended else {}
        equal = expected.keys() == got.keys() and all(np.array_equal(expected[n], got[n]) for n in expected)
        right = equal and [r["round"] for r in logged(run)] == list(range(1, ROUNDS + 1))
        if not right:
            row.notes.append(f"{method} {stop} {before}->{after}: {job.statuses()} {job.said()[-300:]}")
        row.saw(right, hung=not ended, left_over=left_over(job.pids))
        shutil.rmtree(run)
    return row


def _whole(folder: Path, method: str, ranks: int) -> Path:
    """A run of all rounds in one go that keeps every checkpoint; made when it is first wanted."""
    run = folder / f"{method}-{ranks}"
    if not run.exists():
        job = Job(train(run.name, method, ROUNDS, *KEEPING, "--run.keep_checkpoints", 99), ranks, folder)
        assert job.wait(180) and set(job.statuses()) == {0}, job.said()
    return run
