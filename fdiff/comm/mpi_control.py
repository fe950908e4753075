"""The control plane over MPI, and how any operation of MPI is waited for: with a time-out, and naming who is missing.

In the control plane nothing blocks: operations are started and tested, first yielding only, then with sleeps that grow
with the wait, so that ranks that wait leave the cores to those that still compute. A blocking call spins instead; those
of the payload, which begin when a vote has brought all ranks together, have a thread of their own (`watch`), from which
this one looks up now and then. Without MPI_THREAD_MULTIPLE they are started and tested as well (`wait`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from fdiff.comm.base import LostRanks
from fdiff.comm.collectives import ANSWER_GRACE_S, JOINS, ROLL_CALL_S, Call, aside, find_lost, pack, unpack
from fdiff.errors import RunError

if TYPE_CHECKING:
    from mpi4py.MPI import Exception as MPIException
    from mpi4py.MPI import Intracomm, Message, Request, Status

COLLECT, ANSWER, ALIVE = 1, 2, 3  # tags
SPIN_S = 1e-3  # yielding to others that can run, without a pause
PAYLOAD_SLEEP_S, CONTROL_SLEEP_S = 2e-4, 5e-3  # the longest pause; payload moves only while it is tested

T = TypeVar("T")


class MpiControl:
    """Exchanges over a communicator of all ranks that nobody else uses. Every rank makes the same calls."""

    def __init__(self, MPI: ModuleType, comm: Intracomm, timeout_s: float) -> None:
        self._MPI, self._comm, self._timeout_s = MPI, comm, timeout_s
        self._rank, self._size = comm.Get_rank(), comm.Get_size()

    def exchange(self, value: bytes) -> list[bytes]:
        """See Communicator. Rank 0 collects and answers. LostRanks also if another rank waits in vain."""
        with self.naming_errors("exchange"):
            return self._collect(value) if self._rank == 0 else self._ask(value)

    def watch(self, operation: Callable[[], T], what: str, ranks: Sequence[int]) -> T:
        """Run a blocking operation that all of `ranks` take part in, in a thread of its own; the result.

        If it does not end within the time-out: LostRanks that names those that give no sign of life. It is then left
        behind. For libraries that give MPI_THREAD_MULTIPLE.
        """
        began = time.monotonic()

        def look() -> None:
            self._join_roll_call(_joins(what, ranks))
            if time.monotonic() - began > self._timeout_s:
                self._give_up(what, ranks)

        with self.naming_errors(what):
            return aside(operation, look)

    def wait(self, requests: Sequence[Request], what: str, ranks: Sequence[int]) -> None:
        """The same for the requests of an operation that does not block, which moves only while it is waited for."""
        statuses = [self._MPI.Status() for _ in requests]
        with self.naming_errors(what, statuses):
            done = partial(self._MPI.Request.Testall, requests, statuses)
            if not self._until(done, self._timeout_s, PAYLOAD_SLEEP_S, _joins(what, ranks)):
                self._give_up(what, ranks)

    def _give_up(self, what: str, ranks: Sequence[int]) -> NoReturn:
        reason = f"rank {self._rank}: the {what} did not end within {self._timeout_s:g} s"
        self._roll_call(Call(ranks, f"was lost during the {what}", reason))

    @contextmanager
    def naming_errors(self, what: str, statuses: Sequence[Status] = ()) -> Iterator[None]:
        """Turn MPI's errors into LostRanks, where the library knows of failed ranks, or RunError."""
        try:
            yield
        except self._MPI.Exception as error:
            lost = self._failed()
            if lost:
                raise self._lost(lost, f"was lost during the {what}") from error
            raise RunError(f"rank {self._rank}: the {what} failed: {self._reason(error, statuses)}") from error

    def _reason(self, error: MPIException, statuses: Sequence[Status]) -> str:
        """What MPI says of an error; of several operations at once it only says that the statuses know."""
        code = error.Get_error_code()
        if error.Get_error_class() == self._MPI.ERR_IN_STATUS:
            nothing = (self._MPI.SUCCESS, self._MPI.ERR_PENDING)
            code = next((status.Get_error() for status in statuses if status.Get_error() not in nothing), code)
        return " ".join(self._MPI.Get_error_string(code).split())

    def _failed(self) -> list[int]:
        """The ranks that a fault-tolerant library knows to be dead; with others mpirun ends the job by itself."""
        try:
            failed = self._comm.Get_failed()
            return sorted(failed.Translate_ranks(None, self._comm.Get_group()))
        except (self._MPI.Exception, NotImplementedError):
            return []

    # --- exchange

    def _lost(self, ranks: Sequence[int], what: str) -> LostRanks:
        return LostRanks(ranks, what, speaker=min(set(range(self._size)) - set(ranks), default=0))

    def _collect(self, value: bytes) -> list[bytes]:
        """On rank 0: everybody's value, and the same to all the others."""
        values: dict[int, bytes] = {0: value}

        def all_here() -> bool:
            if found := self._probe(COLLECT):
                values[found[1].Get_source()] = self._take(*found)
            return len(values) == self._size

        if not self._until(all_here, self._timeout_s, CONTROL_SLEEP_S):
            self._miss([r for r in range(self._size) if r not in values])
        answer = [values[r] for r in range(self._size)]
        packed = pack(answer)
        sends = [self._comm.Isend([packed, self._MPI.BYTE], r, ANSWER) for r in range(1, self._size)]
        if not self._until(lambda: all(send.Test() for send in sends), self._timeout_s, CONTROL_SLEEP_S):
            self._miss([r for r, send in enumerate(sends, 1) if not send.Test()])
        return answer

    def _ask(self, value: bytes) -> list[bytes]:
        """On the other ranks: give the value to rank 0, take its answer."""
        found = None
        send = self._comm.Isend([value, self._MPI.BYTE], 0, COLLECT)

        def answered() -> bool:
            nonlocal found
            found = self._probe(ANSWER) if send.Test() else None
            return found is not None

        if not self._until(answered, self._timeout_s + ANSWER_GRACE_S, CONTROL_SLEEP_S) or found is None:
            self._miss([0])
        return unpack(self._take(*found))

    def _probe(self, tag: int) -> tuple[Message, Status] | None:
        status = self._MPI.Status()
        message = self._comm.Improbe(self._MPI.ANY_SOURCE, tag, status)
        return None if message is None else (message, status)

    def _take(self, message: Message, status: Status) -> bytes:
        buffer = bytearray(status.Get_count(self._MPI.BYTE))
        received = message.Irecv([buffer, self._MPI.BYTE])
        if not self._until(received.Test, self._timeout_s, CONTROL_SLEEP_S):
            self._miss([status.Get_source()])
        return bytes(buffer)

    # --- roll call

    def _until(self, done: Callable[[], bool], seconds: float, longest_sleep_s: float, waits: Call = JOINS) -> bool:
        """Whether `done` comes true in time; a roll call that another rank began meanwhile is joined."""

        def done_or_called() -> bool:
            if done():
                return True
            self._join_roll_call(waits)
            return False

        return _until(done_or_called, seconds, longest_sleep_s)

    def _join_roll_call(self, waits: Call) -> None:
        if self._comm.Iprobe(self._MPI.ANY_SOURCE, ALIVE):
            self._roll_call(waits)

    def _miss(self, ranks: Sequence[int]) -> NoReturn:
        """Some are late. They may live and themselves wait for a lost one, in an operation that we are no part of."""
        self._roll_call(Call(ranks, f"did not answer within {self._timeout_s:g} s"))

    def _roll_call(self, mine: Call) -> NoReturn:
        """Tell all that this rank lives and for whom it waits, hear the others, raise who is awaited and is silent."""
        call = json.dumps([list(mine.ranks), *mine[1:]]).encode()
        others = [r for r in range(self._size) if r != self._rank]
        sends = [self._comm.Isend([call, self._MPI.BYTE], r, ALIVE) for r in others]
        calls = {self._rank: mine}

        def all_here() -> bool:
            for send in sends:
                send.Test()
            while found := self._probe(ALIVE):
                buffer = bytearray(found[1].Get_count(self._MPI.BYTE))
                found[0].Recv([buffer, self._MPI.BYTE])  # a short message, and here already
                calls[found[1].Get_source()] = Call(*json.loads(buffer))
            return len(calls) == self._size

        _until(all_here, ROLL_CALL_S, CONTROL_SLEEP_S)
        lost, text = find_lost([calls[r] for r in sorted(calls)], calls)
        # A stopped rank that comes to as mpirun ends it finds that it is the lost one: not for it to say.
        raise LostRanks(lost, text, speaker=min(set(calls) - set(lost), default=self._rank))


def _joins(what: str, ranks: Sequence[int]) -> Call:
    return Call(ranks, f"was lost during the {what}", joins=True)


def _until(done: Callable[[], bool], seconds: float, longest_sleep_s: float) -> bool:
    """Whether `done` comes true in time. Sleeps a hundredth of the time waited, so it is at most 1 % late."""
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        if waited > SPIN_S:
            time.sleep(min(waited / 100, longest_sleep_s))
        else:
            os.sched_yield()
    return True
