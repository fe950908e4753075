"""One run of four ranks for a long time, a fault every 15 seconds: rounds go on, memory and open files stay flat.

Most faults are ones that the ranks survive (a client fails, a rank stands still for a moment); one in eight kills a
rank, whereupon the others end and the run is taken up again, as a scheduler would do it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from faults import plants
from faults.processes import Job, left_over
from faults.runs import GRACE_S, logged, lost, rounds_there, train

EVERY_S = 15.0
RANKS = 4
TIMEOUT_S = 10.0
WARM_ROUNDS = 8  # until a process has loaded and allocated all that it needs


def main(minutes: float, seed: int = 0) -> int:
    """Print what happened and the growth of the longest-lived ranks; status 1 if the run did not stay sound."""
    folder = Path(tempfile.mkdtemp(prefix="fdiff-soak-"))
    try:
        return _soak(minutes, random.Random(seed), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _soak(minutes: float, chance: random.Random, folder: Path) -> int:
    run, end = folder / "run", time.monotonic() + 60 * minutes
    counts = {"client failed": 0, "rank stood still": 0, "rank killed": 0, "hung": 0, "lost": 0, "left over": 0}
    job, due, first = _start(folder, False), WARM_ROUNDS, {}
    since = time.monotonic()
    grown: list[tuple[float, float, int]] = []  # seconds watched, MiB more, files more: of each job's worst rank
    while time.monotonic() < end:
        time.sleep(EVERY_S)
        if not first and len(logged(run)) >= due:
            first, since = _use(job), time.monotonic()
        kill = chance.random() < 1 / 8
        if not kill:
            counts[_disturb(job, chance)] += 1
        if kill or len(job.alive()) < RANKS:
            grown += _growth(job, first, since)
            committed = max(rounds_there(run), default=0)
            job.signal(chance.randrange(RANKS), signal.SIGKILL)
            counts["rank killed"] += 1
            counts["hung"] += not job.wait(TIMEOUT_S + GRACE_S)
            counts["left over"] += left_over(job.pids)
            counts["lost"] += lost(run, committed)
            job, due, first = _start(folder, True), len(logged(run)) + WARM_ROUNDS, {}
    grown += _growth(job, first, since)
    for rank in range(RANKS):
        job.signal(rank, signal.SIGTERM)
    counts["hung"] += not job.wait(60)
    rounds = [row["round"] for row in logged(run)]
    dropped = sum(bool(row["dropped"]) for row in logged(run))
    counts["lost"] += lost(run, rounds[-1], keep=1) + (rounds != list(range(1, len(rounds) + 1)))
    print(f"{minutes:g} minutes, {len(rounds)} rounds, {dropped} of them without a client; {counts}")
    for seconds, more, files in grown:
        print(f"  ranks watched for {seconds:.0f} s: {more:+.1f} MiB, {files:+d} open files at most")
    return int(bool(counts["hung"] or counts["lost"] or counts["left over"]))


def _start(folder: Path, resume: bool) -> Job:
    more = ("--federation.on_client_failure", "drop", "--runtime.timeout_s", TIMEOUT_S, "--optim.ema", 0.9)
    return Job(train("run", "usplit", 1_000_000, *more, resume=resume), RANKS, folder, plants.fail_on_signal)


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


def _growth(job: Job, first: dict[int, tuple[float, int]], since: float) -> list[tuple[float, float, int]]:
    now = _use(job)
    both = [(now[p][0] - first[p][0], now[p][1] - first[p][1]) for p in now if p in first]
    if not both:
        return []
    return [(time.monotonic() - since, max(m for m, _ in both), max(f for _, f in both))]
