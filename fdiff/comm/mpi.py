"""Ranks over MPI, through mpi4py: its all-reduce and broadcast, in place on the tensors' memory.

Where the library lets threads call it (MPI_THREAD_MULTIPLE), a blocking call has a thread of its own, which is watched;
else a call that does not block is tested again and again.

GPU tensors are handed over by their device pointers if the library says that it is CUDA-aware, else they travel
through one pinned host buffer, which is kept and grows to what one call needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiff.comm.base import Ledger, Sum, check_devices, exchange_json
from fdiff.comm.collectives import LINGER_S, Collectives, Groups, PartialSums, R, uses_ring
from fdiff.comm.mpi_control import MpiControl
from fdiff.comm.mpi_library import library_name, start_mpi, takes_device_pointers
from fdiff.comm.transfers import Transfers
from fdiff.runtime import Launch, Rendezvous

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**30  # before MPI-4 counts are C ints; and some libraries of that time multiply them as such
ALIGNMENT = 64  # bytes
SUM_TAG, TENSOR_TAG = 4, 5

_TYPES = {
    torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.uint8: "UINT8_T", torch.int32: "INT32_T",
    torch.int64: "INT64_T",
}  # fmt: skip


class MpiCommunicator(Collectives[Any]):
    """A communicator over MPI_COMM_WORLD. UserError if MPI is missing or its world is not the launcher's."""

    name = "mpi"
    outlives = None

    def __init__(self, launch: Launch, timeout_s: float, partial_sums: PartialSums = "auto") -> None:
        self._MPI = start_mpi(launch)
        self._world = self._MPI.COMM_WORLD.Dup()
        self._control = MpiControl(self._MPI, self._MPI.COMM_WORLD.Dup(), timeout_s)
        self.rank, self.size = launch.rank, launch.size
        self.ledger = Ledger()
        self._ring = uses_ring(partial_sums, self.name)
        self._groups: Groups[Intracomm | None] = Groups(self._create, self._free)
        self._transfers = Transfers(self.rank, self.ledger)
        self._blocks = self._MPI.Query_thread() == self._MPI.THREAD_MULTIPLE
        self._device_pointers = False
        self._host, self._host_taken = torch.empty(0, dtype=torch.uint8), 0
        self._chunk_bytes = CHUNK_BYTES if self._MPI.Get_version() < (4, 0) else sys.maxsize

    def open(self, device: torch.device, share_gpu: bool = False) -> None:
        """See Communicator. UserError on all ranks if two share a GPU unasked."""
        check_devices(self, device, share_gpu)
        self._blocks = all(exchange_json(self, self._blocks))  # the two kinds of calls do not match each other
        if device.type == "cuda":
            self._device_pointers = takes_device_pointers(self._MPI)
            way = "by device pointer" if self._device_pointers else "through pinned host memory (it is not CUDA-aware)"
            log.info("%s moves GPU tensors %s", library_name(self._MPI), way)

    # --- payload

    def _by_ring(self, sums: Sequence[Sum]) -> None:
        what = "all-reduce" if any(len(s.reporters) > 1 for s in sums) else "broadcast"
        members = tuple(sorted({r for s in sums for r in s.ranks}))
        with ExitStack() as stages, self._control.naming_errors(what):
            here = [replace(s, tensor=stages.enter_context(self._reachable(s.tensor))) for s in sums]
            self._transfers.carry_out(here, self._post, lambda requests: self._control.wait(requests, what, members))

    def _all_reduce(self, tensor: Tensor, group: Intracomm, ranks: tuple[int, ...], largest: bool) -> None:
        reduce = group.Allreduce if self._blocks else group.Iallreduce
        operation = self._MPI.MAX if largest else self._MPI.SUM

        def call(memory: list[Any]) -> Request | None:
            return reduce(self._MPI.IN_PLACE, memory, operation)

        with self._reachable(tensor) as buffer:
            self._each_chunk(buffer, call, "all-reduce", ranks, self._blocks)

    def _broadcast(self, tensor: Tensor, source: int, group: Intracomm, ranks: tuple[int, ...]) -> None:
        call, root = group.Bcast if self._blocks else group.Ibcast, ranks.index(source)
        with self._reachable(tensor) as buffer:
            self._each_chunk(buffer, lambda memory: call(memory, root), "broadcast", ranks, self._blocks)

    def _group(self, ranks: tuple[int, ...]) -> Any:
        return self._world if len(ranks) == self.size else self._groups.of(ranks)

    def _create(self, ranks: tuple[int, ...]) -> Intracomm | None:
        if self.rank not in ranks:
            return None
        return self._calling(lambda: self._world.Create_group(self._world.Get_group().Incl(ranks)), ranks)

    def _free(self, group: Intracomm | None) -> None:
        if group is not None:
            self._calling(group.Free, range(self.size))

    def _calling(self, call: Callable[[], R], ranks: Sequence[int]) -> R:
        """A call that has no form that does not block: watched where threads may call."""
        return self._control.watch(call, "creation of a group", ranks) if self._blocks else call()

    def _post(self, sends: bool, tensor: Tensor, rank: int) -> Request:
        memory = self._memory(tensor)
        return self._world.Isend(memory, rank, SUM_TAG) if sends else self._world.Irecv(memory, rank, SUM_TAG)

    def _memory(self, tensor: Tensor) -> list[Any]:
        memory = self._MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return [memory, tensor.numel(), getattr(self._MPI, _TYPES[tensor.dtype])]

    def send(self, tensor: Tensor, to: int) -> None:
        """See Communicator."""
        self.ledger.count(tensor.nbytes)
        with self._reachable(tensor, store=False) as buffer:
            pair = (self.rank, to)
            self._each_chunk(buffer, lambda b: self._world.Isend(b, to, TENSOR_TAG), f"send to rank {to}", pair)

    def recv(self, tensor: Tensor, source: int) -> None:
        """See Communicator."""
        with self._reachable(tensor, load=False) as buffer:
            pair, what = (self.rank, source), f"receive from rank {source}"
            self._each_chunk(buffer, lambda b: self._world.Irecv(b, source, TENSOR_TAG), what, pair)

    @contextmanager
    def _reachable(self, tensor: Tensor, load: bool = True, store: bool = True) -> Iterator[Tensor]:
        """The tensor where MPI can read and write it: itself, or a host copy, `load`ed before and `store`d after."""
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of strides {tensor.stride()} is not contiguous")
        if self._in_place(tensor):
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()  # MPI does not wait for kernels
            yield tensor
            return
        with self._on_host(tensor) as buffer:
            if load:
                buffer.copy_(tensor)
            yield buffer
            if store:
                tensor.copy_(buffer)

    @contextmanager
    def _on_host(self, tensor: Tensor) -> Iterator[Tensor]:
        """Room for the tensor in the host buffer, behind that of others; given back in the reverse order."""
        start = self._host_taken
        end = start + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > self._host.numel():  # who has room in the old one keeps that alive
            self._host = torch.empty(end, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        self._host_taken = end
        try:
            yield self._host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        finally:
            self._host_taken = start

    def _in_place(self, tensor: Tensor) -> bool:
        return not tensor.is_cuda or self._device_pointers

    def _each_chunk(
        self,
        tensor: Tensor,
        call: Callable[[list[Any]], Request | None],
        what: str,
        ranks: Sequence[int],
        blocks: bool = False,
    ) -> None:
        """Run an operation on the tensor's memory, in as many pieces as the library's counts need.

        One that `blocks` has a thread of its own.
        """
        flat = tensor.view(-1)
        pieces = [self._memory(piece) for piece in flat.split(max(1, self._chunk_bytes // flat.itemsize))]

        def run() -> None:
            if tensor.is_cuda:
                torch.cuda.set_device(tensor.device)  # of this thread
            for piece in pieces:
                call(piece)

        if blocks:
            self._control.watch(run, what, ranks)
            return
        for piece in pieces:
            with self._control.naming_errors(what):
                request = call(piece)
            self._control.wait([request], what, ranks)

    def bare_all_reduce(self, tensor: Tensor) -> None:
        """See Collectives."""
        with self._reachable(tensor) as buffer:
            self._world.Allreduce(self._MPI.IN_PLACE, self._memory(buffer))

    # --- control

    def exchange(self, value: bytes) -> list[bytes]:
        """See Communicator."""
        return self._control.exchange(value)

    def close(self) -> None:
        """Wait for the others; MPI itself ends with the process."""
        self.exchange(b"")

    def abort(self) -> None:
        """End all ranks, this one too, with status 1; those that MPI cannot reach any more are mpirun's to kill."""
        time.sleep(LINGER_S)
        with contextlib.suppress(OSError):  # a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
        self._MPI.COMM_WORLD.Abort(1)


# --- a meeting place for torch.distributed -------------------------------------------------------------------------


def agree_on_rendezvous(launch: Launch, timeout_s: float) -> Rendezvous:
    """A free port on rank 0's node and an id of this run, which MPI tells to all; MPI is then done, and finalised.

    UserError as for MpiCommunicator. LostRanks if one does not answer in time.
    """
    MPI = start_mpi(launch)
    address = "127.0.0.1" if launch.one_node else reachable_address()
    with socket.socket() as listener:
        listener.bind((address, 0))
        mine = [address, listener.getsockname()[1], secrets.token_hex(8)]
    control = MpiControl(MPI, MPI.COMM_WORLD, timeout_s)
    address, port, run = json.loads(control.exchange(json.dumps(mine).encode())[0])
    # While MPI is up a rank cannot end without all others, and from here on torch.distributed decides on that.
    MPI.Finalize()
    return Rendezvous(address, port, launch.rank == 0, run)


def reachable_address() -> str:
    """An address of this node by which others reach it: what its name stands for, else the one towards the network."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect(("192.0.2.1", 9))  # of a network that is nobody's; nothing is sent
        return str(towards.getsockname()[0])
    return socket.gethostname()
