"""What every communicator must do, as functions of a communicator of RANKS ranks; they raise where it does not.

Every rank starts from rank + 1, so that sums have a closed form: over all four ranks they are ten times the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fdiff.comm import Communicator, Sum, agree, exchange_json, gather, transfers
from fdiff.errors import RunError, UserError
from fdiff.federation.aggregate import Aggregation
from fdiff.model.unet import PARTS
from fdiff.plan import hosted_by, neighbours, plan_round

RANKS = 4
EVERYBODY = tuple(range(RANKS))
SUBSETS = [s for n in (2, 3) for s in combinations(EVERYBODY, n)]
ODD_SIZES = (1, 2, 3, 5, 1021, 40_009)  # which four ranks do not divide evenly

CASES: dict[str, Callable[[Communicator], None]] = {}


def case(fn: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    CASES[fn.__name__] = fn
    return fn


def ramp(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 … 15 again and again: whole numbers, so that sums are exact even in uint8."""
    return (torch.arange(size) % 16).to(dtype)


@case
def all_reduce_sums(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.float64, torch.uint8, torch.int64):
        for size in ODD_SIZES:
            tensor = ramp(size, dtype) * (comm.rank + 1)
            address = tensor.data_ptr()
            with comm.ledger.purpose("parameters"):
                comm.all_reduce(tensor, EVERYBODY)
            assert torch.equal(tensor, ramp(size, dtype) * 10), (dtype, size)
            assert tensor.data_ptr() == address


@case
def all_reduce_among_some(comm: Communicator) -> None:
    for ranks in SUBSETS:
        tensor = ramp(1021) * (comm.rank + 1)
        with comm.ledger.purpose("parameters"):
            comm.all_reduce(tensor, ranks)
        factor = sum(r + 1 for r in ranks) if comm.rank in ranks else comm.rank + 1
        assert torch.equal(tensor, ramp(1021) * factor), ranks


@case
def all_reduce_touches_its_range_only(comm: Communicator) -> None:
    arena = torch.full((100,), float(comm.rank + 1))
    with comm.ledger.purpose("parameters"):
        comm.all_reduce(arena[33:66], (1, 3))
    mine = comm.rank + 1
    inside = 6 if comm.rank in (1, 3) else mine
    assert arena.tolist() == [mine] * 33 + [inside] * 33 + [mine] * 34


