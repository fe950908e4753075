"""Ranks over torch.distributed: NCCL where every rank has a GPU of its own, gloo otherwise."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdiff.comm.base import Ledger, Sum, check_devices
from fdiff.comm.collectives import Collectives, Groups, PartialSums, uses_ring
from fdiff.comm.store_control import StoreControl
from fdiff.comm.transfers import Transfers
from fdiff.errors import RunError

NCCL_GRACE_S = 60.0  # NCCL's own watchdog kills the process when its time is up; ours, which can say why, is earlier


class TorchCommunicator(Collectives[Any]):
    """A communicator over a store that all ranks reach and, once `open` made it, the default process group."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout_s: float, partial_sums: PartialSums = "auto"
    ) -> None:
        self.name = "torch"
        self.rank, self.size = rank, size
        self.ledger = Ledger()
        self._store, self._timeout_s, self._partial_sums = store, timeout_s, partial_sums
        self._control = StoreControl(store, rank, size, timeout_s)
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

    def _all_reduce(self, tensor: Tensor, group: Any, ranks: tuple[int, ...]) -> None:
        self._payload(tensor, lambda t: dist.all_reduce(t, group=group, async_op=True), "all-reduce", ranks)

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


def tcp_store(address: str, port: int, serve: bool, attempt: str, size: int, timeout_s: float) -> dist.Store:
    """The store at a rendezvous, open to this node alone if its address is; RunError if nobody serves it in time."""
    try:
        listener = _loopback_listener(port) if serve and address == "127.0.0.1" else None
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=serve,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (RuntimeError, OSError) as error:
        raise RunError(f"no rendezvous at {address}:{port}: {str(error).splitlines()[0]}") from error
    return dist.PrefixStore(f"fdiff/{attempt}", store)


def _loopback_listener(port: int) -> socket.socket:
    """TCPStore by itself would listen on every interface."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(socket.SOMAXCONN)
    return listener
