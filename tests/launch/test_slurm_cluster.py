"""The Slurm test cluster itself, and the sbatch templates on it with a program that only records how it was called."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import (
    ROOT,
    SCRIPTS,
    Cluster,
    clean_env,
    cluster_pids,
    run,
    running_cluster,
    sbatch,
    wait_for_job,
    why_not,
)

pytestmark = pytest.mark.slow
needs_cluster = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

NODES = {"fdiff1", "fdiff2"}
RECORD = """#!{python}
import json, os, sys
names = "SLURM_PROCID SLURM_JOB_ID MASTER_ADDR MASTER_PORT OMP_NUM_THREADS SLURM_CPUS_PER_TASK SLURMD_NODENAME".split()
called = {{name: os.environ[name] for name in names}}
called["args"] = sys.argv[1:]
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
record = f"{{called['SLURM_JOB_ID']}}.{{restart}}.{{called['SLURM_PROCID']}}.json"
with open(f"{{record}}.part", "w") as file:
    json.dump(called, file)
os.replace(f"{{record}}.part", record)
"""
REQUEUE = """
import glob, subprocess, time
if restart == "0":
    if called["SLURM_PROCID"] == "0":
        while len(glob.glob(f"{called['SLURM_JOB_ID']}.0.*.json")) < int(os.environ["SLURM_NTASKS"]):
            time.sleep(0.1)
        subprocess.run(["scontrol", "requeue", called["SLURM_JOB_ID"]], check=True)
    time.sleep(60)
"""
# Slurm looks every 30 s, and signals the steps that there are once the notice and another 30 s would be too late: here
# 10 to 40 s after the start, when the ranks have set their trap even on a busy machine.
ON_USR2 = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --time=1 --signal=USR2@20 --output=%j.out
exec srun bash -c 'trap "echo rank $SLURM_PROCID got USR2; exit 0" USR2; for _ in {1..590}; do sleep 0.1; done; exit 1'
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def recorder(folder: Path, tail: str = "") -> dict[str, str]:
    """An environment in which the templates start a program that records its call, then does `tail`."""
    return {"FDIFF_PYTHON": script(folder / "record", RECORD.format(python=sys.executable) + tail)}


def calls(folder: Path, job: str, restart: int = 0) -> list[dict]:
    files = sorted(folder.glob(f"{job}.{restart}.*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_srun_spreads_four_ranks_over_two_nodes(slurm_cluster: Cluster) -> None:
    printed = run(slurm_cluster, ["srun", "-N2", "-n4", "sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME"]).stdout
    ranks, nodes = zip(*(line.split() for line in printed.splitlines()), strict=True)
    assert sorted(ranks) == ["0", "1", "2", "3"]
    assert set(nodes) == NODES


def test_node_names_resolve_to_this_machine(slurm_cluster: Cluster) -> None:
    for node in NODES:
        assert run(slurm_cluster, ["getent", "ahostsv4", node]).stdout.startswith("127.0.0.1 ")


def test_batch_job_completes(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = sbatch(slurm_cluster, "--output=%j.out", "--wrap=hostname; echo $SLURMD_NODENAME", cwd=tmp_path)
    assert wait_for_job(slurm_cluster, job)["JobState"] == "COMPLETED"
    assert (tmp_path / f"{job}.out").read_text().split() == [os.uname().nodename, "fdiff1"]


def test_failed_and_cancelled_jobs_are_told_apart(slurm_cluster: Cluster, tmp_path: Path) -> None:
    failed = wait_for_job(slurm_cluster, sbatch(slurm_cluster, "--wrap=exit 3", cwd=tmp_path))
    assert (failed["JobState"], failed["ExitCode"]) == ("FAILED", "3:0")
    job = sbatch(slurm_cluster, "--wrap=sleep 60", cwd=tmp_path)
    wait_for_job(slurm_cluster, job, {"RUNNING"})
    run(slurm_cluster, ["scancel", job])
    assert wait_for_job(slurm_cluster, job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("template, nodes", [("one_node", {"fdiff1"}), ("multi_node", NODES)])
def test_template_starts_one_rank_a_task(
    slurm_cluster: Cluster,
    tmp_path: Path,
    template: str,
    nodes: set[str],
) -> None:
    flags = ["--", "--preset", "mini", "--data.root", "a folder"]
    path = ROOT / "slurm" / f"{template}.sbatch"
    job = sbatch(slurm_cluster, str(path), *flags, cwd=tmp_path, env=recorder(tmp_path))
    assert wait_for_job(slurm_cluster, job)["JobState"] == "COMPLETED"
    ranks = calls(tmp_path, job)
    assert [rank["SLURM_PROCID"] for rank in ranks] == ["0", "1", "2", "3"]
    assert {rank["SLURMD_NODENAME"] for rank in ranks} == nodes
    for rank in ranks:
        assert rank["args"] == ["-m", "fdiff", "train", "--run.dir", f"runs/slurm-{job}", *flags[1:]]
        assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("fdiff1", ranks[0]["MASTER_PORT"])
        assert rank["OMP_NUM_THREADS"] == rank["SLURM_CPUS_PER_TASK"]


@dataclass(frozen=True)
class Submitted:
    """A job and the folder where it runs."""

    job: str
    folder: Path


@pytest.fixture(scope="module")
def waiting(slurm_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Jobs that wait most of the time, all at once: one is sent a signal long after its start, and three are requeued,
    which takes 10 s each."""

    def submit(name: str, *args: str, **env: str) -> Submitted:
        of_no_test = {"PYTEST_CURRENT_TEST": ""}  # or the first one would be said to have left them behind
        return Submitted(sbatch(slurm_cluster, *args, cwd=folders[name], env=of_no_test | env), folders[name])

    names = ("signal", "scontrol", "own folder", "bounded")
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in names}
    one_node = str(ROOT / "slurm" / "one_node.sbatch")
    wrap = '--wrap=echo restart ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    given = recorder(folders["own folder"], REQUEUE)
    bounded = recorder(folders["bounded"], "sys.exit(140)") | {"MAX_REQUEUES": "1"}
    jobs = {
        "signal": submit("signal", script(folders["signal"] / "job", ON_USR2)),
        "scontrol": submit("scontrol", "--requeue", "--open-mode=append", "--output=%j.out", wrap),
        "own folder": submit("own folder", "--ntasks-per-node=2", one_node, "--run.dir=mine", **given),
        "bounded": submit("bounded", "--ntasks-per-node=2", one_node, **bounded),
    }
    wait_for_job(slurm_cluster, jobs["scontrol"].job, {"RUNNING"})
    run(slurm_cluster, ["scontrol", "requeue", jobs["scontrol"].job])
    return jobs


