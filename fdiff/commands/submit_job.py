"""The job that `fdiff submit` hands to submitit: a training or a sweep that is stopped in time, requeued, gone on with.

Every task runs `fdiff train` or `fdiff sweep` as its child and passes signals on to it. Slurm tells the job to stop by
SIGUSR2 before its time is up; the child commits a checkpoint and ends with 128 + signal; only then does rank 0's task
requeue the job. submitit's own handler would requeue, and so kill the job, at the signal.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fdiff.errors import UserError
from fdiff.runtime import die_with_parent, launcher

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
TIME_IS_UP, TERMINATED, CANCELLED = STOPPED = tuple(128 + n for n in SIGNALS)  # of a training that was told to stop
FAILED = (1, 2)  # of one that has said why, or whose other ranks have
GRACE_S = 5.0  # for the others to find out by themselves that a rank is lost, and to say so


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
    code: tuple[str, ...] = ()  # flags that name what is the user's own

    def __call__(self) -> None:
        """Train until done, or until told to stop and then requeue; exits with the training's status if not 0."""

        def words(begun: int) -> list[str]:
            resume = ["--resume"] * (self.resume or begun > 0)
            return ["train", "--config", str(self.config_file), *resume, *self.code]

        _carry_out(words, self.max_requeues)


@dataclass(frozen=True)
class Sweeping:
    """The same for a sweep, which needs no flag to go on. `flags` are those of `runtime`, and name the user's code."""

    file: Path
    out: Path
    flags: tuple[str, ...]
    max_requeues: int

    def __call__(self) -> None:
        """Run the sweep as `Training` trains."""
        words = ["sweep", str(self.file), "--out", str(self.out), *self.flags]
        _carry_out(lambda begun: words, self.max_requeues)


def _carry_out(words: Callable[[int], list[str]], max_requeues: int) -> None:
    """Run `fdiff WORDS`, which follow from how often the job was started before, and requeue if it is told to stop."""
    controller = os.getppid()
    job = load_submitit().JobEnvironment()
    begun = restarts(job)
    status = supervise([sys.executable, "-m", "fdiff", *words(begun)])
    if told_to_go_on_later(status, job):
        if begun < max_requeues:
            _requeue(job, begun + 1)
            sys.exit(0)
        if job.global_rank == 0:
            print(f"fdiff: not requeued: that was start {begun + 1} of {max_requeues + 1}", file=sys.stderr)
    elif status not in (0, *STOPPED):
        _report_loss(job, status, controller)
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
    try:
        job._requeue(count)  # for Slurm `scontrol requeue`; the local executor's controller is told by an exit status
    except subprocess.CalledProcessError as error:
        if error.returncode > 0:  # else the requeue that it asked for has ended it too
            reason = f"{shlex.join(error.cmd)} ended with {error.returncode}; submit again with --resume"
            print(f"fdiff: error: {reason}", file=sys.stderr, flush=True)
            sys.exit(1)


def _local_count(job: Any) -> Path:
    return Path(job.paths.folder) / f"{job.job_id}_restarts"


def _report_loss(job: Any, status: int, controller: int) -> None:
    """Say how this rank's training ended, unless it or the others do; where no srun does so, end the others."""
    names = {128 + number: number.name for number in signal.Signals}
    how = f"was ended by {names[status]}" if status in names else f"ended with status {status}"
    say = partial(print, f"fdiff: rank {job.global_rank} {how}", file=sys.stderr, flush=True)
    if status not in FAILED:
        say()
    if job.cluster == "slurm" or not _others_go_on(controller):
        return
    if status in FAILED:
        say()
    _terminate(controller)
    if _others_go_on(controller):  # a training heeds the second one even while it waits
        _terminate(controller)


def _terminate(controller: int) -> None:
    """Have the local executor's controller pass SIGTERM on to all tasks, if it is still there."""
    if os.getppid() == controller:
        os.kill(controller, signal.SIGTERM)


def _others_go_on(controller: int) -> bool:
    """Whether a training of this local job still runs when they had time to end by themselves."""
    end = time.monotonic() + GRACE_S
    while any(_children(task) for task in _children(controller)):
        if time.monotonic() > end:
            return True
        time.sleep(0.1)
    return False


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


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
    child = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))
    for number in tuple(asked):
        child.send_signal(number)
    status = child.wait()
    return 128 - status if status < 0 else status
