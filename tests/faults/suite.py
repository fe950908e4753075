"""The faults, how often each is injected, and where that is possible."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import slurm_cluster

from faults import damage, failing, killing, launched, resuming
from faults.ledger import Row


@dataclass(frozen=True)
class Fault:
    """A way to make a row: `make(count, folder, seed)`; counts of the short and the full suite."""

    make: Callable[[int, Path, int], Row]
    short: int
    full: int
    needs: Callable[[], str | None] = lambda: None  # why it cannot be injected here, or None


def mounting() -> str | None:
    """Why file systems cannot be mounted here, or None."""
    missing = [program for program in ("mount", "mkfs.ext4") if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    return f"not found: {', '.join(missing)} (apt install e2fsprogs mount)" if missing else None


FAULTS: dict[str, Fault] = {
    "commits": Fault(killing.commits, 20, 200),
    "ranks": Fault(killing.ranks, 8, 100),
    "clients": Fault(failing.clients, 8, 50),
    "stopped": Fault(killing.stopped, 2, 20),
    "signals": Fault(killing.signals, 4, 30),
    "torchrun": Fault(launched.torchrun, 1, 20),
    "slurm": Fault(launched.on_slurm, 2, 10, needs=slurm_cluster.why_not),
    "damage": Fault(damage.files, 30, 100),
    "disks": Fault(failing.disks, 4, 20, needs=mounting),
    "resumes": Fault(resuming.resumes, 12, 96),
    "configurations": Fault(damage.configurations, 25, 100),
    "checkpoints": Fault(damage.checkpoints, 25, 100),
    "power": Fault(damage.power_cuts, 3, 50, needs=mounting),
    "control": Fault(damage.careless, 2, 20, needs=mounting),
}


def run(name: str, count: int, seed: int = 0) -> tuple[Row, float]:
    """Inject a fault so many times; its row, and the seconds that it took."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"fdiff-{name}-"))
    try:
        row = FAULTS[name].make(count, folder, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row, time.monotonic() - began
