"""The same job under every launcher: the same weights, and all ranks gone soon after one is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, TINY, arrays, fdiff, largest_difference
from launchers import LAUNCHERS, Job, environment, rounds, started, trainers, wait_for
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS = 2  # of four clients; srun has four, on two nodes
MODES = {"ordered": ("--runtime.reduction", "ordered"), "fast": ("--runtime.reduction", "fast")}
PATIENCE_S = 180.0  # for a job to start and to end on a machine with other things to do


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    """The weights of `fdiff train` without a launcher, in ordered reduction."""
    folder = tmp_path_factory.mktemp("alone")
    fdiff("train", *TINY, *MODES["ordered"], "--run.dir", "run", cwd=folder).check()
    return arrays(folder / "run", 3)


def trained(name: str, mode: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, np.ndarray]:
    """The weights of a job under a launcher."""
    launcher, ranks = LAUNCHERS[name], 4 if name == "srun" else RANKS
    flags = [*TINY, *MODES[mode], "--runtime.timeout_s", "120"]
    words = launcher.words(ranks, "train", *flags, "--run.dir", "run")
    with started(words, folder, environment(launcher, request)) as job:
        assert job.wait(PATIENCE_S) == 0, job.printed
        assert job.printed.count("round 3/3  loss") == 1  # one federation, not one for each rank
    return arrays(folder / "run", 3)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_weights_are_the_same_under_every_launcher(name, alone, request, tmp_path):
    """Bit-equal, in ordered reduction."""
    found = trained(name, "ordered", request, tmp_path)
    assert found.keys() == alone.keys() and alone
    assert all(np.array_equal(found[array], alone[array]) for array in alone)


@pytest.mark.rare  # a launcher has no part in how sums are made: tests/federation/test_rounds.py has fast against alone
@pytest.mark.parametrize("name", LAUNCHERS)
def test_in_fast_reduction_the_weights_are_all_but_the_same(name, alone, request, tmp_path):
    assert largest_difference(trained(name, "fast", request, tmp_path), alone) <= 1e-6


# --- one rank is lost ----------------------------------------------------------------------------------------------

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
    wait_for(lambda: rounds(run) >= 2 or job.process.poll() is not None, PATIENCE_S, "two rounds")
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


# To exit is the gentler way to be lost: what a launcher does about it is what it does about a kill, in other words.
HOW = ["killed", pytest.param("exits", marks=pytest.mark.rare)]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("how", HOW)
def test_a_lost_rank_takes_all_others_along(name, how, request, tmp_path):
    launcher = LAUNCHERS[name]
    (tmp_path / "sitecustomize.py").write_text(EXITING)
    env = environment(launcher, request) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    flags = [*TINY, "--federation.rounds", "5000", "--sample.every", "0", "--runtime.timeout_s", "60"]
    words = launcher.words(RANKS, "train", *flags, "--run.dir", "run")
    if name == "mpich":  # of a rank that exits it says nothing by itself
        words.insert(1, "-print-all-exitcodes")
    with started(words, tmp_path / "job", env) as job:
        pid = lose_rank_1(job, launcher.rank_variable, how)
        seconds = seconds_until_all_are_gone(job)
        status = job.wait(60)
    print(f"{name}: all gone {seconds:.1f} s after rank 1 {how}, status {status}")
    assert seconds < GONE_S[name] and status != 0
    assert json.loads((job.folder / "run" / "setting.json").read_text())["ranks"][1]["pid"] == pid
    assert re.search(NAMES_RANK_1[how][name].replace("{pid}", str(pid)), job.printed), job.printed
    assert len(re.findall(r"^.*fdiff: error:.*rank", job.printed, re.M)) <= 1, job.printed


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
