"""How the ranks of one job meet in a store, and how a rank of another job is turned away before it can disturb them.

Rank 0 writes down which job it is and opens a session: a part of the store whose name only those who meet there know.
Every other rank says hello by a name that it uses once, and rank 0 answers that name. So no rank takes what an earlier
start of the job left in the store for an answer, whichever agents started their ranks again, and how often.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from fdiff.comm.base import LostRanks, Stranger
from fdiff.comm.collectives import ANSWER_GRACE_S

LONGEST_SLEEP_S = 0.1  # between two looks at the store


@dataclass(frozen=True)
class Meeting:
    """Where the ranks have met: the part of the store that is theirs alone, and what names the store as long as it is.

    A store of torchrun's outlives the ranks that it starts again; so does `name`.
    """

    store: dist.Store
    name: str


def meet(store: dist.Store, rank: int, size: int, job: str | None, timeout_s: float) -> Meeting:
    """Meet the other ranks of `job`. Every rank calls it.

    None is a rank that cannot say which job it is, because its request is bad: it is let in, to tell the others.
    Stranger on a rank that does not belong to those who meet here; they do not notice it. LostRanks if one of them
    does not come in time: it also says who was turned away meanwhile.
    """
    store = dist.PrefixStore("fdiff", store)
    take_part = _open_session if rank == 0 else _join_session
    session, name = take_part(store, _Place(rank, size, job), timeout_s)
    return Meeting(dist.PrefixStore(session, store), name)


@dataclass(frozen=True)
class _Place:
    """A rank's place in a job."""

    rank: int
    size: int
    job: str | None

    def compare(self, store: dist.Store, host: str) -> str:
        """The name of the store; Stranger if the host is another job: that leaves word for those who wait here."""
        job, name = json.loads(host)
        if job and self.job and job != self.job:
            store.set(f"turned away/{store.add('turned away', 1)}", f"rank {self.rank} of {self.job}")
            raise Stranger(
                f"MASTER_PORT: this is rank {self.rank} of {self.job}, but {job} meets at this address and port; give "
                "each job a port of its own, and all ranks of a job the same run folder"
            )
        return str(name)


def _open_session(store: dist.Store, place: _Place, timeout_s: float) -> tuple[str, str]:
    """On rank 0: a new session, when all others have joined it, and the name of the store."""
    host = json.dumps([place.job, secrets.token_hex(8)])
    name = place.compare(store, store.compare_set("host", "", host).decode())
    session = secrets.token_hex(8)
    joined = {r: f"{session}/joined/{r}" for r in range(1, place.size)}
    welcomed: set[str] = set()

    def all_joined() -> bool:
        for rank in joined:
            guest = _read(store, f"hello/{rank}")
            if guest and guest not in welcomed:  # if this one has been lost since, another one follows
                store.set(f"welcome/{guest}", json.dumps([session, place.size]))
                welcomed.add(guest)
        return store.check(list(joined.values()))

    if joined and not _until(all_joined, timeout_s):
        late = [rank for rank, key in joined.items() if not store.check([key])]
        raise LostRanks(late, f"did not come within {timeout_s:g} s{_turned_away(store)}", speaker=0)
    return session, name


def _join_session(store: dist.Store, place: _Place, timeout_s: float) -> tuple[str, str]:
    """On another rank: the session that rank 0 has opened, and the name of the store."""
    guest, hello = secrets.token_hex(8), f"hello/{place.rank}"
    name = ""

    def welcomed() -> bool:
        nonlocal name
        if host := _read(store, "host"):
            name = place.compare(store, host)
            if _read(store, hello) != guest:
                store.set(hello, guest)
        return store.check([f"welcome/{guest}"])

    if not _until(welcomed, timeout_s + ANSWER_GRACE_S):
        raise LostRanks([0], f"did not come within {timeout_s:g} s{_turned_away(store)}", speaker=place.rank)
    session, size = json.loads(_read(store, f"welcome/{guest}"))
    if size != place.size:
        raise Stranger(
            f"WORLD_SIZE: this is rank {place.rank} of {place.size}, but the ranks that meet here are {size}; start "
            "all ranks with the same number"
        )
    if store.compare_set(f"{session}/joined/{place.rank}", "", guest).decode() != guest:
        raise Stranger(f"RANK: rank {place.rank} of this job is here already; start each rank once")
    return session, name


def _turned_away(store: dist.Store) -> str:
    """Who was turned away here, as the end of a sentence."""
    number = store.add("turned away", 0)
    who = [_read(store, f"turned away/{n}") for n in range(1, number + 1)]
    return f"; turned away, because it is another job's, was {', '.join(sorted(set(who)))}" if who else ""


def _read(store: dist.Store, key: str) -> str:
    """A value, "" if there is none: a plain `get` would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in time; sleeps a hundredth of the time waited."""
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(min(waited / 100, LONGEST_SLEEP_S))
    return True
