"""The job that `fdiff submit` hands to submitit: a training that is stopped in time, requeued, and gone on with.

Every task runs `fdiff train` as its child and passes signals on to it. Slurm tells the job to stop by SIGUSR2 before
its time is up; the child commits a checkpoint and ends with 128 + signal; only then does rank 0's task requeue the
job. submitit's own handler would requeue, and so kill the job, at the signal.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fdiff import launcher
from fdiff.errors import UserError

TIME_IS_UP, TERMINATED = 128 + signal.SIGUSR2, 128 + signal.SIGTERM  # how a training that was told to stop ends
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
GRACE_S = 5.0  # for the others to find out by themselves that a rank is lost, and to say so
SET_PDEATHSIG = 1  # of prctl(2)


def load_submitit() -> ModuleType:
    """The module; UserError if it is not installed."""
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise UserError("fdiff submit needs submitit; pip install 'fdiff[slurm]'") from None


@dataclass(frozen=True)
class Training:
    """What each task of the job calls. Submitted as a pickle: the job must be able to import this module."""

    config_file: Path
    resume: bool
    max_requeues: int

    def __call__(self) -> None:
        """Train until done, or until told to stop and then requeue; exits with the training's status if not 0."""
        job = load_submitit().JobEnvironment()
        begun = restarts(job)
        flags = ["--config", str(self.config_file)] + ["--resume"] * (self.resume or begun > 0)
        status = supervise([sys.executable, "-m", "fdiff", "train", *flags])
        if told_to_go_on_later(status, job):
            if begun < self.max_requeues:
                _requeue(job, begun + 1)
                sys.exit(0)
            if job.global_rank == 0:
                print(f"fdiff: not requeued: that was start {begun + 1} of {self.max_requeues + 1}", file=sys.stderr)
        elif status > 128:
            _report_loss(job, status - 128)
        if status:
            sys.exit(status)


def restarts(job: Any) -> int:
    """How often this job, whose id stays, was started before. Slurm counts; for the local executor rank 0 does."""
    if job.cluster == "slurm":
        return launcher.restarts()
    count = _local_count(job)
    return int(count.read_text()) if count.exists() else 0


def told_to_go_on_later(status: int, job: Any) -> bool:
    """Whether the training was stopped for its time or its place, and not because the job was cancelled."""
    if job.cluster != "slurm":
        return status == TIME_IS_UP
    return status == TIME_IS_UP or (status == TERMINATED and slurm_state(job.job_id) == "RUNNING")


def _requeue(job: Any, count: int) -> None:
    if job.global_rank != 0:
        return
    if job.cluster != "slurm":
        _local_count(job).write_text(str(count))
    print(f"fdiff: requeues job {job.job_id}, restart {count}", file=sys.stderr, flush=True)
    job._requeue(count)  # for Slurm `scontrol requeue`; the local executor's controller is told by an exit status


def _local_count(job: Any) -> Path:
    return Path(job.paths.folder) / f"{job.job_id}_restarts"


def _report_loss(job: Any, number: int) -> None:
    """Say that this rank's training was killed; where no srun does so, end the others, which may wait for it."""
    print(f"fdiff: rank {job.global_rank} was ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    if job.cluster != "slurm":
        for _ in range(2):  # the controller passes it on; a training heeds the second even while it waits
            time.sleep(GRACE_S)
            os.kill(os.getppid(), signal.SIGTERM)


def slurm_state(job_id: str) -> str:
    """A job's state as Slurm names it, e.g. RUNNING; UNKNOWN if it does not say."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "UNKNOWN"
    found = re.search(r"\bJobState=(\w+)", shown.stdout)
    return found[1] if found else "UNKNOWN"


def supervise(command: Sequence[str]) -> int:
    """Run a command, pass on the signals that ask to stop; its exit status, 128 + n if signal n ended it.

    The command dies with this process, so that a task that is killed leaves nothing behind.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    for number in tuple(asked):
        child.send_signal(number)
    status = child.wait()
    return 128 - status if status < 0 else status


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
