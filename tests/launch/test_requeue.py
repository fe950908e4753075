"""Jobs on a real Slurm whose time is up, or that have to make room: they requeue, go on, and end with the same weights.

All of them train at once. The federation whose time limit is shorter than the job has more rounds than any machine
trains in that time; when its time is up, it is given a few more than it has made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, TINY, arrays, clean_env, execute
from launchers import PYTHON, Job, rounds, started, wait_for
from slurm_cluster import Cluster, job_fields, run, sbatch, wait_for_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AT = TINY.index("--federation.rounds")
ORDERED = ("--runtime.reduction", "ordered", "--runtime.timeout_s", "120")
COMMON = (*TINY[:AT], *TINY[AT + 2 :], "--sample.every", "0", *ORDERED)
ROUNDS, ENDLESS = 60, 5000
PATIENCE_S = 400.0
TEMPLATES = ROOT / "slurm"


@dataclass(frozen=True)
class Ended:
    """A job that has ended: Slurm's fields, its run folder, and what it printed."""

    fields: Mapping[str, str]
    run: Path
    printed: str
    rounds: int


def flags(rounds: int, *more: str) -> list[str]:
    return [*COMMON, "--federation.rounds", str(rounds), *more]


def template(cluster: Cluster, folder: Path, name: str, *options: str, flags: list[str]) -> str:
    """Submit one of slurm/*.sbatch as it is; the job's id."""
    env = {"FDIFF_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return sbatch(cluster, *options, str(TEMPLATES / f"{name}.sbatch"), "--", *flags, cwd=folder, env=env)


def submit(cluster: Cluster, folder: Path, *words: str) -> str:
    """`fdiff submit`; the job's id."""
    env = clean_env(SLURM_CONF=cluster.env["SLURM_CONF"], PYTHONPATH=str(ROOT))
    printed = execute([*PYTHON, "submit", *words], folder, env=env).check().out
    assert "follow:  tail -F " in printed and "stop:    scancel " in printed
    return printed.split()[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Iterator[Job]:
    """The same federation on one rank without a break, on what the others leave idle; each of its rounds stays."""
    words = flags(ENDLESS, "--run.dir", "run", "--run.keep_checkpoints", str(ENDLESS))
    command = ["nice", "-n", "19", *PYTHON, "train", *words]
    with started(command, tmp_path_factory.mktemp("uninterrupted"), clean_env(PYTHONPATH=str(ROOT))) as job:
        yield job


# Slurm tells jobs to stop by the same signals when their time is up, a minute or more later, as when it is asked to.
RARELY = {"time limit": pytest.mark.rare, "requeued by hand": pytest.mark.rare}
NAMES = ("time limit", "requeued by hand", "array", "submitted", "array, other task")
JOBS = [pytest.param(name, marks=RARELY.get(name, ())) for name in NAMES]
INTERRUPTED = JOBS[:-1]
RUNS = {
    "time limit": "time-limit",
    "requeued by hand": "by-hand",
    "submitted": "submitted",
    "array": "runs/slurm-{}/full-seed0",
    "array, other task": "runs/slurm-{}/udec-seed1",
}
INTERRUPTIONS = {
    "requeued by hand": ["scontrol", "requeue"],
    "array": ["scancel", "--signal=USR2"],
    "submitted": ["scancel", "--signal=TERM"],
}


@dataclass(frozen=True)
class Interrupted:
    """Jobs that were told to stop: by name their ids, their run folders, and the rounds that they will have trained."""

    folder: Path
    jobs: Mapping[str, str]
    runs: Mapping[str, Path]
    rounds: Mapping[str, int]


@pytest.fixture(scope="module")
def interrupted(slurm_cluster: Cluster, uninterrupted: Job, tmp_path_factory, request) -> Interrupted:
    """Every job, interrupted in its own way once it has trained a little."""
    cluster, folder = slurm_cluster, tmp_path_factory.mktemp("requeue")
    rounds_of_limited = folder / "rounds.yaml"
    rounds_of_limited.write_text(f"federation: {{rounds: {ENDLESS}}}")
    one, short = "--ntasks-per-node=1", flags(ROUNDS)
    array = template(cluster, folder, "array", one, "--array=0,7", flags=short)
    submitted = [*short, "--run.dir", "submitted", "--comment", "a test", "--time", "30"]
    jobs = {"array": f"{array}_0", "array, other task": f"{array}_7"}
    jobs["submitted"] = submit(cluster, folder, "--nodes", "2", *submitted)
    if request.config.getoption("--all"):
        limited = [*COMMON, "--config", "rounds.yaml", "--run.dir", "time-limit"]
        minute = ("--ntasks-per-node=2", "--time=2", "--signal=USR2@75")  # a busy machine takes 30 s to the first round
        jobs["time limit"] = template(cluster, folder, "one_node", *minute, flags=limited)
        by_hand = [*short, "--run.dir", "by-hand"]
        jobs["requeued by hand"] = template(cluster, folder, "multi_node", one, "--cpus-per-task=1", flags=by_hand)
    runs = {name: folder / RUNS[name].format(array) for name in jobs}
    left = {name: INTERRUPTIONS[name] for name in jobs if name in INTERRUPTIONS}

    def interrupt_those_that_train() -> bool:
        for name in [n for n in left if rounds(runs[n]) >= 2]:
            run(cluster, [*left.pop(name), jobs[name]])
        return not left

    wait_for(interrupt_those_that_train, PATIENCE_S, "two rounds of every job")
    enough = dict.fromkeys(jobs, ROUNDS)
    if "time limit" in jobs:

        def time_is_up() -> bool:  # on a busy machine perhaps before the first round: then it starts, and stops, again
            waits = job_fields(cluster, jobs["time limit"])["JobState"] == "PENDING"
            return waits and rounds(runs["time limit"]) > 0

        wait_for(time_is_up, PATIENCE_S, "the time limit")
        enough["time limit"] = rounds(runs["time limit"]) + 5
        rounds_of_limited.write_text(f"federation: {{rounds: {enough['time limit']}}}")
        run(cluster, ["scontrol", "update", f"JobId={jobs['time limit']}", "TimeLimit=60"])
    return Interrupted(folder, jobs, runs, enough)


@pytest.fixture(scope="module")
def cancelled(slurm_cluster: Cluster, interrupted: Interrupted) -> dict[str, Ended]:
    """A job by a template and one by `fdiff submit`, cancelled while those that were interrupted wait for Slurm."""
    cluster, folder, endless = slurm_cluster, interrupted.folder, flags(ENDLESS)
    by_template = ["--run.dir", "cancelled"]
    jobs = {"cancelled": template(cluster, folder, "one_node", "--ntasks-per-node=1", flags=[*endless, *by_template])}
    jobs["cancelled-submitted"] = submit(cluster, folder, *endless, "--run.dir", "cancelled-submitted")
    for name in jobs:
        wait_for(lambda name=name: rounds(folder / name) >= 1, PATIENCE_S, "a round")
    run(cluster, ["scancel", *jobs.values()])
    return {name: ended_job(cluster, folder, job, folder / name, 0) for name, job in jobs.items()}


def ended_job(cluster: Cluster, folder: Path, job: str, run: Path, rounds: int) -> Ended:
    """Wait for a job."""
    fields = wait_for_job(cluster, job, timeout_s=PATIENCE_S)
    logs = [*folder.glob(f"slurm-{job}.out"), *folder.glob(f"runs/submitit/{job}_*_log.out")]
    return Ended(fields, run, "\n".join(log.read_text() for log in logs), rounds)


@pytest.fixture(scope="module")
def ended(slurm_cluster: Cluster, interrupted: Interrupted, cancelled: dict[str, Ended]) -> dict[str, Ended]:
    """Every job that was interrupted, waited for."""
    return {
        name: ended_job(slurm_cluster, interrupted.folder, job, interrupted.runs[name], interrupted.rounds[name])
        for name, job in interrupted.jobs.items()
    }


@pytest.mark.parametrize("name", JOBS)
def test_every_job_completes_with_a_checkpoint(ended, name):
    job = ended[name]
    assert job.fields["JobState"] == "COMPLETED", job.printed
    assert (job.run / "checkpoints" / f"round-{job.rounds:06d}" / "global.h5").is_file()
    assert rounds(job.run) == job.rounds


@pytest.mark.parametrize("name", INTERRUPTED)
def test_it_was_requeued_and_went_on_from_its_checkpoint(ended, name):
    job = ended[name]
    restarts = int(job.fields["Restarts"])
    assert restarts >= 1 if name == "time limit" else restarts == 1, job.printed
    by_itself = name != "requeued by hand"
    assert ("requeues job" in job.printed) == by_itself, job.printed
    assert job.printed.count("round 1/") == 1 and "Traceback" not in job.printed


@pytest.mark.parametrize("name", INTERRUPTED)
def test_it_ends_with_the_weights_of_an_uninterrupted_run(ended, uninterrupted, name):
    last, whole = ended[name].rounds, uninterrupted.folder / "run"
    wait_for((whole / "checkpoints" / f"round-{last:06d}").exists, PATIENCE_S, "as many rounds without a break")
    found, expected = arrays(ended[name].run, last), arrays(whole, last)
    assert found.keys() == expected.keys() and expected
    assert all(np.array_equal(found[array], expected[array]) for array in expected)


def test_a_cancelled_job_stays_cancelled(cancelled):
    """scancel and a preemption both come as SIGTERM."""
    for job in cancelled.values():
        assert (job.fields["JobState"], job.fields["Restarts"]) == ("CANCELLED", "0")
    assert "fdiff: rank" not in cancelled["cancelled-submitted"].printed  # it was told to end


@pytest.mark.rare  # tests/launch/test_slurm_cluster.py has the bound of the templates, which count alike
def test_the_number_of_requeues_is_bounded(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(slurm_cluster, tmp_path, "--max_requeues", "0", *flags(ENDLESS, "--run.dir", "run"))
    wait_for(lambda: rounds(tmp_path / "run") >= 1, PATIENCE_S, "a round")
    run(slurm_cluster, ["scancel", "--signal=USR2", job])
    fields = wait_for_job(slurm_cluster, job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "140:0")
    printed = (tmp_path / "runs" / "submitit" / f"{job}_0_log.out").read_text()
    assert "not requeued: that was start 1 of 1" in printed
    assert re.search("is committed(, clients kept of round [0-9]+: [0-9]+)?; go on with --resume", printed), printed
