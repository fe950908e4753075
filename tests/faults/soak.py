"""One run of four ranks for a long time, a fault every 15 seconds: rounds go on, memory and open files stay flat.

Most faults are ones that the ranks survive (a client fails, a rank stands still for a moment); every six minutes one
kills a rank, whereupon the others end and the run is taken up again, as a scheduler would do it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults import injections
from faults.processes import Job
from faults.runs import GRACE_S, committed, logged, lost, train

EVERY_S = 15.0
KILL_EVERY = 24  # faults
RANKS = 4
TIMEOUT_S = 10.0
WARM_ROUNDS = 8  # until a process has loaded and allocated all that it needs
FLAT_MIB, FLAT_FILES = 24.0, 2  # a process that is watched may have grown by so much, whatever the time
WRONG = ("ended by itself", "no new round", "hung", "lost", "left over", "grew")


@dataclass
class Found:
    """What happened: what was done to the run, and what must not have come of it."""

    done: dict[str, int] = field(default_factory=lambda: {"client failed": 0, "rank stood still": 0, "rank killed": 0})
    wrong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRONG, 0))
    watched: list[str] = field(default_factory=list)

    def ended(self, job: Job, in_time: bool, gone: int) -> None:
        """A job has ended."""
        self.wrong["hung"] += not in_time
        self.wrong["left over"] += job.left_over
        self.wrong["lost"] += gone


class Watch:
    """Memory and open files of a job's ranks, from when they are warm."""

    def __init__(self, job: Job, run: Path) -> None:
        self.job, self.run, self.due = job, run, len(logged(run)) + WARM_ROUNDS
        self.first: dict[int, tuple[float, int]] = {}
        self.since = 0.0

    def look(self) -> None:
        """Note what the ranks use, once they are warm."""
        if not self.first and len(logged(self.run)) >= self.due:
            self.first, self.since = _use(self.job), time.monotonic()

    def end(self, found: Found) -> None:
        """Hold what the worst rank uses now against that."""
        now = _use(self.job)
        more = [(now[p][0] - self.first[p][0], now[p][1] - self.first[p][1]) for p in now if p in self.first]
        if not more:
            return
        mib, files = max(m for m, _ in more), max(f for _, f in more)
        found.wrong["grew"] += mib > FLAT_MIB or files > FLAT_FILES
        seconds = time.monotonic() - self.since
        found.watched.append(f"  ranks watched for {seconds:.0f} s: {mib:+.1f} MiB, {files:+d} open files at most")


def main(minutes: float, seed: int = 0) -> int:
    """Print what happened and the growth of the ranks; status 1 if anything went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="fdiff-soak-"))
    try:
        found = soak(minutes, random.Random(seed), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(found.wrong.values()) or not found.watched)


def soak(minutes: float, chance: random.Random, folder: Path) -> Found:
    """Let a run live in a folder for so long."""
    found, run, end = Found(), folder / "run", time.monotonic() + 60 * minutes
    job, faults, before = _start(folder, False), 0, -1
    watch = Watch(job, run)
    while time.monotonic() < end:
        time.sleep(EVERY_S)
        watch.look()
        now, alive = len(logged(run)), len(job.alive())
        if alive == RANKS:
            found.wrong["no new round"] += now == before
            faults += 1
        before = now
        if alive == RANKS and faults % KILL_EVERY:
            found.done[_disturb(job, chance)] += 1
            continue
        watch.end(found)
        found.done["rank killed"] += alive == RANKS
        found.wrong["ended by itself"] += alive < RANKS
        job.signal(chance.randrange(RANKS), signal.SIGKILL)
        in_time = job.wait(TIMEOUT_S + GRACE_S)
        found.ended(job, in_time, lost(run, committed(folder, "run")))
        job, before = _start(folder, True), -1
        watch = Watch(job, run)
    watch.end(found)
    _stop(job, run, found)
    rounds, dropped = len(logged(run)), sum(bool(row["dropped"]) for row in logged(run))
    print(f"{minutes:g} minutes, {rounds} rounds, {dropped} of them without a client; {found.done}; {found.wrong}")
    print(*found.watched, sep="\n", flush=True)
    return found


def _stop(job: Job, run: Path, found: Found) -> None:
    """Ask the job to end; all rounds must be in the log once, and the last one committed."""
    for rank in range(RANKS):
        job.signal(rank, signal.SIGTERM)
    in_time = job.wait(60)
    rounds = [row["round"] for row in logged(run)]
    gone = lost(run, len(rounds), keep=1) + (rounds != list(range(1, len(rounds) + 1)))
    found.ended(job, in_time, gone)
    found.wrong["ended by itself"] += set(job.statuses()) != {128 + signal.SIGTERM}


def _start(folder: Path, resume: bool) -> Job:
    more = ("--federation.on_client_failure", "drop", "--runtime.timeout_s", TIMEOUT_S, "--optim.ema", 0.9)
    return Job(train("run", "usplit", 1_000_000, *more, resume=resume), RANKS, folder, injections.fail_on_signal)


def _disturb(job: Job, chance: random.Random) -> str:
    rank = chance.randrange(RANKS)
    if chance.random() < 0.7:
        job.signal(rank, signal.SIGUSR1)
        return "client failed"
    job.signal(rank, signal.SIGSTOP)
    time.sleep(chance.uniform(0.5, TIMEOUT_S / 3))
    job.signal(rank, signal.SIGCONT)
    return "rank stood still"


def _use(job: Job) -> dict[int, tuple[float, int]]:
    """By process: resident memory in MiB, open files."""
    used = {}
    for rank in job.alive():
        pid = job.pids[rank]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        used[pid] = (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")))
    return used
