"""Committing a checkpoint: how long it takes, beside writing and syncing as many bytes to one file; and how long the
training stands still for it, beside what it may.

Eight clients that keep private parts (UDEC). The stall is what rounds take longer when each is committed, while their
training, a fixed amount of work in one thread, goes on for longer than a commit takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import ceil
from pathlib import Path

import numpy as np
import torch

from fdiff import checkpoint
from fdiff.bench import no_training
from fdiff.bench.measure import Result, compare, in_turns, slowest
from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config
from fdiff.federation import Federation

CLIENTS, WIDTHS = 8, (64, 128)  # 14.9 and 58.4 million parameters of the paper's model
COMMITS, STALLS, WARMUP = 5, 9, 2
REST_S = 2.5
ALLOWED_STALL_S = 0.06 / 377e6  # a byte
PIECE = 2**23


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Commit time and stall of two widths."""
    config = replace(config, method="udec")
    cases = [replace(config, model=replace(config.model, dim=dim)) for dim in WIDTHS]
    return [result for case in cases for result in _measure(case, comm, device)]


def _measure(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    with no_training.federation(no_training.quiet(config, CLIENTS), comm, device) as federation:
        play, run_dir = _player(federation), federation.config.run_dir
        play()
        size = _bytes_of(federation, comm)
        commit, bound = _commits(federation, play, comm, _writer(run_dir.parent / "bound", size, comm))
        stall = _stalls(federation, play, comm, device, max(commit))
    parameters = sum(federation.rank.host.trainer.buckets.sizes.values())
    name = f"{parameters / 1e6:.1f} M parameters, {CLIENTS} clients, {size / 1e6:.0f} MB"
    return [
        compare(f"commit, {name}", commit, bound, "bound", "s"),
        compare(f"stall, {name}", stall, [ALLOWED_STALL_S * size], "bound", "s"),
    ]


def _player(federation: Federation) -> Callable[[], None]:
    rounds = count(1)
    return lambda: federation.round(next(rounds))


def _bytes_of(federation: Federation, comm: Communicator) -> int:
    """Bytes of all arrays of a checkpoint, of all ranks."""
    held = federation.commits.prepared
    assert held is not None
    arrays = [a for client in held.clients.values() for a in client.values()]
    arrays += list(held.whole[0].values()) if held.whole else []
    return sum(exchange_json(comm, sum(a.nbytes for a in arrays)))


def _commits(
    federation: Federation, play: Callable[[], None], comm: Communicator, write: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of commits and of the bound, in turns; a commit's begins when its round is over."""
    commits, bounds = [], []
    for turn in range(-WARMUP, COMMITS):
        play()
        _rest(comm)
        began = time.perf_counter()
        federation.commits.start()
        federation.commits.finish()
        committed = time.perf_counter() - began
        _rest(comm)
        began = time.perf_counter()
        write()
        if turn >= 0:
            commits.append(committed)
            bounds.append(time.perf_counter() - began)
    taken = slowest(comm, {"commit": commits, "bound": bounds})
    return taken["commit"], taken["bound"]


def _rest(comm: Communicator) -> None:
    """As between two rounds: until what came of the last turn is over.

    A file system frees what was removed after a while, and a virtual machine gives free memory back to its host: right
    after a removal the disk is slower and memory is warmer.
    """
    os.sync()
    time.sleep(REST_S)
    comm.exchange(b"")


def _writer(path: Path, size: int, comm: Communicator) -> Callable[[], None]:
    """A function that does, on rank 0, with one plain file of so many bytes what a commit does with its files.

    It writes them, in large pieces from warm memory, to a new file, syncs that, and puts it in the old one's place.
    """
    new = path.with_suffix(".new")
    piece = np.random.default_rng(0).integers(0, 256, PIECE, dtype=np.uint8)

    def write() -> None:
        if comm.rank != 0:
            return
        with new.open("xb", buffering=0) as file:
            for start in range(0, size, PIECE):
                file.write(piece[: size - start])
            os.fsync(file.fileno())
        os.replace(new, path)
        checkpoint.sync_folder(path.parent)

    return write


def _stalls(
    federation: Federation, play: Callable[[], None], comm: Communicator, device: torch.device, commit_s: float
) -> list[float]:
    """By how many seconds a round is longer when the one before it is committed meanwhile."""

    def committed() -> None:
        federation.commits.start()
        play()
        federation.commits.finish()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a GPU, whose host waits: with all cores busy it would show who shares them
    try:
        federation.rank.host.trainer.train = _working(federation, 2 * commit_s)  # type: ignore[method-assign]
        taken = in_turns({"committed": committed, "plain": play}, comm, device, STALLS)
    finally:
        torch.set_num_threads(threads)
    return [longer - plain for longer, plain in zip(taken["committed"], taken["plain"], strict=True)]


def _working(federation: Federation, seconds: float) -> Callable[..., object]:
    """A training that is a fixed number of matrix products, about so many seconds of them in a round on this rank."""
    matrix = torch.ones(256, 256)
    report = federation.rank.host.trainer.train

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    work(100)
    began = time.perf_counter()
    work(1000)
    each_s = (time.perf_counter() - began) / 1000
    times = ceil(seconds / each_s / len(federation.rank.host.clients))

    def train(*arguments: object) -> object:
        work(times)
        return report(*arguments)  # type: ignore[arg-type]

    return train
