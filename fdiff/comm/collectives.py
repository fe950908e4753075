"""What the implementations of the communicator share: the cache of groups, collectives, messages of many values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fdiff.comm.base import Sum
from fdiff.comm.neighbours import Neighbours

GROUPS_KEPT = 16  # a USPLIT run draws new pairs each round, and every group costs sockets and, with NCCL, memory
ROLL_CALL_S = 4.0  # how long a rank in trouble waits for a sign of life of those that it was talking to
ANSWER_GRACE_S = 2.0  # how long the others wait for rank 0's answer beyond the time-out itself
LINGER_S = 1.0  # how long a rank that failed stays, so that its end does not end the one that is to say why

T = TypeVar("T")


class Groups(Generic[T]):
    """The communicators of subsets of ranks, the most recently used ones; the others are freed.

    Every rank of the world asks for the same groups in the same order, members or not: creating and freeing are
    collective. If two ranks created the groups of two parts in opposite order, each would wait in its first creation
    for the other, for ever; if two freed different ones, they would disagree on what still has to be created.
    """

    def __init__(self, create: Callable[[tuple[int, ...]], T], free: Callable[[T], None]) -> None:
        self._create, self._free = create, free
        self._kept: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def of(self, ranks: Sequence[int]) -> T:
        """The group of these ranks, from the cache or new."""
        key = tuple(ranks)
        if key not in self._kept:
            if len(self._kept) >= GROUPS_KEPT:
                self._free(self._kept.popitem(last=False)[1])
            self._kept[key] = self._create(key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Free all."""
        while self._kept:
            self._free(self._kept.popitem(last=False)[1])


class Collectives:
    """What follows from `combine`, and from who the neighbours are."""

    _neighbours: Neighbours

    def allocate(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Communicator."""
        on_host = device.type == "cpu"
        return self._neighbours.allocate(size, dtype) if on_host else torch.empty(size, dtype=dtype, device=device)

    def combine(self, sums: Sequence[Sum]) -> None:
        """See Communicator."""
        raise NotImplementedError

    def all_reduce(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """See Communicator."""
        self.combine([Sum(tensor, tuple(ranks))])

    def broadcast(self, tensor: Tensor, source: int, ranks: Sequence[int]) -> None:
        """See Communicator."""
        self.combine([Sum(tensor, (source,), tuple(r for r in ranks if r != source))])


def find_lost(alarms: Sequence[tuple[list[int], str, str]], alive: Collection[int]) -> tuple[list[int], str]:
    """Who is lost, and what to say of them; nobody, and what went wrong, if an operation failed among the living.

    `alarms` has the ranks that somebody waited for in vain, what to say of a lost one, and the reason why the operation
    failed: none in an exchange, where those who are late are to blame even if they live. Ranks for which nobody waits
    may be silent because they are busy.
    """
    lost = {r for awaited, _, _ in alarms for r in awaited} - set(alive)
    lost = lost or {r for awaited, _, reason in alarms for r in awaited if not reason}
    if not lost:
        return [], next((reason for _, _, reason in alarms if reason), "another rank gave up")
    return sorted(lost), next(what for awaited, what, _ in alarms if lost & set(awaited))


def pack(values: Iterable[bytes]) -> bytes:
    """One message of several values."""
    return b"".join(len(v).to_bytes(8, "little") + v for v in values)


def unpack(packed: bytes) -> list[bytes]:
    """The inverse of `pack`."""
    values: list[bytes] = []
    at = 0
    while at < len(packed):
        end = at + 8 + int.from_bytes(packed[at : at + 8], "little")
        values.append(packed[at + 8 : end])
        at = end
    return values
