"""The faults, how often each is injected, and where that is possible."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import slurm_cluster

from faults import damage, failing, fuzzing, killing, launcher_signals, power, resuming, strangers
from faults.ledger import Row


@dataclass(frozen=True)
class Fault:
    """A way to fill a row: `inject(row, cases, folder)`; counts of the short and the full suite.

    What a case is follows from its number alone, so that cases may be injected in several calls.
    """

    title: str
    inject: Callable[[Row, range, Path], None]
    short: int
    full: int
    needs: Callable[[], str | None] = lambda: None  # why it cannot be injected here, or None
    control: bool = False


def mounting() -> str | None:
    """Why file systems cannot be mounted here, or None."""
    missing = [program for program in ("mount", "mkfs.ext4") if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    return f"not found: {', '.join(missing)} (apt install e2fsprogs mount)" if missing else None


FAULTS: dict[str, Fault] = {
    "commits": Fault("SIGKILL of rank 0 during a commit", killing.commits, 4, 200),
    "ranks": Fault("SIGKILL of a client rank", killing.ranks, 4, 100),
    "segfaults": Fault("SIGSEGV of a client rank", killing.segfaults, 2, 24),
    "locks": Fault("a rank holds the interpreter's lock for 30 s", killing.locks, 2, 8),
    "clients": Fault("exception, out of memory or bad loss in a client", failing.clients, 8, 50),
    "stopped": Fault("SIGSTOP of one rank", killing.stopped, 1, 20),
    "signals": Fault("SIGTERM or SIGUSR2 at a random time", killing.signals, 4, 24),
    "torchrun": Fault("SIGTERM or SIGUSR2 under torchrun", launcher_signals.torchrun, 2, 40),
    "slurm": Fault("SIGTERM or SIGUSR2 under Slurm", launcher_signals.on_slurm, 2, 10, needs=slurm_cluster.why_not),
    "damage": Fault("damaged checkpoint", damage.files, 16, 104),
    "disks": Fault("disk full or read-only during a commit", failing.disks, 4, 20, needs=mounting),
    "resumes": Fault("stopped and resumed on other numbers of ranks", resuming.resumes, 12, 96),
    "parts": Fault("stopped within a round and taken up", strangers.parts, 4, 48),
    "settings": Fault("a rank was told another value of a field", strangers.settings, 5, 40),
    "configurations": Fault("malformed configuration (fuzzed)", fuzzing.configurations, 25, 100),
    "checkpoints": Fault("mangled checkpoint (fuzzed)", fuzzing.checkpoints, 15, 60),
    "headers": Fault("forged checkpoint header (fuzzed)", fuzzing.headers, 10, 40),
    "power": Fault("power cut during a commit", power.cuts, 3, 50, needs=mounting),
    "control": Fault("control: in place, no sync", power.careless, 2, 20, needs=mounting, control=True),
}


def run(name: str, count: int, first: int = 0) -> tuple[Row, float]:
    """Inject so many cases of a fault, from the first on; its row, and the seconds that it took.

    An error in the suite itself is a case that was not detected: the row does not pass, and the other rows go on.
    """
    began, fault = time.monotonic(), FAULTS[name]
    row, folder = Row(fault.title, control=fault.control), Path(tempfile.mkdtemp(prefix=f"fdiff-{name}-"))
    try:
        fault.inject(row, range(first, first + count), folder)
    except Exception:
        row.saw(False)
        row.notes.append(traceback.format_exc())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row, time.monotonic() - began
