"""The backend's own all-reduce without anything of ours around it: what a measurement is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from fdiff.comm.base import Communicator
from fdiff.comm.mpi import MpiCommunicator


def bare_all_reduce(comm: Communicator) -> Callable[[Tensor], None]:
    """A function that sums a tensor over all ranks, blocking, in place; it watches, counts and names nobody."""
    if isinstance(comm, MpiCommunicator):
        return comm.bare_all_reduce
    return dist.all_reduce
