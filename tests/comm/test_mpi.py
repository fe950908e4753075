"""MPI with real ranks, over Open MPI and over MPICH: what each communicator must do, lost ranks, wrong worlds."""

from __future__ import annotations

import _ctypes
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi_libraries import Mpi, find, mpich, open_mpi, run

from fdiff.comm import mpi_library
from fdiff.comm.mpi_library import library_problem, takes_device_pointers, world_problem
from fdiff.runtime.launcher import Launch, cray_gpu_support

SCRIPT = Path(__file__).parents[1] / "helpers" / "mpi_cases.py"

slow = pytest.mark.slow
rare = pytest.mark.rare  # minutes in all: stopped ranks and messages of gigabytes


@pytest.fixture(params=["openmpi", "mpich"], scope="module")
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return find(request.param)


@slow
def test_every_case(mpi: Mpi) -> None:
    done = mpi.run(4, SCRIPT, "cases", timeout_s=180)
    errors = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("ERRORS")]
    assert errors == [{}], errors or done.stderr
    assert done.returncode == 0


@rare
@slow
def test_more_elements_than_a_c_int_counts(mpi: Mpi) -> None:
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if int(memory["MemAvailable"].split()[0]) < 8 * 2**20:
        pytest.skip("needs 8 GiB of free memory")
    done = mpi.run(2, SCRIPT, "large", timeout_s=200)
    pieces = {"mpich": "1", "openmpi": "3"}[mpi.name]  # MPICH implements MPI-4
    assert done.stdout.split() == ["DELIVERED", pieces], done.stderr


@rare
@slow
@pytest.mark.parametrize(("kind", "backend"), [("auto", "mpi"), ("torch", "gloo")])
def test_mpirun_leads_to(kind: str, backend: str, mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, kind)
    assert sorted(done.stdout.splitlines()) == [f"DONE {backend} {rank} 3" for rank in range(3)], done.stderr
    assert done.returncode == 0


@rare
@slow
def test_a_bad_request_of_all_ranks_ends_with_its_own_status(mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, "refuses")
    assert done.stderr.count("data.root: nothing there") == 3
    assert done.returncode == 2


@rare
@slow
def test_a_failure_of_one_rank_ends_all(mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, "fails")
    assert said(done.stderr) == ["1: client 1 has no idea"]
    assert done.returncode == 1


def said(stderr: str) -> list[str]:
    """Rank and text of what was said for all."""
    lines = [line.split(" ", 2) for line in stderr.splitlines() if line.startswith("SAYS ")]
    return [f"{rank}: {text}" for _, rank, text in lines]


def seconds_since_the_fault(stderr: str) -> float:
    """Now, since a rank wrote that it stops or dies."""
    return time.time() - next(float(line.split()[1]) for line in stderr.splitlines() if line.startswith("FAULT "))


@rare
@slow
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("stopped-mpi", "0: rank 2 did not answer within 3 s"),
        ("stopped-torch", "0: rank 2 did not answer within 3 s"),
        ("stopped-rank-0-mpi", "1: rank 0 did not answer within 3 s"),
        ("stopped-rank-0-torch", "1: rank 0 did not answer within 3 s"),
        ("stopped-in-collective", "0: rank 2 was lost during the all-reduce"),
        ("locked", "0: rank 2 was lost during the all-reduce"),
        ("stopped-in-pair", "0: rank 2 (was lost during the all-reduce|did not answer within 3 s)"),
    ],
)
def test_a_stopped_rank_is_named_and_all_end(what: str, says: str, mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, what)
    assert seconds_since_the_fault(done.stderr) < 3 + 10
    assert len(said(done.stderr)) == 1 and re.fullmatch(says, said(done.stderr)[0]), done.stderr
    assert done.returncode != 0


@slow
@pytest.mark.parametrize("what", ["killed-mpi", "killed-torch"])
def test_mpirun_ends_a_job_with_a_killed_rank(what: str, mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, what)
    assert seconds_since_the_fault(done.stderr) < 10
    assert "signal 9" in done.stdout + done.stderr  # it says so in its own words
    assert done.returncode != 0


