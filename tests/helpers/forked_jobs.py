"""Jobs of real ranks, forked from the warm server, so that a job costs a second and not ten.

A rank is what a launcher would have started: it has the environment of one and a session of its own, runs
`fdiff ARGUMENTS` and ends with its exit status. Before that something may be done to it, to inject a fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from warm_server import PROCESSES

AT_ONCE = threading.RLock()  # two threads that ask after one process would take its exit status from each other
DICE = random.SystemRandom()  # hypothesis has all workers throw the same numbers with the other one
PATIENCE_S = 10.0  # a loader's worker looks for its parent every 5 s
LAUNCHERS = ("SLURM_", "SRUN_", "SBATCH_", "OMPI_", "PMI", "PMIX_", "MPI_", "MASTER_", "TORCHELASTIC_", "SUBMITIT_")
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "ROLE_RANK")

Before = Callable[[int], None]  # called in each rank with its number, before the command


def clean_env(**more: str) -> dict[str, str]:
    """This environment without what a launcher may have left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS + OF_A_RANK)}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


class Job:
    """`fdiff ARGUMENTS` on so many ranks in the folder `cwd`; what they print goes to files in the folder `logs`.

    `more` has arguments of single ranks. The ranks meet at `port`, or at a free one.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        ranks: int,
        cwd: Path,
        before: Before | None = None,
        logs: Path | None = None,
        port: int = 0,
        more: Mapping[int, Sequence[object]] | None = None,
    ) -> None:
        self.logs, self.name = logs or cwd, f"job-{time.monotonic_ns()}"
        self.port = port or free_port()
        self.processes = [
            PROCESSES.Process(
                target=_rank,
                args=(
                    [str(word) for word in (*arguments, *(more or {}).get(rank, ()))],
                    cwd,
                    environment(rank, ranks, self.port),
                    self._file(rank),
                    before,
                    rank,
                ),
            )
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
        return self.logs / f"{self.name}.{rank}"

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

    def printed(self, rank: int, stream: str) -> str:
        """What a rank wrote to `out` or `err`."""
        file = Path(f"{self._file(rank)}.{stream}")
        return file.read_text(errors="replace") if file.exists() else ""

    def said(self) -> str:
        """What all ranks wrote to stderr."""
        return "".join(self.printed(rank, "err") for rank in range(len(self.processes)))

    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        return [line for line in self.said().splitlines() if line.startswith("fdiff: error:")]


def free_port() -> int:
    """A port of the loopback address that nobody has, and that neither the kernel nor another worker of the tests gives
    to anybody before it is used."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, last = (int(n) for n in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    while True:
        port = DICE.randrange(10_000, first - 8) if first > 20_000 else DICE.randrange(last + 8, 65_528)
        port = port // 8 * 8 + worker % 8
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set, beside what is set here; of one rank alone nothing."""
    if ranks == 1:
        return clean_env()
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return clean_env(**{name: str(value) for name, value in (place | rendezvous).items()})


def _rank(
    words: list[str], cwd: Path, env: Mapping[str, str], file: Path, before: Before | None, rank: int
) -> None:
    """Become the rank: its session, environment, folder and streams; run the command and end with its status."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{file}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from fdiff.commands.main import main

    if before:
        before(rank)
    sys.exit(main(words))


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


def kill(leaders: Sequence[int]) -> None:
    """End by force all that is left in these ranks' sessions."""
    for pid in in_sessions(leaders):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
