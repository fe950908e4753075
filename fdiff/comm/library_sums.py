"""The backend's own collectives without anything of ours around them: what a measurement is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fdiff.comm.base import Communicator, Sum
from fdiff.comm.mpi import MpiCommunicator


def bare_all_reduce(comm: Communicator) -> Callable[[Tensor], None]:
    """A function that sums a tensor over all ranks, blocking, in place; it watches, counts and names nobody."""
    if isinstance(comm, MpiCommunicator):
        return comm.bare_all_reduce
    return dist.all_reduce


def library_sums(comm: Communicator) -> Callable[[Sequence[Sum]], None]:
    """A function that carries out sums one after the other: torch.distributed's all-reduce, then its broadcast.

    Groups are made when they are first needed, and kept. Weights are not heeding_signals.
    """
    groups: dict[tuple[int, ...], Any] = {}

    def group(ranks: tuple[int, ...]) -> Any:
        if ranks not in groups:
            groups[ranks] = dist.new_group(list(ranks))
        return groups[ranks]

    def carry_out(sums: Sequence[Sum]) -> None:
        for one in sums:
            among, to = group(one.reporters), tuple(sorted((one.reporters[0], *one.receivers)))
            delivery = group(to)
            if comm.rank in one.reporters and len(one.reporters) > 1:
                dist.all_reduce(one.tensor, group=among)
            if comm.rank in to and one.receivers:
                dist.broadcast(one.tensor, one.reporters[0], group=delivery)

    return carry_out
