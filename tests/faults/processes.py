"""Jobs of real ranks, forked from a server that has loaded torch already, so that a job costs a second and not ten.

A rank is what a launcher would have started: it has the environment of one and a session of its own, runs
`fdiff ARGUMENTS` and ends with its exit status. Before that a fault may be planted in it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import clean_env

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fdiff.commands.main", "fdiff.commands.train", "fdiff.comm.torch_dist", "torch.utils.tensorboard", "faults.plants"]
)
AT_ONCE = threading.RLock()  # two threads that ask after one process would take its exit status from each other
PATIENCE_S = 10.0  # a loader's worker looks for its parent every 5 s
TAG = "FDIFF_FAULT_JOB"  # in the environment of jobs that a launcher starts

Fault = Callable[[int], None]  # called in each rank with its number, before the command


class Job:
    """`fdiff ARGUMENTS` on so many ranks; `fault` is a function of a module, or a partial of one."""

    def __init__(self, arguments: Sequence[object], ranks: int, cwd: Path, fault: Fault | None = None) -> None:
        self.cwd, self.name = cwd, f"job-{time.monotonic_ns()}"
        words, port = [str(word) for word in arguments], _free_port()
        self.processes = [
            PROCESSES.Process(target=_rank, args=(words, rank, ranks, port, self._file(rank), fault))
            for rank in range(ranks)
        ]
        with AT_ONCE:
            for process in self.processes:
                process.start()
        self.pids = [p.pid for p in self.processes]
        self.began = time.monotonic()
        self.ended_s: dict[int, float] = {}
        self.left_over = 0  # known after `wait`
        self._end = weakref.finalize(self, kill, self.pids)

    def _file(self, rank: int) -> Path:
        return self.cwd / f"{self.name}.{rank}"

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        with AT_ONCE:
            alive = [r for r, p in enumerate(self.processes) if p.is_alive()]
        for rank in set(range(len(self.processes))) - set(alive):
            self.ended_s.setdefault(rank, time.monotonic())
        return alive

    def wait(self, seconds: float, besides: Sequence[int] = ()) -> bool:
        """Whether all ranks but those end in time; afterwards none is alive, by force where need be.

        `left_over` then counts what else these ranks had started and what did not end by itself.
        """
        deadline = time.monotonic() + seconds
        while (left := set(self.alive()) - set(besides)) and time.monotonic() < deadline:
            time.sleep(0.02)
        watched = [pid for rank, pid in enumerate(self.pids) if rank not in besides]
        self.left_over = survivors(lambda: set(in_sessions(watched)) - set(watched), 0 if left else PATIENCE_S)
        self._end()
        while self.alive():
            time.sleep(0.02)
        return not left

    def statuses(self) -> list[int]:
        """Exit status of each rank, negative for a signal."""
        return [p.exitcode for p in self.processes]

    def said(self) -> str:
        """What all ranks wrote to stderr."""
        return "".join(
            file.read_text(errors="replace")
            for rank in range(len(self.processes))
            if (file := Path(f"{self._file(rank)}.err")).exists()
        )

    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        return [line for line in self.said().splitlines() if line.startswith("fdiff: error:")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(words: list[str], rank: int, ranks: int, port: int, file: Path, fault: Fault | None) -> None:
    os.setsid()
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = clean_env(**({k: str(v) for k, v in (place | rendezvous).items()} if ranks > 1 else {}))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(file.parent)
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{file}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from faults import plants
    from fdiff.commands.main import main

    status = 70
    try:
        plants.note_commits()
        if fault:
            fault(rank)
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- what outlives a job -------------------------------------------------------------------------------------------


def survivors(look: Callable[[], set[int]], seconds: float = PATIENCE_S) -> int:
    """How many processes a look at them still finds after so many seconds; as soon as there is none, 0."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(found)


def in_sessions(leaders: Sequence[int]) -> list[int]:
    """The processes of these ranks' sessions, whoever is their parent by now; what has ended does not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(session) in leaders:
                found.append(int(process.name))
    return found


def tagged(tag: str) -> set[int]:
    """The processes whose environment has this tag; what has ended has no environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found


def kill(leaders: Sequence[int]) -> None:
    """End by force all that is left in these ranks' sessions."""
    for pid in in_sessions(leaders):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