@case
def all_reduce_is_bit_equal_everywhere(comm: Communicator) -> None:
    for ranks in (EVERYBODY, (0, 1, 3), (1, 2)):
        for size in (*ODD_SIZES, 300_007):
            tensor = torch.randn(size, generator=torch.Generator().manual_seed(comm.rank))
            with comm.ledger.purpose("parameters"):
                comm.all_reduce(tensor, ranks)
            digests = exchange_json(comm, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
            assert len({digests[r] for r in ranks}) == 1, (ranks, size)


@case
def broadcast_delivers(comm: Communicator) -> None:
    for ranks in (*SUBSETS, EVERYBODY):
        for source in ranks:
            tensor = ramp(1021) * (comm.rank + 1)
            with comm.ledger.purpose("parameters"):
                comm.broadcast(tensor, source, ranks)
            factor = source + 1 if comm.rank in ranks else comm.rank + 1
            assert torch.equal(tensor, ramp(1021) * factor), (source, ranks)


@case
def send_and_recv_go_round(comm: Communicator) -> None:
    token = ramp(40_009) * (comm.rank + 1)
    with comm.ledger.purpose("statistics"):
        if comm.rank > 0:
            received = torch.empty_like(token)
            comm.recv(received, comm.rank - 1)
            token += received
        if comm.rank + 1 < comm.size:
            comm.send(token, comm.rank + 1)
    assert torch.equal(token, ramp(40_009) * sum(range(1, comm.rank + 2)))


@case
def gather_reaches_rank_0(comm: Communicator) -> None:
    mine = torch.full((comm.rank, 2), float(comm.rank))  # rank 0 has none
    with comm.ledger.purpose("pictures"):
        tensors = gather(comm, mine)
    if comm.rank == 0:
        assert [t.tolist() for t in tensors] == [[[float(r)] * 2] * r for r in EVERYBODY]
    else:
        assert tensors == []


@case
def ledger_counts_what_the_plan_says(comm: Communicator) -> None:
    """For r ranks that reduce and m that only receive 2(r-1)+m tensors, over all ranks, to the byte."""
    comm.ledger.take()
    for ranks in [*SUBSETS, EVERYBODY]:
        tensor = torch.ones(12 * 101)
        receivers = [r for r in EVERYBODY if r not in ranks]
        with comm.ledger.purpose("parameters"):
            comm.all_reduce(tensor, ranks)
            comm.broadcast(tensor, ranks[0], tuple(sorted((ranks[0], *receivers))))
        sent = sum(s.get("parameters", 0) for s in exchange_json(comm, comm.ledger.take()))
        assert sent == (2 * (len(ranks) - 1) + len(receivers)) * tensor.nbytes, ranks


@case
def nothing_leaves_without_a_purpose(comm: Communicator) -> None:
    tensor = torch.ones(3)
    with pytest.raises(RuntimeError, match="without a declared purpose"):
        comm.all_reduce(tensor, EVERYBODY)
    with pytest.raises(RuntimeError, match="without a declared purpose"):
        comm.broadcast(tensor, 0, EVERYBODY)
    with pytest.raises(RuntimeError, match="without a declared purpose"):
        comm.send(tensor, (comm.rank + 1) % comm.size)
    assert tensor.tolist() == [1, 1, 1]


@case
def exchange_is_in_rank_order(comm: Communicator) -> None:
    for turn in range(5):
        value = bytes([comm.rank]) * (turn * 100 + comm.rank)  # rank 0 begins with an empty one
        assert comm.exchange(value) == [bytes([r]) * (turn * 100 + r) for r in EVERYBODY]
    large = bytes([comm.rank]) * 3_000_000
    assert comm.exchange(large) == [bytes([r]) * 3_000_000 for r in EVERYBODY]


@case
def errors_of_one_are_raised_on_all(comm: Communicator) -> None:
    agree(comm)
    with pytest.raises(UserError, match="^data.root: nothing there$"):
        agree(comm, UserError("data.root: nothing there") if comm.rank == 2 else None)
    with pytest.raises(RunError, match="^bad luck; client 3$"):
        agree(comm, {1: RunError("bad luck"), 3: UserError("client 3")}.get(comm.rank))


@case
def averages_of_many_clients(comm: Communicator) -> None:
    """Ordered: bit-equal to the sum in client order on one rank. Fast: within rounding of it."""
    clients, weights = 9, {c: c + 1.0 for c in range(9)}
    sizes = dict(zip(PARTS, (1021, 203, 77), strict=True))
    starts = {"encoder": 0, "bottleneck": 1021, "decoder": 1224}
    slices = {part: slice(starts[part], starts[part] + sizes[part]) for part in PARTS}
    fresh = [torch.randn(1301, generator=torch.Generator().manual_seed(c)) for c in range(clients)]
    for round in range(1, 4):
        plan = plan_round("usplit", clients, round, seed=7)
        for ordered in (True, False):
            out = torch.zeros(1301)
            average = Aggregation(plan, weights, out, slices, neighbours(clients, comm.size), comm, ordered)
            for client in hosted_by(comm.rank, clients, comm.size):
                average.add(client, fresh[client])
            average.finish()
            for part, reporters in plan.reporters.items():
                total = sum(weights[c] for c in reporters)
                terms = [fresh[c][slices[part]] * (weights[c] / total) for c in reporters]
                expected = terms[0]
                for term in terms[1:]:
                    expected = expected + term
                if ordered:
                    assert torch.equal(out[slices[part]], expected), (round, part)
                else:
                    torch.testing.assert_close(out[slices[part]], expected)


@case
def several_sums_at_once(comm: Communicator) -> None:
    """Reporters, receivers and those who are neither, in chunks smaller than a tensor, each to the byte."""
    whole, transfers.CHUNK_BYTES = transfers.CHUNK_BYTES, 44
    wanted = [((0, 1), (2, 3)), ((3,), (0, 1, 2)), ((0, 2, 3), (1,)), ((1, 2), ()), (EVERYBODY, ()), ((1,), (0, 3))]
    comm.ledger.take()
    try:
        tensors = [ramp(size) * (comm.rank + 1) for size in (1021, 3, 202, 101, 500, 1)]
        with comm.ledger.purpose("parameters"):
            comm.combine([Sum(t, *ranks) for t, ranks in zip(tensors, wanted, strict=True)])
    finally:
        transfers.CHUNK_BYTES = whole
    for tensor, (reporters, receivers) in zip(tensors, wanted, strict=True):
        factor = sum(r + 1 for r in reporters) if comm.rank in reporters + receivers else comm.rank + 1
        assert torch.equal(tensor, ramp(len(tensor)) * factor), (reporters, receivers)
    sent = sum(s.get("parameters", 0) for s in exchange_json(comm, comm.ledger.take()))
    planned = ((2 * (len(r) - 1) + len(m)) * t.nbytes for t, (r, m) in zip(tensors, wanted, strict=True))
    assert sent == sum(planned)


@case
def weighted_sums(comm: Communicator) -> None:
    """Of all ranks, and of some for the others; again and again, in place."""
    weights = {0: 1.0, 1: 2.0, 2: 3.0, 3: 0.5}
    for reporters, receivers, factor in ((EVERYBODY, (), 6.5), ((0, 1, 2), (3,), 6.0)):
        tensor = torch.empty(300_007)
        for turn in range(5):
            tensor.fill_(comm.rank + turn)
            with comm.ledger.purpose("parameters"):
                comm.combine([Sum(tensor, reporters, receivers, weights)])
            total = sum(weights[r] * r for r in reporters) + factor * turn
            assert tensor.unique().tolist() == [total], (reporters, turn)
    comm.ledger.take()
