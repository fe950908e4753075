"""Who sends what in a sum: the shares of all ranks fit, and the loads add them up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fdiff.comm.schedule import PHASES, Hop, hops, loads

sizes = st.integers(0, 200)


@st.composite
def groups(draw) -> tuple[list[int], list[int]]:
    """Reporters, at least one, and receivers, among up to nine ranks."""
    kinds = draw(st.lists(st.sampled_from("rm-"), min_size=1, max_size=9).filter(lambda k: "r" in k))
    return [i for i, k in enumerate(kinds) if k == "r"], [i for i, k in enumerate(kinds) if k == "m"]


def shares_of(size: int, those: tuple[list[int], list[int]]) -> dict[int, list[list[Hop]]]:
    return {rank: hops(size, *those, rank) for rank in range(9)}


@given(sizes, groups())
def test_what_one_sends_in_a_step_the_other_expects_in_the_next_in_the_same_order(size, those):
    shares = shares_of(size, those)
    for a, sender in shares.items():
        for b, receiver in shares.items():
            sent = [[hop.span for hop in step if b in hop.to] for step in sender] + [[]] * 20
            got = [[hop.span for hop in step if hop.source == a] for step in receiver] + [[]] * 20
            assert [[], *sent[:19]] == got[:20], (a, b)


@given(sizes, groups())
def test_following_the_hops_sums_over_all_reporters_and_delivers_to_all_receivers(size, those):
    """A rank's tensor is the set of ranks whose share is in it: none may be counted twice."""
    reporters, receivers = those
    shares = shares_of(size, those)
    here = {rank: [frozenset({rank})] * size for rank in shares}
    moving: dict[tuple[int, int, tuple[int, int]], list[frozenset[int]]] = {}
    for step in range(20):
        arrived, moving = moving, {}
        for rank, share in shares.items():
            for hop in share[step] if step < len(share) else ():
                span = slice(*hop.span)
                if hop.source is not None:
                    term = arrived.pop((hop.source, rank, hop.span))
                    mine = here[rank][span] if hop.adds else [frozenset()] * len(term)
                    assert not any(a & b for a, b in zip(term, mine, strict=True))
                    here[rank][span] = [a | b for a, b in zip(term, mine, strict=True)]
                for to in hop.to:
                    moving[rank, to, hop.span] = here[rank][span]
        assert not arrived
    for rank, terms in here.items():
        whole = set(reporters) if rank in reporters + receivers else {rank}
        assert all(term == whole for term in terms)


@given(sizes, groups())
def test_the_bytes_are_the_closed_form(size, those):
    reporters, receivers = those
    total = sum(
        (stop - start) * len(hop.to)
        for share in shares_of(size, those).values()
        for step in share
        for hop in step
        for start, stop in [hop.span]
    )
    assert total == (2 * (len(reporters) - 1) + len(receivers)) * size


@given(sizes, groups())
def test_loads_are_what_the_hops_add_up_to(size, those):
    reporters, receivers = those
    found = loads(size, *those)
    assert set(found) == set(reporters) | set(receivers)
    ring = len(reporters)
    for rank, share in shares_of(size, those).items():
        load = [[0, 0] for _ in range(PHASES)]
        for step, here in enumerate(share):
            # What is sent in a step arrives in the next: a rank spreads its sum as soon as it is complete.
            reports = rank in reporters
            sending, receiving = (step >= ring - 1, step >= ring) if reports else (2, 1 + (step > ring))
            for hop in here:
                elements = hop.span[1] - hop.span[0]
                load[sending][0] += elements * len(hop.to)
                load[receiving][1] += elements if hop.source is not None else 0
        assert rank not in found or [tuple(pair) for pair in load] == found[rank]
