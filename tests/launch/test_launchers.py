"""The same job under every launcher: the same weights, and all ranks gone soon after one is lost.

One job a launcher shows both: it trains on until a rank is killed, and its first rounds are those of any other job.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
from jobs import ROOT, TINY, arrays, fdiff, largest_difference
from launchers import LAUNCHERS, Job, environment, rounds, started, trainers, wait_for
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS = 2  # of four clients; srun has four, on two nodes
KEPT = "--sample.every 0 --run.keep_checkpoints 5000"  # every checkpoint that a job makes before it is ended
ENDLESS = [*TINY, "--federation.rounds", "5000", *KEPT.split(), "--runtime.timeout_s", "60"]
PATIENCE_S = 180.0  # for a job to start and to end on a machine with other things to do


SECONDS, HALF_A_MINUTE = 20.0, 45.0  # as the README has it, on a machine with other things to do
GONE_S = dict.fromkeys(LAUNCHERS, SECONDS) | dict.fromkeys(("torchrun", "srun", "submitit-slurm"), HALF_A_MINUTE)
EXITING = """
import os, threading, time
def exit_when_told():
    while not os.path.exists(f"exit-{os.getpid()}"):
        time.sleep(0.1)
    os._exit(3)
threading.Thread(target=exit_when_told, daemon=True).start()
"""
# Who says it: the launcher, if it ends the others before they can. {pid} is in setting.json.
NAMES_RANK_1 = {
    "killed": {
        "torchrun": r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9",
        "openmpi": r"process rank 1 with PID {pid} on node",
        "openmpi-torch": r"process rank 1 with PID {pid} on node",
        "mpich": r"BAD TERMINATION[^=]+\n=   PID {pid} RUNNING AT",
        "srun": r"task 1: Killed",
        "submitit-slurm": r"fdiff: rank 1 was ended by SIGKILL",
        "submitit-local": r"fdiff: rank 1 was ended by SIGKILL",
    },
    "exits": {
        "torchrun": r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 3",
        "openmpi": r"@1,1\]\s+Exit code: +3",
        "openmpi-torch": r"@1,1\]\s+Exit code: +3",
        "mpich": r"Exit codes: \[.*\] \d+,768\n",
        "srun": r"task 1: Exited with exit code 3",
        "submitit-slurm": r"fdiff: rank 1 ended with status 3",
        "submitit-local": r"fdiff: rank 1 ended with status 3",
    },
}


def lose_rank_1(job: Job, variable: str, how: str) -> int:
    """Once the job has trained a little; the process id of the rank."""
    run = job.folder / "run"
    wait_for(lambda: rounds(run) >= 3 or job.process.poll() is not None, PATIENCE_S, "three rounds")
    ranks = trainers(job.folder, variable)
    assert {"0", "1"} <= ranks.keys(), job.printed
    if how == "killed":
        os.kill(ranks["1"], signal.SIGKILL)
    else:
        (job.folder / f"exit-{ranks['1']}").touch()
    return ranks["1"]


def seconds_until_all_are_gone(job: Job) -> float:
    """From now on, at most 90."""
    began = time.monotonic()
    while trainers(job.folder) and time.monotonic() - began < 90:
        time.sleep(0.2)
    return time.monotonic() - began


# --- a job, and how it ends ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """A job that has lost rank 1: what its checkpoint of round 2 held before, and how it ended."""

    name: str
    how: str
    weights: dict[str, np.ndarray]
    pid: int
    seconds: float
    status: int
    printed: str
    setting: dict


# To exit is the gentler way to be lost: what a launcher does about it is what it does about a kill, in other words.
# A launcher has no part in how sums are made: tests/federation/test_rounds.py has fast against ordered reduction.
# gloo under mpirun is lost in tests/comm/test_mpi.py, and meets like gloo under torchrun.
RARELY = {"openmpi-torch": pytest.mark.rare}
LOST = [
    *(pytest.param((name, "killed", "ordered"), marks=RARELY.get(name, ())) for name in LAUNCHERS),
    *(pytest.param((name, "exits", "fast"), marks=pytest.mark.rare) for name in LAUNCHERS),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    """The weights of `fdiff train` without a launcher, after two rounds, in ordered reduction."""
    folder = tmp_path_factory.mktemp("alone")
    fdiff("train", *ENDLESS, "--federation.rounds", 2, "--runtime.reduction", "ordered", "--run.dir", "run", cwd=folder)
    return arrays(folder / "run", 2)


@pytest.fixture(scope="module", params=LOST, ids=lambda case: f"{case[0]}-{case[1]}")
def lost(request, tmp_path_factory) -> Lost:
    """A job under a launcher that has lost a rank."""
    name, how, reduction = request.param
    launcher, folder = LAUNCHERS[name], tmp_path_factory.mktemp(name)
    (folder / "sitecustomize.py").write_text(EXITING)
    env = environment(launcher, request) | {"PYTHONPATH": f"{folder}:{ROOT}"}
    ranks = 4 if name == "srun" else RANKS
    words = launcher.words(ranks, "train", *ENDLESS, "--runtime.reduction", reduction, "--run.dir", "run")
    if name == "mpich":  # of a rank that exits it says nothing by itself
        words.insert(1, "-print-all-exitcodes")
    with started(words, folder / "job", env) as job:
        pid = lose_rank_1(job, launcher.rank_variable, how)
        seconds, status = seconds_until_all_are_gone(job), job.wait(60)
        run = job.folder / "run"
        setting = json.loads((run / "setting.json").read_text())
        return Lost(name, how, arrays(run, 2), pid, seconds, status, job.printed, setting)


def test_the_weights_are_the_same_under_every_launcher(lost, alone):
    """Bit-equal in ordered reduction, in fast all but."""
    assert lost.printed.count("round 2/5000  loss") == 1  # one federation, not one for each rank
    if lost.how == "exits":
        assert largest_difference(lost.weights, alone) <= 1e-6
        return
    assert lost.weights.keys() == alone.keys() and alone
    assert all(np.array_equal(lost.weights[array], alone[array]) for array in alone)


# Who submits to Slurm, requeues there, or starts torchrun sees jobs end well in other modules; mpirun has none. The two
# MPI libraries are closed alike: tests/comm/test_mpi.py.
ENDING = [pytest.param(name, marks=() if name == "openmpi" else pytest.mark.rare) for name in LAUNCHERS]


@pytest.mark.parametrize("name", ENDING)
def test_a_job_that_is_done_ends_well(name, alone, request, tmp_path):
    words = [*ENDLESS, "--federation.rounds", "2", "--runtime.reduction", "ordered", "--run.dir", "run"]
    with started(LAUNCHERS[name].words(RANKS, "train", *words), tmp_path, environment(LAUNCHERS[name], request)) as job:
        assert job.wait(PATIENCE_S) == 0, job.printed
    found = arrays(tmp_path / "run", 2)
    assert all(np.array_equal(found[array], alone[array]) for array in alone)


def test_a_lost_rank_takes_all_others_along(lost):
    print(f"{lost.name}: all gone {lost.seconds:.1f} s after rank 1 {lost.how}, status {lost.status}")
    assert lost.seconds < GONE_S[lost.name] and lost.status != 0
    assert lost.setting["ranks"][1]["pid"] == lost.pid
    assert re.search(NAMES_RANK_1[lost.how][lost.name].replace("{pid}", str(lost.pid)), lost.printed), lost.printed
    assert len(re.findall(r"^.*fdiff: error:.*rank", lost.printed, re.M)) <= 1, lost.printed


# Who started a rank has no part in what it says: one launcher for each communicator, and one of several nodes.
MOST_TELLING = ("torchrun", "openmpi", "srun")
FAILING = [
    pytest.param(name, marks=() if name in MOST_TELLING else pytest.mark.rare)
    for name in LAUNCHERS
]


@pytest.mark.parametrize("name", FAILING)
def test_a_rank_that_fails_ends_all_with_one_message(name, request, tmp_path):
    """Client 3, on the last rank, has a damaged file; the others do not wait for it."""
    for client in range(4):
        (tmp_path / f"client-{client}").mkdir()
        Image.new("L", (8, 8), 50 * client).save(tmp_path / f"client-{client}" / "a.png")
    (tmp_path / "client-3" / "a.png").write_bytes(b"not a picture")
    launcher = LAUNCHERS[name]
    flags = [*TINY, "--data.partition", "private", "--data.root", f"{tmp_path}/client-{{client}}"]
    command, env = launcher.words(RANKS, "train", *flags, "--run.dir", "run"), environment(launcher, request)
    with started(command, tmp_path, env) as job:
        status = job.wait(PATIENCE_S)
        assert status != 0 and not trainers(tmp_path)
        messages = [line for line in job.printed.splitlines() if "fdiff: error" in line and "a.png" in line]
        assert len(messages) == 1 and "client-3/a.png" in messages[0], job.printed
        assert "ended with status" not in job.printed  # nobody adds to it
