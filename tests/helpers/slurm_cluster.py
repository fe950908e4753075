"""The two-node Slurm of slurm/testcluster for tests: brings it up, runs commands on it, waits for jobs, takes it down.

A test that takes the fixture `slurm_cluster` gets it (tests/conftest.py); without root or Slurm
it is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm" / "testcluster"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)


@dataclass(frozen=True)
class Cluster:
    """A running test cluster: its state folder, and the environment that leads commands to it."""

    folder: Path
    env: Mapping[str, str]


def why_not() -> str | None:
    """The reason why the cluster cannot be brought up here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "the Slurm test cluster needs root"
    return f"not found: {', '.join(missing)} (apt install slurm-wlm munge)" if missing else None


def clean_env(folder: Path) -> dict[str, str]:
    """This process's environment without what a launcher or another Slurm put there, led to the cluster in `folder`."""
    launchers = ("SLURM_", "SRUN_", "SBATCH_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in ranks}
    return kept | {"FDIFF_TESTCLUSTER_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster in a folder of its own, down again at the end; raises RuntimeError with the reason if it cannot start.

    Its folder is new, so a cluster that a user or another test session has up is not touched.
    """
    folder = Path(tempfile.mkdtemp(prefix="fdiff-slurm-"))  # short: sockets live in it
    cluster = Cluster(folder, clean_env(folder))
    try:
        started = run(cluster, [str(SCRIPTS / "up")], timeout_s=120, check=False)
        if started.returncode:
            raise RuntimeError(f"slurm/testcluster/up failed:\n{started.stderr}")
        yield cluster
    finally:
        run(cluster, [str(SCRIPTS / "down")], timeout_s=120)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """The session's cluster; skips where it cannot run, fails where it should run and does not."""
    if reason := why_not():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


def run(
    cluster: Cluster,
    command: Sequence[str],
    *,
    timeout_s: float = 60,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs a command against the cluster; `env` adds variables. A failure shows what the command printed."""
    done = subprocess.run(
        list(command), env={**cluster.env, **(env or {})}, cwd=cwd, timeout=timeout_s, capture_output=True, text=True
    )
    if check and done.returncode:
        raise AssertionError(f"{list(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def sbatch(cluster: Cluster, *args: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Submits from the folder `cwd`, where the job also runs, and returns the job's id."""
    return run(cluster, ["sbatch", "--parsable", *args], cwd=cwd, env=env).stdout.strip()


def job_fields(cluster: Cluster, job: str) -> dict[str, str]:
    """What `scontrol show job` says of a job, or of one array task (`ID_INDEX`): JobState, Restarts, ExitCode, ..."""
    line = run(cluster, ["scontrol", "--oneliner", "show", "job", job]).stdout
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def wait_for_job(
    cluster: Cluster, job: str, states: Collection[str] = ENDED, *, timeout_s: float = 120
) -> dict[str, str]:
    """Waits until a job is in one of `states` (by default: has ended for good) and returns its fields."""
    end = time.monotonic() + timeout_s
    while (fields := job_fields(cluster, job))["JobState"] not in states:
        if time.monotonic() > end:
            raise TimeoutError(f"job {job} is not in {sorted(states)} after {timeout_s} s: {fields}")
        time.sleep(0.2)
    return fields


def cluster_pids(folder: Path) -> dict[int, str]:
    """The live processes that belong to the cluster in `folder`, with their names; a zombie has no environment left."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            name = (process / "comm").read_text().strip()
        except OSError:  # it ended while we looked
            continue
        if f"SLURM_CONF={folder / 'slurm.conf'}".encode() in variables:
            found[int(process.name)] = name
    return found
