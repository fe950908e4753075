"""Real jobs for the tests: `fdiff` alone, under torchrun, or many requests in one torchrun; and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

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


def clean_env(**more: str) -> dict[str, str]:
    """This environment without what a launcher may have left in it."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "PMIX", "MASTER_", "TORCHELASTIC_", "SUBMITIT_")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in ranks}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


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
    """`fdiff ARGUMENTS` alone."""
    return execute([BIN / "fdiff", *arguments], cwd)


def torchrun(ranks: int, *arguments: object, cwd: Path) -> Done:
    """`torchrun --nproc_per_node RANKS -m fdiff ARGUMENTS`."""
    return execute([BIN / "torchrun", "--standalone", "--nproc_per_node", ranks, "-m", "fdiff", *arguments], cwd)


def in_turn(ranks: int, requests: Sequence[Sequence[object]], cwd: Path) -> list[list[Done]]:
    """Each request as a job of its own on all ranks, with its real exit status: by request, then by rank.

    One torchrun starts them all, so that torch is loaded once; every rank forks a process for each request.
    """
    plan = cwd / "requests.json"
    plan.write_text(json.dumps([[str(word) for word in request] for request in requests]))
    script = ROOT / "tests" / "helpers" / "forked.py"
    execute([BIN / "torchrun", "--standalone", "--nproc_per_node", ranks, script, plan], cwd).check()
    return [[_result(cwd, i, rank) for rank in range(ranks)] for i in range(len(requests))]


def _result(cwd: Path, request: int, rank: int) -> Done:
    file = cwd / f"result-{request}-{rank}"
    return Done(int(file.read_text()), file.with_suffix(".out").read_text(), file.with_suffix(".err").read_text())


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
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)
