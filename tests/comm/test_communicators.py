"""Communicators with real ranks: over gloo what each must do, and what the others learn when a rank dies or stops."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from comm_cases import CASES, EVERYBODY, RANKS
from faults.injections import hold_the_lock, segfault
from forked_jobs import free_port
from ranks import End, end_ranks, run_ranks

from fdiff.comm import Communicator, SoloCommunicator, collectives, heartbeat, torch_dist
from fdiff.comm.base import device_problem
from fdiff.comm.collectives import Call, Groups, find_lost, pack, unpack, uses_ring
from fdiff.comm.torch_dist import TorchCommunicator, meet_at
from fdiff.errors import RunError, UserError
from fdiff.runtime import Rendezvous


def run_cases(comm: Communicator) -> dict[str, str]:
    """Every case in turn; the errors by name. The first one ends it, for ranks may then be out of step."""
    for name, run in CASES.items():
        try:
            run(comm)
        except Exception as error:
            return {name: repr(error)}
    return {}


def test_gloo(tmp_path: Path) -> None:
    assert run_ranks(run_cases, RANKS, tmp_path) == [{}] * RANKS


# --- lost ranks ----------------------------------------------------------------------------------------------------

BIG = 3_000_000


def all_reduce(comm: Communicator, ranks: tuple[int, ...]) -> None:
    with comm.ledger.purpose("parameters"):
        comm.all_reduce(torch.ones(BIG), ranks)


def die(comm: Communicator, rank: int, how: int = signal.SIGKILL) -> None:
    if comm.rank == rank:
        os.kill(os.getpid(), how)


def killed_in_training(comm: Communicator) -> None:
    comm.exchange(b"")
    die(comm, 2)
    comm.exchange(b"")


def killed_between_vote_and_collective(comm: Communicator) -> None:
    all_reduce(comm, EVERYBODY)
    comm.exchange(b"")
    die(comm, 3)
    all_reduce(comm, EVERYBODY)


def killed_in_a_group_without_rank_0(comm: Communicator) -> None:
    all_reduce(comm, (1, 2, 3))
    die(comm, 3)
    all_reduce(comm, (1, 2, 3))
    comm.exchange(b"")  # here rank 0 waits, and has not seen what the others have


def segfault_in_a_sum(comm: Communicator) -> None:
    all_reduce(comm, EVERYBODY)
    comm.exchange(b"")
    if comm.rank == 3:
        threading.Timer(0.002, segfault).start()
    for _ in range(1000):
        all_reduce(comm, EVERYBODY)


def stopped_in_collective(comm: Communicator) -> None:
    all_reduce(comm, EVERYBODY)
    die(comm, 1, signal.SIGSTOP)
    all_reduce(comm, EVERYBODY)


def stopped_in_a_group_without_rank_0(comm: Communicator) -> None:
    """The time-outs of rank 0's exchange and of the others' all-reduce are over at the same time."""
    all_reduce(comm, (1, 2, 3))
    comm.exchange(b"")
    die(comm, 3, signal.SIGSTOP)
    all_reduce(comm, (1, 2, 3))
    comm.exchange(b"")


def stopped_in_chain(comm: Communicator) -> None:
    """Rank 2 waits for rank 1, which lives, but waits for rank 0 in vain."""
    tensor = torch.ones(BIG)
    with comm.ledger.purpose("parameters"):
        all_reduce(comm, EVERYBODY)
        die(comm, 0, signal.SIGSTOP)
        if comm.rank > 0:
            comm.recv(tensor, comm.rank - 1)
        comm.send(tensor, comm.rank + 1)


def fails_alone(comm: Communicator) -> None:
    comm.exchange(b"")
    if comm.rank == 1:
        raise ValueError("client 1 has no idea")
    comm.exchange(b"")


def check_survivors(ends: list[End], lost: int, within_s: float) -> None:
    """All others name it and end with status 1 in time, counted from its own end."""
    for rank, end in enumerate(ends):
        if rank != lost:
            assert (end.status, end.lost) == (1, (lost,)), (rank, end)
            assert end.at - ends[lost].at < within_s


@pytest.mark.slow
def test_a_rank_killed_in_training_is_named(tmp_path: Path) -> None:
    ends = end_ranks(killed_in_training, RANKS, tmp_path, patience_s=4)
    check_survivors(ends, 2, within_s=4 + 10)
    assert {end.error for end in ends if end.error} == {"rank 2 is gone: its process has ended"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [killed_between_vote_and_collective, killed_in_a_group_without_rank_0, segfault_in_a_sum]
)
def test_a_rank_killed_in_a_collective_is_named_long_before_the_time_out(fault, tmp_path: Path) -> None:
    """A broken connection tells; but only its two ends, and the others wait for them."""
    ends = end_ranks(fault, RANKS, tmp_path, patience_s=60)
    check_survivors(ends, 3, within_s=20)
    assert {end.error for end in ends if end.error} == {"rank 3 was lost during the all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lost"), [(stopped_in_collective, 1), (stopped_in_a_group_without_rank_0, 3), (stopped_in_chain, 0)]
)
def test_a_stopped_rank_is_named(fault, lost: int, tmp_path: Path) -> None:
    check_survivors(end_ranks(fault, RANKS, tmp_path, patience_s=4), lost, within_s=4 + 10)


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_others_at_once(tmp_path: Path) -> None:
    ends = end_ranks(fails_alone, 3, tmp_path, patience_s=30)
    assert ends[1].error == "client 1 has no idea"
    check_survivors(ends, 1, within_s=5)
    assert ends[0].error == "rank 1 failed and left"


def stopped_long_before_the_time_out(comm: Communicator) -> None:
    heartbeat.BEAT_S = 0.2
    time.sleep(6)  # the beat before was the usual one
    comm.exchange(b"")
    die(comm, 2, signal.SIGSTOP)
    if comm.rank == 0:
        time.sleep(6)  # busy, and not to blame
    comm.exchange(b"")


@pytest.mark.slow
def test_who_waits_notices_that_a_heart_has_stopped(tmp_path: Path) -> None:
    """Rank 1 waits for rank 0, which trains on, and learns that rank 2 is gone."""
    ends = end_ranks(stopped_long_before_the_time_out, 3, tmp_path, patience_s=60)
    check_survivors(ends, 2, within_s=20)
    assert {end.error for end in ends if end.error} == {"rank 2 has given no sign of life for a while"}


def one_comes_late(comm: Communicator) -> None:
    if comm.rank == 1:
        time.sleep(4)
    comm.exchange(b"")


def test_exchange_names_a_late_rank(tmp_path: Path) -> None:
    ends = end_ranks(one_comes_late, 3, tmp_path, patience_s=1)
    assert [end.error for end in ends] == ["rank 1 did not answer within 1 s"] * 3
    assert {end.lost for end in ends} == {(1,)}


def one_holds_the_lock(comm: Communicator) -> None:
    all_reduce(comm, EVERYBODY)
    if comm.rank == 1:
        hold_the_lock(6)
    all_reduce(comm, EVERYBODY)
    comm.exchange(b"")


@pytest.mark.slow
@pytest.mark.rare  # that a heart has stopped is noticed in a test that always runs
def test_a_rank_that_holds_the_interpreters_lock_is_waited_for_or_named(tmp_path: Path) -> None:
    """For 6 s, of which no heartbeat is sent and no alarm heard: see `tests.faults --only locks` for 30."""
    run_ranks(one_holds_the_lock, RANKS, tmp_path)
    ends = end_ranks(one_holds_the_lock, RANKS, tmp_path, patience_s=1)
    assert [(end.status, end.lost) for end in ends] == [(1, (1,))] * RANKS


# --- the store that rank 0 serves ------------------------------------------------------------------------------------


def rank_0_killed(comm: Communicator) -> None:
    comm.exchange(b"")
    die(comm, 0)
    comm.exchange(b"")


def rank_0_stopped(comm: Communicator) -> None:
    comm.exchange(b"")
    die(comm, 0, signal.SIGSTOP)
    comm.exchange(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (rank_0_killed, "rank 0 is gone, and with it the store through which the ranks talk"),
        (rank_0_stopped, "rank 0 did not answer within 4 s"),
    ],
)
def test_rank_0_is_named_though_it_serves_the_store(fault, says: str, tmp_path: Path) -> None:
    ends = end_ranks(fault, 3, tmp_path, patience_s=4, rank_0_serves=True)
    check_survivors(ends, 0, within_s=4 + 10)
    assert {end.error for end in ends[1:]} == {says}


@pytest.mark.slow
def test_a_killed_rank_is_named_by_all_before_rank_0_takes_the_store_away(tmp_path: Path) -> None:
    ends = end_ranks(killed_in_training, RANKS, tmp_path, patience_s=4, rank_0_serves=True)
    check_survivors(ends, 2, within_s=4 + 10)


def test_the_store_listens_on_the_loopback_address_only() -> None:
    port = free_port()
    store = meet_at(Rendezvous("127.0.0.1", port, True, "a job"), 0, 1, 5).store
    store.set("key", "value")
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    assert f"{port:04X}" not in {
        line.split()[1].split(":")[1]
        for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }


def test_nobody_serves() -> None:
    with pytest.raises(RunError, match="no rendezvous at 127.0.0.1:"):
        meet_at(Rendezvous("127.0.0.1", free_port(), False, "a job"), 1, 2, 1)


def test_what_takes_connections_and_does_not_answer_is_no_rendezvous(monkeypatch) -> None:
    monkeypatch.setattr(torch_dist, "STORE_GRACE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(RunError, match="no rendezvous at 127.0.0.1:"):
            meet_at(Rendezvous("127.0.0.1", silent.getsockname()[1], False, "a job"), 1, 2, 1)
        assert time.monotonic() - began < 20


def grouped_cases(comm: TorchCommunicator) -> None:
    """Every case over the process groups that NCCL needs, here of gloo; so few are kept that some are freed."""
    collectives.GROUPS_KEPT, comm._ring = 2, False
    for name, run in CASES.items():
        run(comm)
        assert len(comm._groups._kept) <= 2, name


@pytest.mark.slow
def test_every_case_by_the_librarys_own_calls_among_groups(tmp_path: Path) -> None:
    run_ranks(grouped_cases, RANKS, tmp_path, timeout_s=120)


def test_the_ring_is_the_same_on_all_ranks_and_not_for_nccl() -> None:
    assert [uses_ring("auto", name) for name in ("gloo", "mpi", "nccl")] == [True, True, False]
    assert uses_ring("ring", "mpi") and not uses_ring("library", "gloo")
    with pytest.raises(UserError, match=r"runtime\.partial_sums: 'ring' is for gloo and MPI"):
        uses_ring("ring", "nccl")


# --- small parts -----------------------------------------------------------------------------------------------------


def test_groups_free_the_one_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdiff.comm.collectives.GROUPS_KEPT", 2)
    freed: list[str] = []
    groups = Groups(lambda ranks: "".join(map(str, ranks)), freed.append)
    for ranks in ((0, 1), (1, 2), (0, 1), (0, 2)):
        assert groups.of(ranks) == "".join(map(str, ranks))
    assert freed == ["12"]
    groups.clear()
    assert freed == ["12", "01", "02"]


def test_a_helper_thread_that_dies_without_a_word_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(queue.SimpleQueue):
        def put(self, *_: object) -> None:
            raise MemoryError

    monkeypatch.setattr(collectives.queue, "SimpleQueue", Full)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(RunError, match="a helper thread has died"):
        collectives.aside(lambda: None, lambda: None)


def test_a_heart_that_misses_a_beat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    beats: list[str] = []

    class Store:
        def set(self, key: str, value: str) -> None:
            beats.append(key)
            if len(beats) == 3:
                raise MemoryError

    heart = heartbeat.Heartbeat(Store(), 0)
    until = time.monotonic() + 10
    while len(beats) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    heart.stop()
    assert len(beats) >= 6


def test_who_is_lost() -> None:
    pair, late = Call([1, 2], "was lost", "the pair failed"), Call([1, 2], "is late")
    assert find_lost([pair], {0, 1}) == ([2], "was lost")
    assert find_lost([pair], {1, 2}) == ([], "the pair failed")  # rank 0 is busy
    assert find_lost([late, pair], {0, 1}) == ([2], "is late")
    assert find_lost([late], {0, 1, 2}) == ([1, 2], "is late")
    chain = [Call([2, 1], "was lost by 2", "x"), Call([1, 0], "was lost by 1", "y")]
    assert find_lost(chain, {1, 2}) == ([0], "was lost by 1")
    assert find_lost([chain[0], chain[1]._replace(joins=True)], {1, 2}) == ([0], "was lost by 1")
    assert find_lost([pair, chain[1]._replace(joins=True)], {1}) == ([2], "was lost")  # rank 0 is busy


def test_pack_keeps_empty_values() -> None:
    assert unpack(pack([b"a" * 300, b"", b"z"])) == [b"a" * 300, b"", b"z"]


def test_device_problem() -> None:
    alone = [["cuda", "GPU-a", "n1"], ["cuda", "GPU-b", "n1"], ["cuda", "GPU-c", "n2"]]
    assert device_problem(alone, share_gpu=False) is None
    assert device_problem([["cpu", "", "n1"]] * 3, share_gpu=False) is None
    shared = [alone[0], alone[1], ["cuda", "GPU-a", "n1"]]
    assert device_problem(shared, share_gpu=True) is None
    problem = device_problem(shared, share_gpu=False)
    assert problem and problem.startswith("runtime.device: ranks 0, 2 on n1 have the same GPU GPU-a;")
    assert "--runtime.share_gpu true" in problem and "hosts several clients" in problem
    mixed = device_problem([*alone, ["cpu", "", "n3"]], share_gpu=True)
    assert mixed and mixed.startswith("runtime.device: ranks 3 see no GPU but others do;")


def test_world_of_one() -> None:
    comm = SoloCommunicator()
    tensor = torch.ones(3)
    comm.all_reduce(tensor, (0,))
    comm.broadcast(tensor, 0, (0,))
    assert tensor.tolist() == [1, 1, 1] and comm.exchange(b"x") == [b"x"] and comm.ledger.take() == {}
    with pytest.raises(ValueError, match="rank 1 does not exist"):
        comm.send(tensor, 1)
