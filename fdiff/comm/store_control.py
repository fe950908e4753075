"""The control plane over a store: values from every rank to every rank within a time-out, and who is missing.

A store and not a process group: a rank that is late here can be named, and its lateness leaves nothing in an undefined
state. Two things happen in it. An exchange: every rank sets its value, rank 0 collects and answers. A roll call: a rank
that waits in vain, in an exchange or in a payload operation, or for one whose heart has stopped, raises the alarm,
which all others notice that wait too; all say that they are alive, and who does not, though awaited, is lost.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch.distributed as dist

from fdiff.comm.base import LostRanks
from fdiff.comm.collectives import (
    ANSWER_GRACE_S,
    JOINS,
    LINGER_S,
    ROLL_CALL_S,
    TICK_S,
    Call,
    aside,
    find_lost,
    pack,
    unpack,
)
from fdiff.comm.heartbeat import Heartbeat

SLEEP_S = 0.1  # longest sleep between two looks at the store
STORE_SILENT_S = 60.0  # how long a store may take to answer, however patient the ranks are with each other
FAREWELL_S = 3.0  # how long rank 0 serves the store to those that have not left yet

T = TypeVar("T")


class StoreControl:
    """Exchanges over a store that all ranks reach. Every rank makes the same calls in the same order.

    `served_by` says what serves the store, if that is not rank 0.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, served_by: str | None = None) -> None:
        # Connections of their own: while one waits for something in the store, its other users have to wait as well.
        self._store, beats = (dist.PrefixStore("control", store.clone()) for _ in range(2))
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._heartbeat = Heartbeat(beats, rank)
        self._watched = range(size) if rank == 0 else (0, (rank + 1) % size)  # each rank by two others: few questions
        self._turn = 0
        self._missed: set[int] = set()
        self._served_by = served_by
        self._looks = 0  # in vain, at a question that the store has not answered

    def exchange(self, value: bytes) -> list[bytes]:
        """See Communicator. LostRanks also if another rank raised the alarm."""
        turn, self._turn = self._turn, self._turn + 1
        return self._ask(lambda: self._exchange(turn, value))

    def watch(self, operation: Callable[[], T], what: str, ranks: Sequence[int]) -> T:
        """Run an operation that all of `ranks` take part in; the result.

        If it fails on any of them or does not end within the time-out: LostRanks that names those that are gone. An
        operation that hangs is left behind in its thread.
        """
        began = time.monotonic()
        waits = Call(ranks, f"was lost during the {what}", joins=True)

        def look() -> None:
            self._ask(lambda: self._heed(waits))
            if time.monotonic() - began > self._timeout_s + ANSWER_GRACE_S:
                raise RuntimeError(f"it did not end within {self._timeout_s:g} s")

        try:
            return aside(operation, look)
        except LostRanks:
            raise
        except RuntimeError as error:
            reason = f"rank {self._rank}: the {what} failed: {str(error).splitlines()[0]}"
            self._ask(lambda: self._alarm(Call(ranks, waits.what, reason)))
            self._ask(self._roll_call)
            raise AssertionError("a roll call ends in an error") from error

    def leave(self, failed: bool = False) -> None:
        """The last call. Rank 0, in whose process the store may live, waits until the others need it no more.

        Of a rank that `failed` the others learn here, if not before. Never fails.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone: there is nobody to take leave of
            self._ask(lambda: self._leave(failed), patience_s=FAREWELL_S + LINGER_S)
        self._heartbeat.stop()

    def _ask(self, questions: Callable[[], T], patience_s: float | None = None) -> T:
        """Use the store; LostRanks if it is gone, or gives no answer within the time-out or `patience_s`.

        A call to a store whose server was stopped never returns, whatever time-out it is given.
        """
        waits_s = min(self._timeout_s, STORE_SILENT_S)
        limit_s = waits_s + ANSWER_GRACE_S if patience_s is None else patience_s

        def look() -> None:
            self._looks += 1  # and not by the clock: this process may have been stopped
            if self._looks * TICK_S > limit_s:
                raise self._lost_store(f"did not answer within {waits_s:g} s")

        self._looks = 0
        try:
            return aside(questions, look)
        except dist.DistError as error:
            with_it = ", and with it the store through which the ranks talk" if self._served_by is None else ""
            raise self._lost_store(f"is gone{with_it}") from error

    def _lost_store(self, what: str) -> LostRanks:
        if self._served_by is None:
            return self._lost([0], what)
        text = f"rank {self._rank}: the store through which the ranks talk {what}: that of {self._served_by}"
        return LostRanks([], text, self._rank)  # each rank finds out for itself

    # --- exchange

    @property
    def _late(self) -> str:
        return f"did not answer within {self._timeout_s:g} s"

    def _exchange(self, turn: int, value: bytes) -> list[bytes]:
        if self._rank == 0:
            return self._collect(turn, value)
        self._store.set(f"{turn}/{self._rank}", value)
        if not self._wait([f"{turn}/all"], self._timeout_s + ANSWER_GRACE_S):
            self._miss([0])
        return unpack(self._read([f"{turn}/all"])[0])

    def _collect(self, turn: int, value: bytes) -> list[bytes]:
        """On rank 0: wait for all, then publish what came."""
        keys = [f"{turn}/{r}" for r in range(1, self._size)]
        if not self._wait(keys, self._timeout_s):
            self._miss([r for r, key in enumerate(keys, 1) if not self._store.check([key])])
        values = [value, *self._read(keys)]
        self._store.set(f"{turn}/all", pack(values))
        if turn > 1:  # everybody who sent for this turn has read the answer of the one before the last
            for key in [f"{turn - 2}/{r}" for r in range(1, self._size)] + [f"{turn - 2}/all"]:
                self._store.delete_key(key)
        return values

    def _read(self, keys: list[str]) -> list[bytes]:
        """The values of keys that are there, in one request: one by one each would take two."""
        return self._store.multi_get(keys) if keys else []

    def _miss(self, ranks: Sequence[int]) -> NoReturn:
        """Some are late. They may live and themselves wait for a lost one, in an operation that we are no part of."""
        self._alarm(Call(ranks, self._late))
        self._roll_call()

    def _wait(self, keys: list[str], seconds: float, heed_alarm: bool = True) -> bool:
        """Whether all keys appear in time. Looks again and again: a wait in the store could not notice the alarm."""
        began = alarm_seen = time.monotonic()
        while not self._store.check(keys):
            self._looks, now = 0, time.monotonic()
            if heed_alarm and now - alarm_seen > TICK_S:
                alarm_seen = now
                self._heed()
            if now - began > seconds:
                return False
            time.sleep(min((now - began) / 100, SLEEP_S))
        self._looks = 0
        return True

    # --- roll call

    def _heed(self, waits: Call = JOINS) -> None:
        """While waiting: answer another rank's alarm, or raise it for one that shows no sign of life."""
        if self._store.check(["alarm"]):
            self._roll_call(waits)
        gone = [r for r in self._heartbeat.gone(self._store, self._watched) if not self._store.check([f"gone/{r}"])]
        if gone:  # without having taken leave
            self._alarm(Call(gone, "is gone: its process has ended"))
            self._roll_call()
        if silent := self._heartbeat.silent(self._store, self._watched):
            self._alarm(Call(silent, "has given no sign of life for a while"))
            self._roll_call()

    def _alarm(self, call: Call) -> None:
        """Say that this rank waits in vain."""
        self._say(call)
        self._store.set("alarm", b"")

    def _say(self, call: Call) -> None:
        self._store.set(f"call/{self._rank}", json.dumps([list(call.ranks), *call[1:]]))

    def _roll_call(self, waits: Call = JOINS) -> NoReturn:
        """Say that this rank is alive, and raise what the roll call of all those that say so brings to light."""
        if waits.ranks:
            self._say(waits)
        self._store.set(f"alive/{self._rank}", b"")
        awaited = set(range(self._size)) - set(self._heartbeat.gone(self._store, range(self._size)))
        self._wait([f"alive/{r}" for r in awaited], ROLL_CALL_S, heed_alarm=False)
        if not self._store.check(["outcome"]):
            ranks = range(self._size)
            calls = [Call(*json.loads(self._store.get(k))) for r in ranks if self._store.check([k := f"call/{r}"])]
            alive = {r for r in ranks if self._store.check([f"alive/{r}"]) and not self._store.check([f"left/{r}"])}
            outcome = json.dumps([*find_lost(calls, alive), min(alive, default=0)])
            self._store.compare_set("outcome", "", outcome)  # the first one counts, so that all say the same
        lost, text, speaker = json.loads(self._store.get("outcome"))
        self._missed.update(lost)
        raise LostRanks(lost, text, speaker)

    def _lost(self, ranks: Sequence[int], what: str) -> LostRanks:
        self._missed.update(ranks)
        return LostRanks(ranks, what, speaker=min(set(range(self._size)) - set(ranks), default=0))

    def _leave(self, failed: bool) -> None:
        if failed and not self._missed and not self._store.check(["alarm"]):
            self._store.set(f"left/{self._rank}", b"")
            self._store.set(f"alive/{self._rank}", b"")  # nobody needs to wait for it
            self._alarm(Call([self._rank], "failed and left"))
        self._store.set(f"gone/{self._rank}", b"")
        if self._rank == 0:
            others = set(range(self._size)) - self._missed
            self._wait([f"gone/{r}" for r in others], FAREWELL_S, heed_alarm=False)
        elif failed:
            time.sleep(LINGER_S)
