"""The runs on which faults are tried, and what must be there afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from jobs import TINY

from fdiff import checkpoint
from fdiff.plan import SHARED_PARTS
from fdiff.soundness import problems

METHODS = tuple(SHARED_PARTS)
GRACE_S = 10.0  # beyond the time-out: by then every rank must have ended
FLAGS = [*TINY, "--sample.every", 0, "--runtime.reduction", "ordered"]


def train(run: str, method: str, rounds: int, *more: object, resume: bool = False) -> list[object]:
    """The arguments of a small run; the same seed and method give the same result."""
    words = ["train", *FLAGS, "--method", method, "--run.dir", run, "--federation.rounds", rounds, *more]
    return [*words, "--resume"] if resume else words


def rounds_there(run: Path) -> list[int]:
    """The rounds of which a checkpoint is visible."""
    return [g.round for g in checkpoint.generations(run)]


def lost(run: Path, committed: int, keep: int = 2) -> int:
    """How many of the newest `keep` rounds up to the last one committed are not there, or there and not sound."""
    wanted = range(max(1, committed - keep + 1), committed + 1)
    there = {g.round: g.path for g in checkpoint.generations(run)}
    gone = [r for r in wanted if r not in there and r + keep > max(there, default=0)]
    return len(gone) + sum(bool(problems(path)) for path in there.values())


def logged(run: Path) -> list[dict]:
    """The rounds in the log, a line cut short left out."""
    lines = (run / "rounds.jsonl").read_text().split("\n")[:-1] if (run / "rounds.jsonl").exists() else []
    return [json.loads(line) for line in lines]
