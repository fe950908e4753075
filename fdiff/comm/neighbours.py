"""Memory that the ranks of one node read of each other: what one sends another is then only where to look.

It is a file without a name (memfd), which the others open through /proc: nothing is left of it when its processes end,
however they end. Ranks count as of one node if they share its kernel, its network and the sight of each other's
processes; those for which it is not so, and systems that have no such files, send messages.
"""

from __future__ import annotations

import mmap
import os
import secrets
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fdiff.comm.base import Communicator, exchange_json

PLACE = 3  # numbers that say where: the file's descriptor in its owner's process, the file's id, the offset in bytes

# What is mapped from another rank is only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


class Neighbours:
    """The ranks of this node, none before they `meet`, and the memory that they show each other."""

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}
        self._own: dict[int, tuple[int, int, int]] = {}  # descriptor: address, bytes, id
        self._mapped: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}

    def meet(self, comm: Communicator) -> None:
        """Find out who can read whose memory; every rank calls it."""
        self._processes = {}
        try:
            word = secrets.token_bytes(16)
            probe = self._shared(len(word), torch.uint8)
        except (OSError, AttributeError):  # a system without memfd
            exchange_json(comm, None)
            exchange_json(comm, [])
            return
        probe.copy_(torch.frombuffer(bytearray(word), dtype=torch.uint8))
        everyone = exchange_json(comm, [_node(), os.getpid(), self.place(probe), word.hex()])
        self._processes = {r: them[1] for r, them in enumerate(everyone) if them and them[0] == _node()}
        seen = [r for r in self._processes if r != comm.rank and self._sees(r, everyone[r], probe)]
        others = exchange_json(comm, seen)
        self._processes = {r: self._processes[r] for r in seen if comm.rank in others[r]}

    def _sees(self, rank: int, them: Sequence[object], like: Tensor) -> bool:
        _, _, place, word = them
        try:
            return bytes(self.view(rank, place, like).tolist()).hex() == word  # type: ignore[arg-type]
        except (OSError, ValueError):
            return False

    def __contains__(self, rank: int) -> bool:
        return rank in self._processes

    def __len__(self) -> int:
        return len(self._processes)

    def allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory (size,) on the host, not initialised, which neighbours can read, if there are any."""
        return self._shared(size, dtype) if self._processes and size else torch.empty(size, dtype=dtype)

    def _shared(self, size: int, dtype: torch.dtype) -> Tensor:
        descriptor = os.memfd_create("fdiff")
        try:
            os.ftruncate(descriptor, size * dtype.itemsize)
            memory = mmap.mmap(descriptor, size * dtype.itemsize)
        except BaseException:
            os.close(descriptor)
            raise
        tensor = torch.frombuffer(memory, dtype=dtype)
        self._own[descriptor] = tensor.data_ptr(), tensor.nbytes, os.fstat(descriptor).st_ino
        weakref.finalize(memory, self._forget, descriptor)
        return tensor

    def _forget(self, descriptor: int) -> None:
        del self._own[descriptor]
        os.close(descriptor)

    def place(self, tensor: Tensor) -> list[int] | None:
        """Where neighbours find a tensor that lies in memory from `allocate`; None if it does not."""
        address = tensor.data_ptr()
        for descriptor, (start, size, file) in list(self._own.items()):  # memory may be given back meanwhile
            if start <= address and address + tensor.nbytes <= start + size:
                return [descriptor, file, address - start]
        return None

    def view(self, rank: int, place: Sequence[int], like: Tensor) -> Tensor:
        """A neighbour's memory at that place, with the shape (n,) and dtype of `like`, to be read only. OSError."""
        descriptor, file, offset = place
        known = self._mapped.get((rank, descriptor))
        if known is None or known[0] != file:  # a number that is used again
            known = self._mapped[rank, descriptor] = file, _map(self._processes[rank], descriptor, file)
        return torch.frombuffer(known[1], dtype=like.dtype, count=like.numel(), offset=offset)


def _map(process: int, descriptor: int, file: int) -> mmap.mmap:
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(opened)
        if found.st_ino != file:
            raise OSError(f"process {process} no longer shows the memory that it named")
        return mmap.mmap(opened, found.st_size, prot=mmap.PROT_READ)
    finally:
        os.close(opened)


def _node() -> str:
    """Equal where processes run under one kernel and in one network; a network of one's own stands for another node."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return secrets.token_hex(16)