@rare
@slow
@pytest.mark.parametrize("what", ["segfault", "segfault-in-collective"])
def test_mpirun_ends_a_job_with_a_rank_that_segfaults(what: str, mpi: Mpi) -> None:
    done = mpi.run(3, SCRIPT, what)
    assert seconds_since_the_fault(done.stderr) < 10
    assert "signal 11" in done.stdout + done.stderr
    assert done.returncode != 0


@rare
@slow
def test_a_fault_tolerant_library_tells_who_was_killed() -> None:
    mpi = open_mpi()
    tolerant = Mpi(mpi.name, (*mpi.mpirun, "--with-ft", "ulfm"), mpi.python)
    done = tolerant.run(3, SCRIPT, "killed-mpi")
    assert said(done.stderr) == ["0: rank 1 was lost during the exchange"], done.stderr
    assert done.returncode == 1


# --- a world that is not the launcher's ------------------------------------------------------------------------------


@slow
def test_the_launcher_of_another_library_is_refused() -> None:
    ours, theirs = open_mpi(), mpich()
    for mpi, mpirun, python in (("Open MPI", ours.mpirun, theirs.python), ("MPICH", theirs.mpirun, ours.python)):
        done = Mpi("mixed", mpirun, python).run(2, SCRIPT, "mpi")
        assert done.stderr.count(f"runtime.comm: 'mpi' under mpirun of {mpi}, but mpi4py has loaded ") == 2, done.stderr
        assert done.returncode == 2


@slow
def test_a_world_of_one_under_a_launcher_of_many_is_refused(mpi: Mpi) -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    done = run([mpi.python, str(SCRIPT), "mpi"], 60, torchrun)
    assert "this is rank 0 of 1, and the launcher (torchrun) says rank 1 of 2; start with mpirun" in done.stderr
    assert done.returncode == 2


def test_world_problem() -> None:
    four = Launch("srun", 2, 4, 0, 2)
    assert world_problem(four, 2, 4, "MPICH 5.0.2") is None
    assert world_problem(Launch("none"), 0, 1, "MPICH 5.0.2") is None
    assert world_problem(four, 0, 1, "Open MPI 5.0.11") == (
        "runtime.comm: 'mpi', but Open MPI 5.0.11 says that this is rank 0 of 1, and the launcher (srun) says rank 2 "
        "of 4; start with srun --mpi=pmix or --mpi=pmi2, as the library was built, or use --runtime.comm torch"
    )
    assert world_problem(four, 3, 4, "MPICH 5.0.2") is not None  # the same size, another order
    unknown = world_problem(Launch("none"), 1, 2, "Some MPI 1")
    assert unknown is not None and "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE" in unknown


@pytest.mark.parametrize(("setting", "aware"), [({}, False), ({"MPICH_GPU_SUPPORT_ENABLED": "1"}, True)])
def test_crays_mpich_takes_device_pointers_if_the_user_switched_that_on(
    setting: dict[str, str], aware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi_library.launcher, "cray_gpu_support", lambda: cray_gpu_support(setting))
    cray = SimpleNamespace(Get_library_version=lambda: "MPI VERSION    : CRAY MPICH version 8.1.28")
    assert takes_device_pointers(cray) == aware


def test_others_take_device_pointers_only_if_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = SimpleNamespace(Get_library_version=lambda: "MPICH Version: 4", __file__=_ctypes.__file__)
    assert not takes_device_pointers(silent)
    assert not takes_device_pointers(SimpleNamespace(Get_library_version=lambda: "?", __file__="/nowhere.so"))
    for answer in (0, 1):
        library = SimpleNamespace(MPIX_Query_cuda_support=lambda answer=answer: answer)
        monkeypatch.setattr(mpi_library.ctypes, "CDLL", lambda path, library=library: library)
        assert takes_device_pointers(silent) == bool(answer)


def test_library_problem() -> None:
    assert library_problem(Launch("openmpi", 0, 2, 0, 2), "Open MPI") is None
    assert library_problem(Launch("mpich", 0, 2, 0, 2), "Intel MPI") is None  # speaks the same protocol
    assert library_problem(Launch("srun", 0, 2, 0, 2), "MPICH") is None
    problem = library_problem(Launch("openmpi", 0, 2, 0, 2), "MPICH")
    assert problem is not None and problem.startswith("runtime.comm: 'mpi' under mpirun of Open MPI, but mpi4py")
