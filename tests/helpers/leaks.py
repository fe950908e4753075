"""What a test must not leave behind, looked at before and after it; tests/conftest.py has all tests checked."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 5.0  # for what is about to end

# pytest says there which test runs; torch's compiler says where its cache is when it is first imported.
VARIABLES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
# tqdm keeps one thread for all its bars, which sleeps.
THREADS = {"TMonitor"}
# The session's Slurm cluster comes up when the first test asks for it, and stays.
DAEMONS = {"munged", "slurmctld", "slurmd"}
# Locks, which a process of multiprocessing's own removes when the last that knows them has ended; and what an MPI
# library leaves of ranks that were killed, and has of ranks that other users run: nothing of fdiff's.
NOT_OURS = ("sem.mp-", "mpich_shm_", "sm_segment.")
# Environments of Python and the caches of tools: git ignores them, and they are made to stay.
FOLDERS = {".git", ".venv", ".venv-mpich", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache"}

Found = dict[str, set[str]]  # what there is of each kind


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """A test fails that leaves behind what was not there before it.

    Fixtures of a module or of the session are made before this one looks, so that they may keep what they hold.
    """
    before = look()
    yield
    if left := left_since(before):
        pytest.fail("left behind:\n" + "\n".join(left), pytrace=False)


def look() -> Found:
    """All that there is at this moment."""
    return {
        "environment variable": {f"{k}={v}" for k, v in os.environ.items() if k not in VARIABLES},
        "thread": {str(t) for t in threading.enumerate() if type(t).__name__ not in THREADS},
        "file in the checkout": set(files(ROOT)),
        "process": {f"{pid} {name}" for pid, name in processes().items()},
        "process group": process_groups(),
        "shared memory": shared_memory(),
    }


def left_since(before: Found) -> list[str]:
    """What there is now and was not before, once what is about to end has had time for it."""
    deadline = time.monotonic() + GRACE_S
    while (left := _new(before)) and time.monotonic() < deadline:
        gc.collect()  # what only a cycle of references holds is nobody's
        time.sleep(0.05)
    return left


def _new(before: Found) -> list[str]:
    now = look()
    # A variable that is gone has been leaked as well: whoever needs it comes later.
    gone = before["environment variable"] - now["environment variable"]
    now["shared memory"] = {n for n in now["shared memory"] - before["shared memory"] if not held_by_others(n)}
    new = [f"{kind}: {name}" for kind in now for name in sorted(now[kind] - before[kind])]
    return new + [f"environment variable that was: {name}" for name in sorted(gone)]


def files(folder: Path) -> Iterator[str]:
    """The files below a folder of the checkout."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in FOLDERS and not entry.name.endswith(".egg-info"):
                yield from files(Path(entry.path))
        else:
            yield os.path.relpath(entry.path, ROOT)


def shared_memory() -> set[str]:
    """The names in the file system of shared memory."""
    there = SHARED_MEMORY.iterdir() if SHARED_MEMORY.is_dir() else ()
    return {entry.name for entry in there if not entry.name.startswith(NOT_OURS)}


def process_groups() -> set[str]:
    """The default group of torch.distributed, if this process has one."""
    distributed = sys.modules.get("torch.distributed")
    return {"torch.distributed"} if distributed and distributed.is_initialized() else set()


# --- processes -----------------------------------------------------------------------------------------------------


def processes() -> dict[int, str]:
    """The processes that this one or its test has started and that have not ended, with their commands.

    Those that fork for the tests are none of a test's: the warm server, and what it has to clean up at its end.
    """
    ours = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    found = descendants(os.getpid()) | of_this_test()
    commands = {pid: command(pid) for pid in found - ours - {os.getpid()} if not is_over(pid)}
    return {pid: words for pid, words in commands.items() if not is_daemon(words)}


def descendants(pid: int) -> set[int]:
    """The children of a process, theirs, and so on."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found |= {child} | descendants(child)
    return found


def of_this_test() -> set[int]:
    """The processes in whose environment pytest says that this test runs, whoever is their parent by now."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PYTEST_CURRENT_TEST={test} (".encode() in (process / "environ").read_bytes():
                found.add(int(process.name))
    return found


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200].strip()
    return ""


def is_daemon(words: str) -> bool:
    program = words.partition(" ")[0].removesuffix(":")
    return Path(program).name in DAEMONS


def is_over(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its status."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def held_by_others(shared: str) -> bool:
    """Whether a process that is not of this test has that memory mapped: another worker's, another user's."""
    ours = processes().keys() | {os.getpid()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"{SHARED_MEMORY / shared}\n" in maps.read_text() and int(maps.parent.name) not in ours:
                return True
    return False
