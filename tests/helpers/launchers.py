"""The launchers that fdiff knows, as data: how each starts the same job; and the processes of a job, to kill one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mpi_libraries
import pytest
from jobs import BIN, ROOT, clean_env

PYTHON = (sys.executable, "-m", "fdiff")


@dataclass(frozen=True)
class Launcher:
    """How to start `fdiff COMMAND` on so many ranks, and what names a rank in the environment of its process."""

    name: str
    command: Callable[[int], list[str]]
    rank_variable: str
    flags: tuple[str, ...] = ()
    slurm: bool = False

    @property
    def submits(self) -> bool:
        """Whether it starts `fdiff train` and nothing else."""
        return self.name.startswith("submitit")

    def words(self, ranks: int, *arguments: object) -> list[str]:
        """The whole command line."""
        given = [str(word) for word in arguments]
        if self.submits:
            assert given.pop(0) == "train"
        return [*self.command(ranks), *given, *self.flags]


def _mpirun(name: str) -> Callable[[int], list[str]]:
    def command(ranks: int) -> list[str]:
        mpi = mpi_libraries.find(name)
        return [*mpi.mpirun, "-n", str(ranks), mpi.python, "-m", "fdiff"]

    return command


def _submit(*where: str) -> Callable[[int], list[str]]:
    def command(ranks: int) -> list[str]:
        nodes = 2 if "slurm" in where else 1
        return [*PYTHON, "submit", *where, "--nodes", str(nodes), "--tasks_per_node", str(ranks // nodes), "--wait"]

    return command


LAUNCHERS = {
    launcher.name: launcher
    for launcher in (
        Launcher(
            "torchrun",
            lambda n: [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(n), "-m", "fdiff"],
            "RANK",
        ),
        Launcher("openmpi", _mpirun("openmpi"), "OMPI_COMM_WORLD_RANK"),
        Launcher("openmpi-torch", _mpirun("openmpi"), "OMPI_COMM_WORLD_RANK", ("--runtime.comm", "torch")),
        Launcher("mpich", _mpirun("mpich"), "PMI_RANK"),
        Launcher(
            "srun", lambda n: ["srun", "-N2", f"-n{n}", "--wait=30", *PYTHON], "SLURM_PROCID", slurm=True
        ),
        Launcher("submitit-slurm", _submit("--cluster", "slurm"), "SLURM_PROCID", slurm=True),
        Launcher("submitit-local", _submit("--cluster", "local"), "SUBMITIT_LOCAL_GLOBALID"),
    )
}


def environment(launcher: Launcher | None, request: pytest.FixtureRequest) -> dict[str, str]:
    """A clean environment, led to the test cluster if the launcher is Slurm's; skips where there can be none."""
    env = clean_env(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    if launcher is not None and launcher.slurm:
        env["SLURM_CONF"] = request.getfixturevalue("slurm_cluster").env["SLURM_CONF"]
    return env


@dataclass
class Job:
    """A job under way in a folder of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    name: str = "printed"

    def wait(self, timeout_s: float) -> int:
        """Its exit status; a hang fails the test."""
        return self.process.wait(timeout_s)

    @property
    def printed(self) -> str:
        """All that it and its ranks have printed, submitit's logs included."""
        logs = [self.folder / self.name, *sorted(self.folder.glob("runs/submitit/*_log.out"))]
        return "\n".join(log.read_text(errors="replace") for log in logs)


@contextmanager
def started(command: list[str], folder: Path, env: dict[str, str], name: str = "printed") -> Iterator[Job]:
    """Start a job, which prints into a file of that name; what is left of it at the end of the block is killed."""
    folder.mkdir(exist_ok=True)
    with (folder / name).open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield Job(process, folder, name)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pids in trainers(folder).values():
            os.kill(pids, signal.SIGKILL)


def trainers(folder: Path, variable: str = "") -> dict[str, int]:
    """The live processes `python -m fdiff train` that run in a folder, by the value of a variable, or else by pid."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"-m fdiff train" not in b" ".join(words[:5]) or (process / "cwd").resolve() != folder.resolve():
                continue
            if "python" not in (process / "comm").read_text():  # the launcher's own words
                continue
            variables = dict(v.split(b"=", 1) for v in (process / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:  # it ended while we looked
            continue
        key = variables.get(variable.encode(), b"").decode() if variable else process.name
        found[key] = int(process.name)
    return found


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait until the condition is true; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - began


def rounds(run: Path) -> int:
    """How many rounds a run has written down."""
    log = run / "rounds.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0
