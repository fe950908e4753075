"""Jobs for the tests: `fdiff ARGUMENTS` alone or on several ranks, commands of any kind; and what a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from forked_jobs import Before, Job, clean_env

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# Four clients, three rounds, seconds of work: 64 images of 8×8, 70 thousand parameters. A fresh Adam moves an element
# whose gradient is all but zero by a learning rate either way, as rounding has it; with this one, by little.
TINY = """
--federation.clients 4 --federation.rounds 3 --federation.local_epochs 1 --data.limit 64 --data.image_side 8
--model.dim 8 --model.dim_mults [1,2] --model.head_dim 8 --optim.batch_size 8 --runtime.threads 1
--optim.lr 1e-5 --sample.sampler ddim --sample.steps 4 --sample.images 4 --sample.batch_size 3
""".split()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    def check(self) -> Done:
        """Itself, if it succeeded; else the test fails with what it printed."""
        assert self.status == 0, f"status {self.status}\n{self.out}\n{self.err}"
        return self


def execute(command: Sequence[object], cwd: Path, timeout_s: float = 240, env: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end; a hang fails the test."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_env() if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def fdiff(*arguments: object, cwd: Path) -> Done:
    """`fdiff ARGUMENTS` alone, in a process forked from the warm server."""
    return on_ranks(1, *arguments, cwd=cwd)[0]


def on_ranks(
    ranks: int, *arguments: object, cwd: Path, timeout_s: float = 240, before: Before | None = None
) -> list[Done]:
    """`fdiff ARGUMENTS` on so many ranks; how each ended. A hang fails the test."""
    with tempfile.TemporaryDirectory() as logs:
        job = Job(arguments, ranks, cwd, before, Path(logs))
        assert job.wait(timeout_s), f"not ended within {timeout_s} s:\n{job.said()}"
        return [Done(status, job.printed(r, "out"), job.printed(r, "err")) for r, status in enumerate(job.statuses())]


def in_turn(ranks: int, requests: Sequence[Sequence[object]], cwd: Path) -> list[list[Done]]:
    """Each request as a job of its own on all ranks: by request, then by rank."""
    return [on_ranks(ranks, *request, cwd=cwd) for request in requests]


def torchrun(ranks: int, *arguments: object, cwd: Path) -> Done:
    """`torchrun --nproc_per_node RANKS -m fdiff ARGUMENTS`."""
    return execute([BIN / "torchrun", "--standalone", "--nproc_per_node", ranks, "-m", "fdiff", *arguments], cwd)


# --- what a run leaves ---------------------------------------------------------------------------------------------


def rows(run: Path, name: str = "rounds") -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def arrays(run: Path, round: int) -> dict[str, np.ndarray]:
    """Every dataset of a checkpoint, read by plain h5py, by `file/dataset`; bookkeeping left out."""
    found: dict[str, np.ndarray] = {}

    def keep(file: str, name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and name not in ("header", "manifest"):
            found[f"{file}/{name}"] = item[()]

    for path in sorted((run / "checkpoints" / f"round-{round:06d}").glob("*.h5")):
        with h5py.File(path) as file:
            file.visititems(lambda name, item, stem=path.stem: keep(stem, name, item))
    return found


def largest_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """The largest ‖a - b‖ / ‖b‖ of any dataset of parameters; the two must hold the same datasets."""
    assert a.keys() == b.keys() and a
    pairs = [(a[n].astype(float), b[n].astype(float)) for n in a if "samples" not in n]
    return max(float(np.linalg.norm(x - y) / (np.linalg.norm(y) or 1)) for x, y in pairs)
