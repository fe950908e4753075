"""How the ranks of a job meet in a store: only they, and again and again where the store outlives them."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

import pytest
import torch.distributed as dist

from fdiff.comm import LostRanks, Stranger
from fdiff.comm.meeting import Meeting, meet


def join(store: dist.Store, rank: int, size: int, job: str | None, timeout_s: float = 10) -> Future[Meeting]:
    """A rank that meets the others, in a thread."""
    found: Future[Meeting] = Future()

    def run() -> None:
        try:
            found.set_result(meet(store, rank, size, job, timeout_s))
        except Exception as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    return found


def test_ranks_meet_anew_in_a_store_that_outlived_them() -> None:
    store = dist.HashStore()
    names = set()
    for start in range(3):
        lost = join(store, 1, 2, "a", timeout_s=0.1) if start == 1 else None  # it says hello, and is never seen again
        if lost is not None:
            with pytest.raises(LostRanks, match="rank 0 did not come within 0.1 s"):
                lost.result(10)
        first, second = (join(store, rank, 2, "a") for rank in (0, 1))
        first.result(10).store.set(f"key {start}", "value")
        assert second.result(10).store.get(f"key {start}") == b"value"
        assert not second.result(10).store.check([f"key {start - 1}"])
        names |= {first.result(10).name, second.result(10).name}
    assert len(names) == 1


def test_a_rank_of_another_job_is_a_stranger_and_is_told_of() -> None:
    store = dist.HashStore()
    host, member = join(store, 0, 3, "a", timeout_s=2), join(store, 1, 3, "a", timeout_s=2)
    with pytest.raises(Stranger, match="this is rank 2 of b, but a meets at this address and port"):
        join(store, 2, 3, "b").result(10)
    with pytest.raises(LostRanks, match="rank 2 did not come within 2 s; turned away, .* was rank 2 of b") as lost:
        host.result(10)
    assert lost.value.ranks == (2,) and member.result(10)


def test_a_rank_0_of_another_job_is_one_too() -> None:
    store = dist.HashStore()
    assert join(store, 0, 1, "a").result(10)
    with pytest.raises(Stranger, match="this is rank 0 of b, but a meets"):
        join(store, 0, 1, "b").result(10)


def test_who_cannot_say_which_job_it_is_may_tell_the_others_why() -> None:
    for jobs in (("a", None), (None, "a")):
        store = dist.HashStore()
        assert all(rank.result(10) for rank in [join(store, rank, 2, job) for rank, job in enumerate(jobs)])


def test_ranks_that_contradict_each_other_are_strangers() -> None:
    store = dist.HashStore()
    host = join(store, 0, 3, "a", timeout_s=2)
    assert join(store, 1, 3, "a").result(10)
    with pytest.raises(Stranger, match="RANK: rank 1 of this job is here already"):
        join(store, 1, 3, "a").result(10)
    with pytest.raises(Stranger, match="WORLD_SIZE: this is rank 2 of 4, but the ranks that meet here are 3"):
        join(store, 2, 4, "a").result(10)
    with pytest.raises(LostRanks, match="rank 2 did not come within 2 s"):
        host.result(10)
