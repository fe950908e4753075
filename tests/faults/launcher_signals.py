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
from forked_jobs import survivors
from jobs import BIN, clean_env

from faults.ledger import Row
from faults.processes import TAG, tagged
from faults.runs import LOADING, METHODS, goes_on, logged, lost, rounds_there, train

START_S = 90.0


def torchrun(row: Row, cases: range, folder: Path) -> None:
    """SIGTERM to torchrun, which passes it on and kills after a while, or SIGUSR2 to each of its two ranks."""
    for i in cases:
        run, chance, user = folder / f"run-{i}", random.Random(i), (i + i // 4) % 2 == 1
        request = train(run.name, METHODS[i % 4], 10_000, *_runtime(i))
        words = ["--standalone", "--nproc_per_node", 2, "-m", "fdiff", *request]
        with (folder / f"{i}.log").open("wb") as log:
            job = subprocess.Popen(
                [str(w) for w in (BIN / "torchrun", *words)],
                cwd=folder,
                env=clean_env(**{TAG: str(run)}),
                stdout=log,
                stderr=log,
            )
        _until_logged(run)
        time.sleep(chance.uniform(0, 2))
        began = time.monotonic()
        for pid in children(job.pid) if user else ():
            os.kill(pid, signal.SIGUSR2)
        if not user:
            job.send_signal(signal.SIGTERM)
        ended = _ends(job, 60)
        after_s = time.monotonic() - began
        left_over = survivors(lambda tag=str(run): tagged(tag))
        text = (folder / f"{i}.log").read_text()[-300:]
        right = job.returncode != 0 and _went_on(row, f"{i}: {job.returncode} {text}", run, i)
        row.saw(right, hung=not ended, left_over=left_over, after_s=after_s)


def _runtime(i: int) -> list[object]:
    return ["--run.checkpoint_every", 5, "--runtime.timeout_s", 60, *(LOADING if i // 2 % 2 == 0 else ())]


def _went_on(row: Row, told: str, run: Path, i: int) -> bool:
    """Whether the last complete round was committed and the run, taken up again, comes to what it would have been."""
    complete = logged(run)[-1]["round"] if logged(run) else 0
    there = rounds_there(run)
    row.also(lost=lost(run, complete, keep=1))
    right = bool(complete) and there[-1:] == [complete]
    if not right:
        row.notes.append(f"{told} {there} of {complete}")
    return goes_on(row, run, 1 + i % 2, METHODS[i % 4]) and right


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


def on_slurm(row: Row, cases: range, folder: Path) -> None:
    """`scancel --signal=USR2` or plain `scancel` (SIGTERM, later SIGKILL) of a job on two nodes."""
    with slurm.running_cluster() as cluster:
        for i in cases:
            _one_job(row, i, cluster, folder, random.Random(i))


def _one_job(row: Row, i: int, cluster: slurm.Cluster, folder: Path, chance: random.Random) -> None:
    run, user = folder / f"run-{i}", (i + i // 4) % 2 == 1
    words = [sys.executable, "-m", "fdiff", *train(run.name, METHODS[i % 4], 10_000, *_runtime(i))]
    wrapped = "srun --wait=30 " + shlex.join(str(w) for w in words)
    request = ["--nodes=2", "--ntasks-per-node=1", f"--output={i}.log", f"--wrap={wrapped}"]
    job = slurm.sbatch(cluster, *request, cwd=folder, env={TAG: str(run)})
    _until_logged(run)
    time.sleep(chance.uniform(0, 2))
    began = time.monotonic()
    slurm.run(cluster, ["scancel", *(["--signal=USR2"] if user else []), job])
    try:
        fields, ended = slurm.wait_for_job(cluster, job, timeout_s=90), True
    except TimeoutError:
        fields, ended = slurm.job_fields(cluster, job), False
    after_s = time.monotonic() - began
    left_over = survivors(lambda: tagged(str(run)))
    if not ended:
        slurm.run(cluster, ["scancel", "--signal=KILL", job])
    text = (folder / f"{i}.log").read_text()[-300:] if (folder / f"{i}.log").exists() else ""
    told = f"{i}: {fields['JobState']} {fields['ExitCode']} {text}"
    # of a job that is cancelled Slurm keeps no status of its own
    right = not user or fields["ExitCode"].split(":")[0] == "140"
    right = _went_on(row, told, run, i) and right
    row.saw(right, hung=not ended, left_over=left_over, after_s=after_s)
