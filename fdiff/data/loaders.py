"""Processes that read images while the rank trains. They end with their rank, and are waited for with a bound.

Batches come through a pipe and not through shared memory, of which containers have little, and whose sockets need a
short TMPDIR. Images are of 8 bits, or float32 where they hold more, so that the copy is small beside the decoding.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdiff.errors import RunError, UserError, first_line, one_line
from fdiff.runtime import die_with_parent, heed_stop

PATIENCE_S = 300.0  # for one batch, from however slow a file system
TICK_S = 1.0  # between two looks at whether the job is to stop
REMEDY = "read with --data.workers 0, or keep the images in memory with --data.in_memory always"


Read = Callable[[np.ndarray], Tensor]


def load(
    read: Read, name: str, rows: Sequence[np.ndarray], workers: int, patience_s: float = PATIENCE_S
) -> Iterator[Tensor]:
    """What `read` makes of each array of rows (b,) in turn, ahead of time and in so many processes (0: none).

    `name` is that of the images in errors. UserError if an image is unfit, RunError if the processes fail or give
    nothing for `patience_s`, Interrupted if the job is asked to stop meanwhile.
    """
    if not workers:
        yield from map(read, rows)
        return
    loader = DataLoader(
        _Batches(read),
        batch_sampler=rows,
        num_workers=workers,
        collate_fn=_as_it_is,
        timeout=TICK_S,
        worker_init_fn=_end_with(os.getpid()),
        multiprocessing_context="fork",  # the images' list is inherited, not copied
        generator=torch.Generator(),  # or the loader would draw from torch's global one
    )
    others = set(multiprocessing.active_children())
    batches = None
    try:
        with leaving_signals_to_rank():
            batches = iter(loader)
        for _ in rows:
            batch = _next(batches, patience_s)
            if isinstance(batch, Exception):
                raise batch
            yield torch.from_numpy(batch)
    except (RuntimeError, OSError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"loading {name} failed: {first_line(error)}; {REMEDY}") from error
    finally:
        del batches  # those that can end do
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()


@contextmanager
def leaving_signals_to_rank() -> Iterator[None]:
    """Processes started inside inherit what is blocked, from their first moment, and leave it to the rank.

    Launchers signal whole process groups; a process that ended at once would fail the step that is to be finished.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(batches: Iterator[Any], patience_s: float) -> Any:
    began = time.monotonic()
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            if "timed out" not in str(error):  # a process that was killed
                raise
        heed_stop()
        if time.monotonic() - began > patience_s:
            raise RuntimeError(f"its loader processes have given nothing for {patience_s:g} s")


def _end_with(rank: int) -> Any:
    def prepare(worker: int) -> None:
        die_with_parent(rank)

    return prepare


class _Batches(Dataset):
    """Whole batches for a DataLoader. An error is a value: raised in a process of its own it comes with a traceback."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitems__(self, indices: np.ndarray) -> np.ndarray | UserError | RunError:
        try:
            return self._read(indices).numpy()
        except Exception as error:
            return one_line(error)


def _as_it_is(batch: Any) -> Any:
    return batch