@pytest.mark.rare  # test_requeue.py runs two tasks of it
@pytest.mark.usefixtures("waiting")  # they wait meanwhile
def test_array_template_covers_methods_and_seeds(slurm_cluster: Cluster, tmp_path: Path) -> None:
    path, env = ROOT / "slurm" / "array.sbatch", recorder(tmp_path)
    array = sbatch(slurm_cluster, str(path), "--preset", "mini", cwd=tmp_path, env=env)
    expected, seen = set(), set()
    for index in range(12):
        method, seed = ("full", "usplit", "ulatdec", "udec")[index % 4], str(index // 4)
        expected.add((method, seed, f"runs/slurm-{array}/{method}-seed{seed}"))
        fields = wait_for_job(slurm_cluster, f"{array}_{index}")
        assert fields["JobState"] == "COMPLETED"
        args = calls(tmp_path, fields["JobId"])[0]["args"]
        seen.add(tuple(args[args.index(flag) + 1] for flag in ("--method", "--run.seed", "--run.dir")))
    assert seen == expected


def test_array_template_refuses_what_it_sets_itself(slurm_cluster: Cluster, tmp_path: Path) -> None:
    path, env = ROOT / "slurm" / "array.sbatch", recorder(tmp_path)
    array = sbatch(slurm_cluster, "--array=0", str(path), "--method", "udec", cwd=tmp_path, env=env)
    fields = wait_for_job(slurm_cluster, f"{array}_0")
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0")
    assert "--method is set by the array" in (tmp_path / f"slurm-{array}_0.out").read_text()


def test_requeue_by_scontrol_counts_the_restart(slurm_cluster: Cluster, waiting: dict[str, Submitted]) -> None:
    job, folder = waiting["scontrol"].job, waiting["scontrol"].folder
    fields = wait_for_job(slurm_cluster, job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "restart 1\n" in (folder / f"{job}.out").read_text()


def test_signal_before_the_time_limit_reaches_every_rank(slurm_cluster: Cluster, waiting: dict[str, Submitted]) -> None:
    job, folder = waiting["signal"].job, waiting["signal"].folder
    assert wait_for_job(slurm_cluster, job)["JobState"] == "COMPLETED"
    printed = (folder / f"{job}.out").read_text()
    assert "rank 0 got USR2" in printed and "rank 1 got USR2" in printed


def test_template_keeps_a_given_run_folder_and_resumes(slurm_cluster: Cluster, waiting: dict[str, Submitted]) -> None:
    job, folder = waiting["own folder"].job, waiting["own folder"].folder
    assert wait_for_job(slurm_cluster, job)["JobState"] == "COMPLETED"
    first, second = calls(folder, job), calls(folder, job, restart=1)
    assert {tuple(rank["args"]) for rank in first} == {("-m", "fdiff", "train", "--run.dir=mine")}
    assert {tuple(rank["args"]) for rank in second} == {("-m", "fdiff", "train", "--resume", "--run.dir=mine")}
    assert all(len({rank["MASTER_PORT"] for rank in ranks}) == 1 for ranks in (first, second))


def test_template_requeues_a_job_that_was_told_to_stop_a_bounded_number_of_times(
    slurm_cluster: Cluster, waiting: dict[str, Submitted]
) -> None:
    job, folder = waiting["bounded"].job, waiting["bounded"].folder
    fields = wait_for_job(slurm_cluster, job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "1", "140:0")
    printed = (folder / f"slurm-{job}.out").read_text()
    assert printed.count("requeues job") == 1 and "not requeued: MAX_REQUEUES=1" in printed
    assert "--resume" in calls(folder, job, restart=1)[0]["args"]


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def sleepers(seconds: str) -> list[Path]:
    """The processes `sleep SECONDS`, whatever their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(process)
    return found


@needs_cluster
def test_down_leaves_nothing_behind(tmp_path: Path) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    seconds = f"600.{os.getpid()}"
    with running_cluster() as cluster:
        sbatch(cluster, "-n2", f"--wrap=trap '' TERM; srun setsid env -i sleep {seconds}", cwd=tmp_path)
        wait_for(lambda: len(sleepers(seconds)) == 2)
        before = run(cluster, ["squeue", "--noheader", "--format=%i %T"]).stdout
        run(cluster, [str(SCRIPTS / "up")])
        assert run(cluster, ["squeue", "--noheader", "--format=%i %T"]).stdout == before  # a second up changes nothing
        names = sorted(cluster_pids(cluster.folder).values())
        assert names.count("slurmd") == 2 and "slurmctld" in names and "munged" in names
    assert (cluster_pids(cluster.folder), sleepers(seconds)) == ({}, [])
    assert not cluster.folder.exists()
    assert Path("/etc/hosts").read_bytes() == hosts


@needs_cluster
@pytest.mark.skipif(
    not all(shutil.which(program) for program in ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr")),
    reason="needs a database for Slurm's accounting: apt install mariadb-server slurmdbd",
)
def test_sacct_works_where_there_is_a_database(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = sbatch(slurm_cluster, "--wrap=exit 3", cwd=tmp_path)
    wait_for_job(slurm_cluster, job)
    listed = ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format=State,ExitCode"]
    wait_for(lambda: run(slurm_cluster, listed).stdout.strip() == "FAILED|3:0")


@needs_cluster
def test_down_after_an_up_that_was_killed_midway(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    up = subprocess.Popen([SCRIPTS / "up"], env=clean_env(folder), stdout=subprocess.DEVNULL)
    wait_for(lambda: "munged" in cluster_pids(folder).values())
    up.kill()
    up.wait()
    subprocess.run([SCRIPTS / "down"], env=clean_env(folder), check=True, timeout=60)
    assert cluster_pids(folder) == {} and not folder.exists()
    assert str(folder) not in Path("/etc/hosts").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="down wants root first")
def test_scripts_refuse_a_folder_that_is_not_theirs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for name in ("up", "down"):
        done = subprocess.run([SCRIPTS / name], env=clean_env(tmp_path), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "holds something else" in done.stderr or "not found" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "precious"
