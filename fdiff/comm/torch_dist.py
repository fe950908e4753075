"""Ranks over torch.distributed: NCCL where every rank has a GPU of its own, gloo otherwise."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdiff.comm.base import Ledger, NoRendezvous, Sum, check_devices
from fdiff.comm.collectives import ANSWER_GRACE_S, Collectives, Groups, PartialSums, aside, uses_ring
from fdiff.comm.meeting import Meeting, meet
from fdiff.comm.store_control import StoreControl
from fdiff.comm.transfers import Transfers
from fdiff.errors import first_line
from fdiff.runtime import Rendezvous

STORE_GRACE_S = 5.0  # beyond its time-out, for the store's client to say by itself what is wrong
NCCL_GRACE_S = 60.0  # NCCL's own watchdog kills the process when its time is up; ours, which can say why, is earlier


class TorchCommunicator(Collectives[Any]):
    """A communicator over a store that all ranks reach and, once `open` made it, the default process group.

    `outlives` names a store that a launcher keeps while it starts the ranks again, `served_by` that launcher; None if
    rank 0 serves the store.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout_s: float,
        partial_sums: PartialSums = "auto",
        outlives: str | None = None,
        served_by: str | None = None,
    ) -> None:
        self.name = "torch"
        self.outlives = outlives
        self.rank, self.size = rank, size
        self.ledger = Ledger()
        self._store, self._timeout_s, self._partial_sums = store, timeout_s, partial_sums
        self._control = StoreControl(store, rank, size, timeout_s, served_by)
        self._groups: Groups[dist.ProcessGroup | int] = Groups(self._create, self._free)
        self._transfers = Transfers(rank, self.ledger)

    def open(self, device: torch.device, share_gpu: bool = False) -> None:
        """See Communicator. NCCL for a GPU of one's own, else gloo. UserError on all if ranks share one unasked."""
        check_devices(self, device, share_gpu)
        nccl = device.type == "cuda" and not share_gpu
        self.name = "nccl" if nccl else "gloo"
        self._ring = uses_ring(self._partial_sums, self.name)

        def start() -> None:
            if nccl:
                torch.cuda.set_device(device)  # of this thread
            dist.init_process_group(
                self.name,
                store=dist.PrefixStore("payload", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=self._patience,
                device_id=device if nccl else None,
            )

        self._control.watch(start, "start of the process group", range(self.size))

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self._timeout_s + (NCCL_GRACE_S if self.name == "nccl" else 0))

    # --- payload

    def _by_ring(self, sums: Sequence[Sum]) -> None:
        what = "all-reduce" if any(len(s.reporters) > 1 for s in sums) else "broadcast"
        with ExitStack() as stages:
            here = [replace(s, tensor=stages.enter_context(self._on_host(s.tensor))) for s in sums]
            members = tuple(sorted({r for s in sums for r in s.ranks}))
            self._control.watch(lambda: self._transfers.carry_out(here, _post, _wait), what, members)

    def _all_reduce(self, tensor: Tensor, group: Any, ranks: tuple[int, ...], largest: bool) -> None:
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._payload(tensor, lambda t: dist.all_reduce(t, operation, group, async_op=True), "all-reduce", ranks)

    def _broadcast(self, tensor: Tensor, source: int, group: Any, ranks: tuple[int, ...]) -> None:
        self._payload(tensor, lambda t: dist.broadcast(t, source, group=group, async_op=True), "broadcast", ranks)

    def bare_all_reduce(self, tensor: Tensor) -> None:
        """See Collectives."""
        dist.all_reduce(tensor)

    def send(self, tensor: Tensor, to: int) -> None:
        """See Communicator."""
        self.ledger.count(tensor.nbytes)
        self._payload(tensor, lambda t: dist.isend(t, to), f"send to rank {to}", (self.rank, to))

    def recv(self, tensor: Tensor, source: int) -> None:
        """See Communicator."""
        self._payload(tensor, lambda t: dist.irecv(t, source), f"receive from rank {source}", (self.rank, source))

    def _payload(
        self, tensor: Tensor, start: Callable[[Tensor], dist.Work | None], what: str, ranks: Sequence[int]
    ) -> None:
        """Start the operation on the tensor, or on a host copy of a GPU tensor where the backend is gloo; see it end.

        Errors, a peer's too, surface here and not in a later call. LostRanks.
        """
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        with self._on_host(tensor) as buffer:

            def run() -> None:
                with torch.cuda.stream(stream):  # current is what is current in a thread; None changes nothing
                    work = start(buffer)
                    assert work is not None  # this rank is a member
                    work.wait()
                    if stream:
                        stream.synchronize()

            self._control.watch(run, what, ranks)

    @contextmanager
    def _on_host(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor itself, or a host copy that is copied back if it is a GPU's and the backend is gloo."""
        if not tensor.is_cuda or self.name == "nccl":
            yield tensor
            return
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        yield buffer
        tensor.copy_(buffer)

    def _group(self, ranks: tuple[int, ...]) -> Any:
        return dist.group.WORLD if len(ranks) == self.size else self._groups.of(ranks)

    def _create(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | int:
        def create() -> dist.ProcessGroup | int:
            return dist.new_group(list(ranks), timeout=self._patience)

        return self._control.watch(create, "creation of a group", range(self.size))

    @staticmethod
    def _free(group: dist.ProcessGroup | int) -> None:
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            dist.destroy_process_group(group)

    # --- control

    def exchange(self, value: bytes) -> list[bytes]:
        """See Communicator."""
        return self._control.exchange(value)

    def close(self) -> None:
        """Wait for the others, then leave."""
        self.exchange(b"")
        if dist.is_initialized():
            dist.destroy_process_group()
        self._control.leave()

    def abort(self) -> None:
        """Tell the others; a process group in which something hangs ends only with the process."""
        self._control.leave(failed=True)


def _post(sends: bool, tensor: Tensor, rank: int) -> dist.Work:
    work = dist.isend(tensor, rank) if sends else dist.irecv(tensor, rank)
    assert work is not None  # this rank is a member of the world
    return work


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def meet_at(place: Rendezvous, rank: int, size: int, timeout_s: float) -> Meeting:
    """Meet the other ranks in a store at a rendezvous, open to this node alone if its address is; see `meeting`.

    NoRendezvous if nobody serves it in time, or if what is there does not answer.
    """
    where, began = f"{place.address}:{place.port}", time.monotonic()
    limit_s = timeout_s + ANSWER_GRACE_S + STORE_GRACE_S

    def look() -> None:
        if time.monotonic() - began > limit_s:
            raise NoRendezvous(f"no rendezvous at {where}: something there takes connections and does not answer")

    try:
        return aside(lambda: meet(_tcp_store(place, size, timeout_s), rank, size, place.job, timeout_s), look)
    except (dist.DistError, OSError) as error:
        raise NoRendezvous(f"no rendezvous at {where}: {first_line(error)}") from error


def _tcp_store(place: Rendezvous, size: int, timeout_s: float) -> dist.Store:
    """The bare store; where it is this process that serves it, on the interface of the address only."""
    alone = place.serve and place.address == "127.0.0.1"
    return dist.TCPStore(
        place.address,
        place.port,
        size,
        is_master=place.serve,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=_loopback_listener(place.port).detach() if alone else None,
    )


def _loopback_listener(port: int) -> socket.socket:
    """TCPStore by itself would listen on every interface."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(socket.SOMAXCONN)
    return listener
