"""Memory that ranks of one node read of each other: the same bits as by messages, and nothing left of it."""

from __future__ import annotations

import gc
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import end_ranks, run_ranks
from torch import Tensor

from fdiff.comm import Communicator, Sum, neighbours, torch_dist, transfers
from fdiff.comm.neighbours import Neighbours

CPU = torch.device("cpu")
SIZE = 300_007
WEIGHTS = {0: 0.21, 1: 0.47, 2: 0.32}
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd: ranks send messages"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # pytest undoes the filter of the module
]


def summed(comm: Communicator, tensor: Tensor) -> str:
    """Ranks 0 to 2 report random numbers, which rank 3 receives; the bits of the sum, in hex."""
    tensor.copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(comm.rank)))
    with comm.ledger.purpose("parameters"):
        comm.combine([Sum(tensor, (0, 1, 2), (3,), WEIGHTS)])
    return tensor.numpy().tobytes().hex()


def both_ways(comm: Communicator) -> tuple[int, int]:
    """Bytes of messages that a sum takes from shared memory, and that it takes from other memory."""
    sent: list[int] = []
    post = torch_dist._post

    def counting(sends: bool, tensor: Tensor, rank: int) -> dist.Work:
        sent.append(tensor.nbytes if sends else 0)
        return post(sends, tensor, rank)

    torch_dist._post = counting
    by_memory, told = summed(comm, comm.allocate(SIZE, torch.float32, CPU)), sum(sent)
    by_messages, moved = summed(comm, torch.empty(SIZE)), sum(sent) - told
    assert by_memory == by_messages
    assert comm.ledger.take()["parameters"] == 2 * moved, "the ledger counts what is read like what is sent"
    return told, moved


def test_the_bits_are_those_that_messages_bring_though_only_places_are_sent(tmp_path: Path) -> None:
    found = run_ranks(both_ways, 4, tmp_path)
    assert max(told for told, _ in found) < 300
    assert sum(moved for _, moved in found) == (2 * (3 - 1) + 1) * 4 * SIZE


NODES = ("aabc", "aabb", "abab", "abba", "abcd", "aaab", "aaaa")  # of ranks 0 to 3


def apart(comm: Communicator) -> list[tuple[str, int, str]]:
    """How many neighbours a rank has, and the bits of a sum in small chunks, for each layout."""
    transfers.CHUNK_BYTES = 10_004
    found = []
    for nodes in NODES:
        neighbours._node = lambda nodes=nodes: nodes[comm.rank]
        comm._neighbours.meet(comm)
        found.append((nodes, len(comm._neighbours), summed(comm, comm.allocate(SIZE, torch.float32, CPU))))
    return found


def test_ranks_of_several_nodes(tmp_path: Path) -> None:
    bits = set()
    for rank, found in enumerate(run_ranks(apart, 4, tmp_path)):
        for nodes, known, sum in found:
            assert known == nodes.count(nodes[rank]) - 1
            bits.add(sum)
    assert len(bits) == 1


def without_memfd(comm: Communicator) -> int:
    if comm.rank == 2:
        del os.memfd_create
    comm._neighbours.meet(comm)
    return len(comm._neighbours)


def test_a_rank_that_cannot_show_its_memory_is_nobodys_neighbour(tmp_path: Path) -> None:
    assert run_ranks(without_memfd, 4, tmp_path) == [2, 2, 0, 2]


def allocates_again_and_again(nodes: str, comm: Communicator) -> tuple[int, int]:
    neighbours._node = lambda: nodes[comm.rank]
    comm._neighbours.meet(comm)
    everybody = tuple(range(comm.size))
    for turn in range(5):
        tensor = comm.allocate(SIZE, torch.float32, CPU)
        tensor.fill_(comm.rank + turn)
        with comm.ledger.purpose("parameters"):
            comm.combine([Sum(tensor, everybody)])
        assert tensor.unique().tolist() == [sum(everybody) + comm.size * turn]
        del tensor
        gc.collect()
    return len(comm._neighbours._own), len(comm._neighbours._mapped)


@pytest.mark.parametrize("nodes", ["aa", "aab"])
def test_memory_that_nobody_holds_is_given_back(nodes: str, tmp_path: Path) -> None:
    """And a descriptor's number that is used again is not taken for the memory of before."""
    for own, mapped in run_ranks(partial(allocates_again_and_again, nodes), len(nodes), tmp_path):
        assert own == 0
        assert mapped <= 2  # the probe's and the last


def lost_while_others_read(how: signal.Signals, comm: Communicator) -> None:
    tensor = comm.allocate(SIZE, torch.float32, CPU)
    summed(comm, tensor)
    comm.exchange(b"")
    if comm.rank == 1:
        os.kill(os.getpid(), how)
    summed(comm, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_in_a_sum_is_named(how, tmp_path: Path) -> None:
    ends = end_ranks(partial(lost_while_others_read, how), 4, tmp_path, patience_s=4)
    for rank, end in enumerate(ends):
        if rank != 1:
            assert (end.status, end.lost) == (1, (1,)), (rank, end)
            assert end.at - ends[1].at < 4 + 10


def test_a_place_that_is_not_there_any_more(tmp_path: Path) -> None:
    ours = Neighbours()
    ours._processes[0] = os.getpid()
    tensor = ours.allocate(4, torch.float32)
    place = ours.place(tensor[1:])
    assert place is not None
    tensor.copy_(torch.arange(4.0))
    assert ours.view(0, place, tensor[1:]).tolist() == [1, 2, 3]
    with pytest.raises(OSError, match="no longer shows the memory"):
        Neighbours.view(_of(os.getpid()), 0, [place[0], place[1] + 1, 0], tensor)
    with pytest.raises(OSError):
        Neighbours.view(_of(os.getpid()), 0, [10**6, 1, 0], tensor)


def _of(process: int) -> Neighbours:
    theirs = Neighbours()
    theirs._processes[0] = process
    return theirs
