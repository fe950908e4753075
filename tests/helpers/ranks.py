"""Ranks as real processes that meet over a file: `run_ranks(fn, world_size, tmp_path)` calls `fn(comm)` on each."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_jobs import free_port
from warm_server import PROCESSES

from fdiff import federation
from fdiff.comm.base import Communicator
from fdiff.comm.torch_dist import TorchCommunicator, meet_at
from fdiff.config import Config
from fdiff.runtime import Rendezvous


@dataclass
class End:
    """How a rank ended: exit status (None: it was killed here), `fn`'s result or error, when it ended or stopped."""

    status: int | None = None
    result: Any = None
    error: str = ""
    lost: tuple[int, ...] = ()
    trace: str = ""
    at: float = 0.0


def run_ranks(
    fn: Callable[[Communicator], Any], world_size: int, tmp_path: Path, timeout_s: float = 60, patience_s: float = 30
) -> list[Any]:
    """What `fn`, a function of a module, returns on each rank; a rank's traceback is raised here.

    The communicators wait `patience_s` for each other; after `timeout_s` all ranks are killed.
    """
    ends = end_ranks(fn, world_size, tmp_path, timeout_s, patience_s)
    for rank, end in enumerate(ends):
        assert not end.trace, f"rank {rank}:\n{end.trace}"
    assert [end.status for end in ends] == [0] * world_size
    return [end.result for end in ends]


def train_in_turn(configs: Sequence[Config], ranks: int, tmp_path: Path, resume: bool = False) -> None:
    """Train each configuration on so many ranks, which are started once and not for each."""
    run_ranks(partial(_train_in_turn, configs, resume), ranks, tmp_path, timeout_s=240, patience_s=60)


def _train_in_turn(configs: Sequence[Config], resume: bool, comm: Communicator) -> None:
    for config in configs:
        federation.run(config, comm, torch.device("cpu"), resume)


def end_ranks(
    fn: Callable[[Communicator], Any],
    world_size: int,
    tmp_path: Path,
    timeout_s: float = 60,
    patience_s: float = 30,
    rank_0_serves: bool = False,
) -> list[End]:
    """Like `run_ranks`, but tells how each rank ended, for tests in which some do not end well.

    With `rank_0_serves` the ranks meet as in a real job, through a TCP store in rank 0's process.
    """
    place: str | int = free_port() if rank_0_serves else str(Path(tempfile.mkdtemp(dir=tmp_path)) / "store")
    began = time.monotonic()
    ranks = [_start(fn, rank, world_size, place, patience_s) for rank in range(world_size)]
    ends = [End() for _ in ranks]
    running = set(range(world_size))
    while any(not _stopped(ranks[r][0]) for r in running) and time.monotonic() - began < timeout_s:
        for rank in list(running):
            process, pipe = ranks[rank]
            over = not process.is_alive()  # asked first: what it sent before its end is then there
            with contextlib.suppress(EOFError):
                if pipe.poll():
                    ends[rank].result, ends[rank].error, ends[rank].lost, ends[rank].trace = pipe.recv()
            if (over or _stopped(process)) and not ends[rank].at:
                ends[rank].at = time.monotonic()
            if over:
                ends[rank].status = process.exitcode
                running.remove(rank)
        time.sleep(0.02)
    for rank in running:
        ranks[rank][0].kill()
        ranks[rank][0].join()
    return ends


def _stopped(process: BaseProcess) -> bool:
    """Whether it got SIGSTOP and will not end by itself."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _start(
    fn: Callable[[Communicator], Any], rank: int, size: int, place: str | int, patience_s: float
) -> tuple[BaseProcess, Connection]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_child, args=(fn, rank, size, place, patience_s, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _child(
    fn: Callable[[Communicator], Any], rank: int, size: int, place: str | int, patience_s: float, pipe: Connection
) -> None:
    """Ends as the command line does: closes after success, aborts after failure."""
    torch.set_num_threads(1)
    if isinstance(place, int):
        store = meet_at(Rendezvous("127.0.0.1", place, rank == 0, "a test"), rank, size, patience_s).store
    else:
        store = dist.FileStore(place, size)
    comm = TorchCommunicator(store, rank, size, patience_s)
    try:
        comm.open(torch.device("cpu"))
        pipe.send((fn(comm), "", (), ""))
        comm.close()
    except BaseException as error:
        pipe.send((None, str(error), getattr(error, "ranks", ()), traceback.format_exc()))
        comm.abort()
        os._exit(1)
