"""Jobs on a real Slurm whose time is up, or that have to make room: they requeue, go on, and end with the same weights.

All of them train at once. One federation is short; the one whose time limit is shorter than the job is longer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, TINY, arrays, clean_env, execute
from launching import PYTHON, rounds, wait_for
from slurm_cluster import Cluster, job_fields, run, sbatch, wait_for_job

pytest_plugins = ["slurm_cluster"]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

COMMON = (*TINY, "--sample.every", "0", "--runtime.reduction", "ordered", "--runtime.timeout_s", "120")
SHORT, LONG = 40, 200  # rounds
PATIENCE_S = 400.0
TEMPLATES = ROOT / "slurm"


@dataclass(frozen=True)
class Ended:
    """A job that has ended: Slurm's fields, its run folder, and what it printed."""

    fields: Mapping[str, str]
    run: Path
    printed: str


def flags(rounds: int, run: str) -> list[str]:
    return [*COMMON, "--federation.rounds", str(rounds), "--run.dir", run]


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
def ended(slurm_cluster: Cluster, tmp_path_factory) -> dict[str, Ended]:
    """Every job, interrupted in its own way once it has trained a little, and waited for."""
    cluster, folder = slurm_cluster, tmp_path_factory.mktemp("requeue")
    pair = ("--ntasks-per-node=2",)
    jobs = {
        "time limit": template(
            cluster, folder, "one_node", *pair, "--time=1", "--signal=USR2@45", flags=flags(LONG, "time-limit")
        ),
        "requeued by hand": template(
            cluster, folder, "multi_node", "--ntasks-per-node=1", "--cpus-per-task=1", flags=flags(SHORT, "by-hand")
        ),
        "array": template(
            cluster, folder, "array", "--ntasks-per-node=1", "--array=0,7", flags=[*COMMON, "--federation.rounds", "40"]
        ),
        "submitted": submit(
            cluster, folder, "--nodes", "2", *flags(SHORT, "submitted"), "--comment", "a test", "--time", "30"
        ),
    }
    array = f"runs/slurm-{jobs['array']}"
    jobs["array"], jobs["array, other task"] = f"{jobs['array']}_0", f"{jobs['array']}_7"
    runs = {
        "time limit": "time-limit",
        "requeued by hand": "by-hand",
        "submitted": "submitted",
        "array": f"{array}/full-seed0",
        "array, other task": f"{array}/udec-seed1",
    }
    interruptions = {
        "requeued by hand": ["scontrol", "requeue"],
        "array": ["scancel", "--signal=USR2"],
        "submitted": ["scancel", "--signal=TERM"],
    }

    def interrupt_those_that_train() -> bool:
        for name in [n for n in interruptions if rounds(folder / runs[n]) >= 2]:
            run(cluster, [*interruptions.pop(name), jobs[name]])
        return not interruptions

    wait_for(interrupt_those_that_train, PATIENCE_S, "two rounds of every job")
    wait_for(lambda: int(job_fields(cluster, jobs["time limit"])["Restarts"]) >= 1, PATIENCE_S, "the time limit")
    run(cluster, ["scontrol", "update", f"JobId={jobs['time limit']}", "TimeLimit=60"])
    found = {}
    for name, job in jobs.items():
        fields = wait_for_job(cluster, job, timeout_s=PATIENCE_S)
        logs = [*folder.glob(f"slurm-{job}.out"), *folder.glob(f"runs/submitit/{job}_*_log.out")]
        found[name] = Ended(fields, folder / runs[name], "\n".join(log.read_text() for log in logs))
    return found


@pytest.fixture(scope="module")
def uninterrupted(ended, tmp_path_factory) -> dict[int, dict[str, np.ndarray]]:
    """The weights of the same federations, by rounds, trained on one rank without a break."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for n in (SHORT, LONG):
        execute([*PYTHON, "train", *flags(n, str(n))], folder, timeout_s=PATIENCE_S).check()
    return {n: arrays(folder / str(n), n) for n in (SHORT, LONG)}


INTERRUPTED = ("time limit", "requeued by hand", "array", "submitted")


@pytest.mark.parametrize("name", [*INTERRUPTED, "array, other task"])
def test_every_job_completes_with_a_checkpoint(ended, name):
    job = ended[name]
    assert job.fields["JobState"] == "COMPLETED", job.printed
    last = LONG if name == "time limit" else SHORT
    assert (job.run / "checkpoints" / f"round-{last:06d}" / "global.h5").is_file()
    assert rounds(job.run) == last


@pytest.mark.parametrize("name", INTERRUPTED)
def test_it_was_requeued_and_went_on_from_its_checkpoint(ended, name):
    job = ended[name]
    assert int(job.fields["Restarts"]) == 1, job.printed
    by_itself = name != "requeued by hand"
    assert ("requeues job" in job.printed) == by_itself, job.printed
    assert job.printed.count("round 1/") <= 2 and "Traceback" not in job.printed


@pytest.mark.parametrize("name", INTERRUPTED)
def test_it_ends_with_the_weights_of_an_uninterrupted_run(ended, uninterrupted, name):
    last = LONG if name == "time limit" else SHORT
    found, expected = arrays(ended[name].run, last), uninterrupted[last]
    assert found.keys() == expected.keys() and expected
    assert all(np.array_equal(found[array], expected[array]) for array in expected)


def test_a_cancelled_job_stays_cancelled(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """scancel and a preemption both come as SIGTERM."""
    job = template(slurm_cluster, tmp_path, "one_node", "--ntasks-per-node=1", flags=flags(5000, "run"))
    submitted = submit(slurm_cluster, tmp_path, *flags(5000, "submitted"))
    for name in ("run", "submitted"):
        wait_for(lambda name=name: rounds(tmp_path / name) >= 1, PATIENCE_S, "a round")
    run(slurm_cluster, ["scancel", job, submitted])
    for each in (job, submitted):
        fields = wait_for_job(slurm_cluster, each)
        assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")


def test_the_number_of_requeues_is_bounded(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(slurm_cluster, tmp_path, "--max_requeues", "0", *flags(5000, "run"))
    wait_for(lambda: rounds(tmp_path / "run") >= 1, PATIENCE_S, "a round")
    run(slurm_cluster, ["scancel", "--signal=USR2", job])
    fields = wait_for_job(slurm_cluster, job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "140:0")
    printed = (tmp_path / "runs" / "submitit" / f"{job}_0_log.out").read_text()
    assert "not requeued: that was start 1 of 1" in printed and "is committed; go on with --resume" in printed
