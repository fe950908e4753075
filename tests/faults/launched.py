"""Signals as real launchers deliver them: torchrun, and the two-node Slurm test cluster."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import slurm_cluster as slurm
from jobs import BIN, clean_env

from faults.ledger import Row
from faults.processes import left_over
from faults.runs import METHODS, logged, lost, rounds_there, train

START_S = 90.0
RUNTIME = ("--run.checkpoint_every", 5, "--runtime.timeout_s", 60)


def torchrun(count: int, folder: Path, seed: int) -> Row:
    """SIGTERM to torchrun, which passes it on and kills after a while, or SIGUSR2 to each of its two ranks."""
    row = Row("SIGTERM or SIGUSR2 under torchrun")
    for i in range(count):
        run, chance = folder / f"run-{i}", random.Random(seed + i)
        request = train(run.name, METHODS[i % 4], 10_000, *RUNTIME)
        words = ["--standalone", "--nproc_per_node", 2, "-m", "fdiff", *request]
        with (folder / f"{i}.log").open("wb") as log:
            job = subprocess.Popen(
                [str(w) for w in (BIN / "torchrun", *words)], cwd=folder, env=clean_env(), stdout=log, stderr=log
            )
        _until_logged(run)
        time.sleep(chance.uniform(0, 2))
        pids, began = children(job.pid), time.monotonic()
        if i % 2:
            for pid in pids:
                os.kill(pid, signal.SIGUSR2)
        else:
            job.send_signal(signal.SIGTERM)
        ended = _ends(job, 60)
        complete = logged(run)[-1]["round"] if logged(run) else 0
        right = bool(complete) and job.returncode != 0 and rounds_there(run)[-1:] == [complete]
        if not right:
            text = (folder / f"{i}.log").read_text()[-300:]
            row.notes.append(f"{i}: {job.returncode} {rounds_there(run)} of {complete}: {text}")
        row.saw(
            right,
            lost=lost(run, complete, keep=1),
            hung=not ended,
            left_over=left_over([job.pid, *pids]),
            after_s=time.monotonic() - began,
        )
    return row


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _until_logged(run: Path) -> None:
    _until(lambda: bool(logged(run)), START_S)


def _until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def _ends(job: subprocess.Popen, seconds: float) -> bool:
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in (*children(job.pid), job.pid):
            os.kill(pid, signal.SIGKILL)
        job.wait()
        return False
    return True


def on_slurm(count: int, folder: Path, seed: int) -> Row:
    """`scancel --signal=USR2` or plain `scancel` (SIGTERM, later SIGKILL) of a job on two nodes."""
    row = Row("SIGTERM or SIGUSR2 under Slurm")
    with slurm.running_cluster() as cluster:
        for i in range(count):
            _one_job(row, i, cluster, folder, random.Random(seed + i))
    return row


def _one_job(row: Row, i: int, cluster: slurm.Cluster, folder: Path, chance: random.Random) -> None:
    run = folder / f"run-{i}"
    words = [sys.executable, "-m", "fdiff", *train(run.name, METHODS[i % 4], 10_000, *RUNTIME)]
    wrapped = "srun --wait=30 " + shlex.join(str(w) for w in words)
    job = slurm.sbatch(
        cluster, "--nodes=2", "--ntasks-per-node=1", f"--output={i}.log", f"--wrap={wrapped}", cwd=folder
    )
    _until_logged(run)
    time.sleep(chance.uniform(0, 2))
    began = time.monotonic()
    slurm.run(cluster, ["scancel", *(["--signal=USR2"] if i % 2 else []), job])
    try:
        fields, ended = slurm.wait_for_job(cluster, job, timeout_s=90), True
    except TimeoutError:
        fields, ended = slurm.job_fields(cluster, job), False
        slurm.run(cluster, ["scancel", "--signal=KILL", job])
    status = 140 if i % 2 else None  # of a job that is cancelled Slurm keeps no status of its own
    complete = logged(run)[-1]["round"] if logged(run) else 0
    right = bool(complete) and rounds_there(run)[-1:] == [complete]
    right = right and (status is None or fields["ExitCode"].split(":")[0] == str(status))
    if not right:
        text = (folder / f"{i}.log").read_text()[-300:] if (folder / f"{i}.log").exists() else ""
        row.notes.append(f"{i}: {fields['JobState']} {fields['ExitCode']} {rounds_there(run)} of {complete}: {text}")
    row.saw(right, lost=lost(run, complete, keep=1), hung=not ended, after_s=time.monotonic() - began)
