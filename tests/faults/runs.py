"""The runs on which faults are tried, and what must be there afterwards."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jobs import TINY, arrays

from faults.ledger import Row
from faults.processes import Job
from fdiff import checkpoint
from fdiff.federation.validate import find_problems
from fdiff.registry import BUILT_IN

METHODS = BUILT_IN["method"]
GRACE_S = 10.0  # beyond the time-out: by then every rank must have ended
FLAGS = [*TINY, "--sample.every", 0, "--runtime.reduction", "ordered"]
LOADING = ("--data.in_memory", "never", "--data.workers", 2)  # processes of a rank's own, which may outlive it


def train(run: str, method: str, rounds: int, *more: object, resume: bool = False) -> list[object]:
    """The arguments of a small run; the same seed and method give the same result."""
    words = ["train", *FLAGS, "--method", method, "--run.dir", run, "--federation.rounds", rounds, *more]
    return [*words, "--resume"] if resume else words


def rounds_there(run: Path) -> list[int]:
    """The rounds of which a checkpoint is visible."""
    return [g.round for g in checkpoint.generations(run)]


def committed(folder: Path, run: str) -> int:
    """The last round whose commit came to its end, as rank 0 noted it beside the run; see injections.note_commits."""
    note = folder / f"{run}.committed"
    return int(note.read_text().split()[-1]) if note.exists() else 0


def lost(run: Path, committed: int, keep: int = 2) -> int:
    """How many of the newest `keep` rounds up to the last one committed are not there, or there and not sound."""
    wanted = range(max(1, committed - keep + 1), committed + 1)
    there = {g.round: g.path for g in checkpoint.generations(run)}
    gone = [r for r in wanted if r not in there and r + keep > max(there, default=0)]
    return len(gone) + sum(bool(find_problems(path)) for path in there.values())


def logged(run: Path) -> list[dict]:
    """The rounds in the log, a line cut short left out."""
    lines = (run / "rounds.jsonl").read_text().split("\n")[:-1] if (run / "rounds.jsonl").exists() else []
    return [json.loads(line) for line in lines]


# --- bit-equal -----------------------------------------------------------------------------------------------------


def equal(run: Path, round: int, method: str, *more: object) -> bool:
    """Whether a run's checkpoint of a round is bit by bit that of a run with the same flags that was never stopped."""
    expected, found = UNINTERRUPTED.arrays(method, round, *more), arrays(run, round)
    return expected.keys() == found.keys() and all(np.array_equal(expected[n], found[n]) for n in found)


def goes_on(row: Row, run: Path, ranks: int, method: str, *more: object) -> bool:
    """Take a run up for one more round, on so many ranks: whether that succeeds and the result is bit-equal.

    The flags `more` must be those that decide the result.
    """
    round = max(rounds_there(run), default=0) + 1
    job = Job(train(str(run), method, round, *more, resume=True), ranks, run.parent)
    ended = job.wait(60)
    went_on = ended and set(job.statuses()) == {0}
    silent = went_on and not equal(run, round, method, *more)
    if not went_on or silent:
        row.notes.append(f"taken up to round {round} on {ranks} ranks, {silent=}: {job.statuses()} {job.said()[-300:]}")
    row.also(silent=silent, hung=not ended, left_over=job.left_over)
    return went_on and not silent


class Uninterrupted:
    """Runs on one rank in one go, one for each method and flags, made when they are first asked for."""

    AT_LEAST = 12  # rounds of which every checkpoint is kept; of a longer run the last

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fdiff-uninterrupted-")
        self._runs: dict[tuple[str, ...], Path] = {}
        self._lock = threading.Lock()

    def arrays(self, method: str, round: int, *more: object) -> Mapping[str, np.ndarray]:
        """What the checkpoint of a round holds."""
        rounds = max(round, self.AT_LEAST)
        key = (method, str(rounds), *map(str, more))
        with self._lock:
            if key not in self._runs:
                self._runs[key] = self._make(method, rounds, *more)
        return arrays(self._runs[key], round)

    def _make(self, method: str, rounds: int, *more: object) -> Path:
        folder = Path(self._folder.name)
        run = folder / f"{method}-{len(self._runs)}"
        keeping = ("--run.keep_checkpoints", rounds, "--run.checkpoint_every", 1 if rounds == self.AT_LEAST else rounds)
        job = Job(train(run.name, method, rounds, *more, *keeping), 1, folder)
        assert job.wait(600) and job.statuses() == [0], job.said()
        return run


UNINTERRUPTED = Uninterrupted()
