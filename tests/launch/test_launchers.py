"""The same job under every launcher: the same weights, and all ranks gone soon after one is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from jobs import ROOT, TINY, arrays, fdiff, largest_difference
from launching import LAUNCHERS, Job, environment, rounds, started, trainers, wait_for
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


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_weights_are_the_same_under_every_launcher(name, alone, request, tmp_path):
    """Bit-equal in ordered reduction, to 1e-6 in the fast one; both jobs at once."""
    launcher = LAUNCHERS[name]
    env, ranks = environment(launcher, request), 4 if name == "srun" else RANKS
    with ExitStack() as jobs:
        under_way = {}
        for mode, flags in MODES.items():
            words = launcher.words(ranks, "train", *TINY, *flags, "--runtime.timeout_s", "120", "--run.dir", "run")
            under_way[mode] = jobs.enter_context(started(words, tmp_path / mode, env))
        for mode, job in under_way.items():
            assert job.wait(PATIENCE_S) == 0, job.printed
            assert job.printed.count("round 3/3  loss") == 1, mode  # one federation, not one for each rank
    found = arrays(tmp_path / "ordered" / "run", 3)
    assert found.keys() == alone.keys() and alone
    assert all(np.array_equal(found[array], alone[array]) for array in alone)
    assert largest_difference(arrays(tmp_path / "fast" / "run", 3), alone) <= 1e-6


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


@dataclass(frozen=True)
class Lost:
    """What became of a job that lost rank 1."""

    job: Job
    pid: int
    seconds: float
    status: int


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


def watch(job: Job, pid: int) -> Lost:
    """Until all ranks are gone and the launcher has ended, in a thread of its own."""
    began = time.monotonic()
    while trainers(job.folder) and time.monotonic() - began < 90:
        time.sleep(0.5)
    seconds = time.monotonic() - began
    return Lost(job, pid, seconds, job.wait(60))


@pytest.fixture(scope="module")
def lost(request, tmp_path_factory) -> Iterator[dict[tuple[str, str], Future[Lost]]]:
    """Every launcher's job loses a rank in either way; the next one starts while that comes to its end."""
    folder, endings = tmp_path_factory.mktemp("lost"), {}
    (folder / "sitecustomize.py").write_text(EXITING)
    flags = [*TINY, "--federation.rounds", "5000", "--sample.every", "0", "--runtime.timeout_s", "60"]
    with ThreadPoolExecutor() as watchers, ExitStack() as jobs:
        for how, names in NAMES_RANK_1.items():
            for name in names:
                launcher = LAUNCHERS[name]
                try:
                    env = environment(launcher, request) | {"PYTHONPATH": f"{folder}:{ROOT}"}
                    words = launcher.words(RANKS, "train", *flags, "--run.dir", "run")
                except pytest.skip.Exception:
                    continue
                if name == "mpich":  # of a rank that exits it says nothing by itself
                    words.insert(1, "-print-all-exitcodes")
                job = jobs.enter_context(started(words, folder / f"{name}-{how}", env))
                pid = lose_rank_1(job, launcher.rank_variable, how)
                endings[name, how] = watchers.submit(watch, job, pid)
        yield endings


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("how", NAMES_RANK_1)
def test_a_lost_rank_takes_all_others_along(name, how, lost):
    if (name, how) not in lost:
        pytest.skip(f"{name} is not to be had here")
    end = lost[name, how].result(180)
    print(f"{name}: all gone {end.seconds:.1f} s after rank 1 {how}, status {end.status}")
    assert end.seconds < GONE_S[name] and end.status != 0
    assert json.loads((end.job.folder / "run" / "setting.json").read_text())["ranks"][1]["pid"] == end.pid
    printed = end.job.printed
    assert re.search(NAMES_RANK_1[how][name].replace("{pid}", str(end.pid)), printed), printed
    assert len(re.findall(r"^.*fdiff: error:.*rank", printed, re.M)) <= 1, printed


@pytest.mark.parametrize("name", LAUNCHERS)
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
