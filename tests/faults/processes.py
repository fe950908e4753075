"""Jobs of real ranks, forked from a server that has loaded torch already, so that a job costs a second and not ten.

A rank is what a launcher would have started: it has the environment of one, runs `fdiff ARGUMENTS` and ends with its
exit status. Before that a fault may be planted in it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import clean_env

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fdiff.cli", "fdiff.commands.train", "fdiff.comm.torch_dist", "torch.utils.tensorboard", "faults.plants"]
)

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
        for process in self.processes:
            process.start()
        self.began = time.monotonic()
        self.ended_s: dict[int, float] = {}

    def _file(self, rank: int) -> Path:
        return self.cwd / f"{self.name}.{rank}"

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, in rank order."""
        return [p.pid for p in self.processes]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        alive = [r for r, p in enumerate(self.processes) if p.is_alive()]
        for rank in set(range(len(self.processes))) - set(alive):
            self.ended_s.setdefault(rank, time.monotonic())
        return alive

    def wait(self, seconds: float, besides: Sequence[int] = ()) -> bool:
        """Whether all ranks but those end in time; afterwards none is alive, by force where need be."""
        deadline = time.monotonic() + seconds
        while (left := set(self.alive()) - set(besides)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in self.alive():
            self.signal(rank, signal.SIGKILL)
        for process in self.processes:
            process.join()
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
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = clean_env(**({k: str(v) for k, v in (place | rendezvous).items()} if ranks > 1 else {}))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(file.parent)
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{file}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from fdiff.cli import main

    status = 70
    try:
        if fault:
            fault(rank)
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def left_over(pids: Sequence[int]) -> int:
    """How many of the processes, or of what they started, still run."""
    return sum(Path(f"/proc/{pid}").exists() for pid in pids)
