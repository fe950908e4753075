"""The same job under every launcher: the same weights, and all ranks gone soon after one is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from jobs import TINY, arrays, fdiff, largest_difference
from launching import LAUNCHERS, environment, rounds, started, trainers, wait_for
from PIL import Image

pytest_plugins = ["slurm_cluster"]
pytestmark = [pytest.mark.slow, pytest.mark.long]

RANKS = 2  # of four clients; srun has four, on two nodes
ORDERED = ("--runtime.reduction", "ordered", "--runtime.timeout_s", "120")
GONE_S = 45.0  # after a rank is lost; srun waits 30 of them
PATIENCE_S = 180.0  # for a job to start and to end on a machine with other things to do


def run_under(name: str, request: pytest.FixtureRequest, folder: Path, *flags: str, ranks: int = RANKS) -> str:
    """Train to the end in RUN/run; what was printed."""
    launcher = LAUNCHERS[name]
    env = environment(launcher, request)
    with started(launcher.words(ranks, "train", *TINY, *flags, "--run.dir", "run"), folder, env) as job:
        assert job.wait(PATIENCE_S) == 0, job.printed
        return job.printed


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    """The weights of `fdiff train` without a launcher, in ordered reduction."""
    folder = tmp_path_factory.mktemp("alone")
    fdiff("train", *TINY, *ORDERED, "--run.dir", "run", cwd=folder).check()
    return arrays(folder / "run", 3)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ordered_weights_are_bit_equal_under_every_launcher(name, alone, request, tmp_path):
    printed = run_under(name, request, tmp_path, *ORDERED, ranks=4 if name == "srun" else RANKS)
    found = arrays(tmp_path / "run", 3)
    assert found.keys() == alone.keys() and alone
    assert all(np.array_equal(found[array], alone[array]) for array in alone)
    assert printed.count("round 3/3  loss") == 1  # one federation, not one for each rank


def test_fast_weights_are_equal_to_1e_6(alone, request, tmp_path):
    run_under("mpich", request, tmp_path, "--runtime.timeout_s", "120")
    assert largest_difference(arrays(tmp_path / "run", 3), alone) <= 1e-6


# --- one rank is lost ----------------------------------------------------------------------------------------------

NAMES_RANK_1 = {  # who says it: the launcher, if it ends the others before they can
    "torchrun": r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9",
    "openmpi": r"@1,1\]|rank 1\b",
    "mpich": r"BAD TERMINATION[^=]+\n=   PID {pid} RUNNING AT",  # which is in setting.json
    "srun": r"task 1: Killed",
    "submitit-slurm": r"fdiff: rank 1 was ended by SIGKILL",
    "submitit-local": r"fdiff: rank 1 was ended by SIGKILL",
}


@pytest.mark.parametrize("name", NAMES_RANK_1)
def test_a_killed_rank_takes_all_others_along(name, request, tmp_path):
    launcher = LAUNCHERS[name]
    flags = [*TINY, "--federation.rounds", "5000", "--sample.every", "0", "--runtime.timeout_s", "60"]
    command, env = launcher.words(RANKS, "train", *flags, "--run.dir", "run"), environment(launcher, request)
    with started(command, tmp_path, env) as job:
        wait_for(lambda: rounds(tmp_path / "run") >= 2 or job.process.poll() is not None, PATIENCE_S, "two rounds")
        ranks = trainers(tmp_path, launcher.rank_variable)
        assert {"0", "1"} <= ranks.keys(), job.printed
        os.kill(ranks["1"], signal.SIGKILL)
        seconds = wait_for(lambda: not trainers(tmp_path), GONE_S, "the end of all ranks")
        status = job.wait(GONE_S)
        print(f"{name}: all gone {seconds:.1f} s after rank 1 was killed, status {status}")
        assert status != 0
        pid = json.loads((tmp_path / "run" / "setting.json").read_text())["ranks"][1]["pid"]
        assert pid == ranks["1"]
        assert re.search(NAMES_RANK_1[name].replace("{pid}", str(pid)), job.printed), job.printed
        assert len(re.findall(r"^.*fdiff: error:.*rank", job.printed, re.M)) <= 1, job.printed


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name not in ("openmpi-torch", "submitit-local")])
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
