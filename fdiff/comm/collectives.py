"""What the implementations of the communicator share: the cache of groups, collectives, messages of many values."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from fdiff.comm.base import Ledger, Sum
from fdiff.errors import RunError, UserError

GROUPS_KEPT = 16  # a USPLIT run draws new pairs each round, and every group costs sockets and, with NCCL, memory
ROLL_CALL_S = 4.0  # how long a rank in trouble waits for a sign of life of those that it was talking to
ANSWER_GRACE_S = 2.0  # how long the others wait for rank 0's answer beyond the time-out itself
LINGER_S = 1.0  # how long a rank that failed stays, so that its end does not end the one that is to say why

RING_BY_DEFAULT = ("gloo", "mpi")  # where the library's own calls were measured to be slower: see README.md
TICK_S = 0.5  # between two looks at the others, of a rank whose operation runs aside

PartialSums = Literal["auto", "library", "ring"]
T = TypeVar("T")  # what a backend takes for a group of ranks
R = TypeVar("R")


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


class Collectives(ABC, Generic[T]):
    """Sums from a backend's own all-reduce and broadcast, or from its sends and receives: see `schedule`.

    Where every rank reports, the library's all-reduce; where some only receive, the ring if `_ring`, the same on all
    ranks.
    """

    rank: int
    size: int
    ledger: Ledger
    _ring: bool

    def combine(self, sums: Sequence[Sum]) -> None:
        """See Communicator."""
        sums = [s for s in sums if len(s.ranks) > 1]
        if any(self.rank in s.ranks for s in sums):
            self.ledger.count(0)  # who only receives needs a purpose too, or it would wait for those that have none
        for one in sums:
            if not self._goes_round(one):
                self.by_library(one)
        if mine := [s for s in sums if self._goes_round(s) and self.rank in s.ranks]:
            self._by_ring(mine)

    def _goes_round(self, one: Sum) -> bool:
        return self._ring and len(one.reporters) < self.size

    def by_library(self, one: Sum) -> None:
        """A sum by the backend's all-reduce among its reporters, then its broadcast from the first to the receivers.

        Every rank calls it, also one that has no part in the sum. LostRanks.
        """
        reporters, receivers, tensor = one.reporters, one.receivers, one.tensor
        if self.rank in reporters and one.weight(self.rank) != 1:
            tensor.mul_(one.weight(self.rank))
        if len(reporters) > 1:
            group = self._group(reporters)
            if self.rank in reporters:
                self.ledger.count(2 * (len(reporters) - 1) / len(reporters) * tensor.nbytes)
                self._all_reduce(tensor, group, reporters, one.largest)
        if receivers:
            to = tuple(sorted((reporters[0], *receivers)))
            group = self._group(to)
            if self.rank in to:
                self.ledger.count(len(receivers) / len(to) * tensor.nbytes)
                self._broadcast(tensor, reporters[0], group, to)

    @abstractmethod
    def _by_ring(self, sums: Sequence[Sum]) -> None:
        """Carry out sums in all of which this rank takes part, all at once."""

    @abstractmethod
    def _group(self, ranks: tuple[int, ...]) -> T:
        """The backend's group of these ranks; every rank asks for it."""

    @abstractmethod
    def bare_all_reduce(self, tensor: Tensor) -> None:
        """The backend's blocking all-reduce over all ranks, to be measured: it watches, counts and names nobody."""

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, group: T, ranks: tuple[int, ...], largest: bool) -> None:
        """The backend's all-reduce, in place, in the group of these ranks, of which this is one; LostRanks.

        Of the sum, or of the `largest`.
        """

    @abstractmethod
    def _broadcast(self, tensor: Tensor, source: int, group: T, ranks: tuple[int, ...]) -> None:
        """The backend's broadcast, in place, in the group of these ranks, of which this is one; LostRanks."""

    def all_reduce(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """See Communicator."""
        self.combine([Sum(tensor, tuple(ranks))])

    def broadcast(self, tensor: Tensor, source: int, ranks: Sequence[int]) -> None:
        """See Communicator."""
        self.combine([Sum(tensor, (source,), tuple(r for r in ranks if r != source))])


def uses_ring(partial_sums: PartialSums, backend: str) -> bool:
    """Whether sums that only some report go round our own ring; UserError if the backend has none, on every rank."""
    if partial_sums == "ring" and backend == "nccl":
        error = UserError("runtime.partial_sums: 'ring' is for gloo and MPI, not for NCCL; use auto or library")
        error.agreed = True
        raise error
    return partial_sums == "ring" or (partial_sums == "auto" and backend in RING_BY_DEFAULT)


def aside(operation: Callable[[], R], look: Callable[[], None]) -> R:
    """Run the operation in a thread of its own, with a look at the world every TICK_S; its result, or its error.

    If the look raises, so does this; the thread is left behind, and ends with the process at the latest.
    """
    ended: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((operation(), None))
        except BaseException as error:  # whatever it is, it is the caller's
            ended.put((None, error))

    thread = threading.Thread(target=run, name="fdiff-comm", daemon=True)
    thread.start()
    while True:
        lives = thread.is_alive()  # asked first: what it leaves is then there
        try:
            result, error = ended.get(timeout=TICK_S) if lives else ended.get_nowait()
        except queue.Empty:
            if not lives:
                raise RunError("a helper thread has died without a word; memory may be short") from None
            look()
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


class Call(NamedTuple):
    """What a rank says in a roll call: for whom it waits, `what` to say of a lost one, the `reason` if none is.

    In an exchange there is no reason: those who are late are to blame even if they live. A rank that `joins` waits for
    them too, but not yet in vain.
    """

    ranks: Sequence[int] = ()
    what: str = ""
    reason: str = ""
    joins: bool = False


JOINS = Call(joins=True)  # for nobody whom it could name


def find_lost(calls: Sequence[Call], alive: Collection[int]) -> tuple[list[int], str]:
    """Who is lost, and what to say of them; nobody, and what went wrong, if an operation failed among the living.

    If all live for whom a rank waited in vain, then those are lost for whom they wait: it may be a chain. Ranks for
    which nobody waits may be silent because they are busy.
    """
    calls = sorted(calls, key=lambda call: call.joins)
    in_vain = [call for call in calls if not call.joins]
    lost = {r for call in in_vain for r in call.ranks} - set(alive)
    lost = lost or {r for call in calls for r in call.ranks} - set(alive)
    lost = lost or {r for call in in_vain for r in call.ranks if not call.reason}
    if not lost:
        return [], next((call.reason for call in in_vain if call.reason), "another rank gave up")
    return sorted(lost), next(call.what for call in calls if lost & set(call.ranks))


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
