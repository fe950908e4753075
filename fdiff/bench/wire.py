"""Whole rounds over slow links: bytes beside the plan's, time beside the forecast and beside the library's collectives.

Each rank is a process in a network of its own (see `network`). The clients do not train; votes and reports go over the
same links.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fdiff.bench.measure import Result
from fdiff.bench.network import Network, network, why_not
from fdiff.comm import Communicator
from fdiff.config import Config, to_dict
from fdiff.errors import RunError, UserError
from fdiff.runtime import launcher

RANKS, MBIT_PER_S = (2, 4, 8), (100.0, 1000.0)
PORT = 29_600


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """The four methods among 2, 4 and 8 ranks over links of 100 Mbit/s and 1 Gbit/s; starts the ranks itself."""
    if comm.size > 1:
        raise UserError(f"bench wire: it starts its own ranks; start it alone and not on {comm.size}")
    if reason := why_not():
        raise UserError(f"bench wire: {reason}")
    return [result for ranks in RANKS for speed in MBIT_PER_S for result in _measure(config, ranks, speed)]


def _measure(config: Config, ranks: int, mbit_per_s: float) -> list[Result]:
    runtime = replace(config.runtime, comm="torch", device="cpu", threads=1, timeout_s=120.0)
    with tempfile.TemporaryDirectory() as folder, network(ranks, mbit_per_s) as made:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(to_dict(replace(config, runtime=runtime))))
        command = [sys.executable, "-m", "fdiff.bench.wire_rank", file, mbit_per_s]
        return [Result(**row) for row in json.loads(_on_all(made, command, Path(folder)))]


def _on_all(made: Network, command: Sequence[object], folder: Path) -> str:
    """Run the command as every rank of a job; what rank 0 prints. RunError with a rank's words if it fails."""
    ranks = len(made.namespaces)
    jobs = []
    for rank in range(ranks):
        env = launcher.environment_of(rank, ranks, made.address(0), PORT, "eth0")
        with (folder / f"{rank}.out").open("wb") as out:
            jobs.append(subprocess.Popen(made.inside(rank, *command), env=env, cwd=folder, stdout=out, stderr=out))
    statuses = [job.wait() for job in jobs]
    printed = [(folder / f"{rank}.out").read_text() for rank in range(ranks)]
    if any(statuses):
        rank = next(rank for rank, status in enumerate(statuses) if status)
        raise RunError(f"bench wire: rank {rank} of {ranks} failed: {printed[rank].strip().splitlines()[-1:]}")
    return printed[0].strip().splitlines()[-1]


def as_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What a rank prints for `_measure` to read."""
    return [asdict(result) for result in results]
