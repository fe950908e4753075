"""Who sends what in a sum, and how long it takes: the shares of all ranks fit, and the forecast adds them up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdiff.comm.schedule import PHASES, Hop, hops, loads
from fdiff.config import preset
from fdiff.federation.forecast import GOODPUT, forecast_run, seconds, sizes_of
from fdiff.plan import SHARED_PARTS, plan_round

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


# --- time ----------------------------------------------------------------------------------------------------------


def config_of(method: str, clients: int, reduction: str = "fast"):
    config = replace(preset(f"fmnist-k{clients}"), method=method)
    return replace(config, runtime=replace(config.runtime, reduction=reduction))


def test_full_takes_two_phases_of_all_but_the_own_share():
    config = config_of("full", 4)
    total = sum(sizes_of(config).values())
    link = 2 * (total - total // 4) * 4 * 8 / (100e6 * GOODPUT)
    plan = plan_round("full", 4, 1, 0)
    assert seconds(plan, config, sizes_of(config), 4, 100) == pytest.approx(link, rel=1e-5)


def test_one_reporter_sends_each_receiver_its_piece_and_they_the_rest():
    config = config_of("udec", 3)
    plan = plan_round("udec", 3, 1, 0).without({1, 2})
    decoder = sizes_of(config)["decoder"] * 4 * 8 / (1000e6 * GOODPUT)
    assert seconds(plan, config, sizes_of(config), 3, 1000) == pytest.approx(1.5 * decoder, rel=1e-4)


@pytest.mark.parametrize("method", SHARED_PARTS)
@pytest.mark.parametrize("reduction", ["fast", "ordered"])
def test_time_falls_with_bandwidth_and_no_link_carries_less_than_its_share(method, reduction):
    config = config_of(method, 6, reduction)
    slow, fast = (forecast_run(config, 6, bandwidth)["rounds"] for bandwidth in (100, 200))
    for one, other in zip(slow, fast, strict=True):
        assert one["seconds"] == pytest.approx(2 * other["seconds"])
        assert one["seconds"] >= one["wire_bytes"] / 6 * 8 / (100e6 * GOODPUT)


@pytest.mark.parametrize("clients", [2, 4, 8])
def test_the_sums_of_usplit_at_once_take_less_than_one_after_the_other(clients):
    """Even if those were rings whose deliveries are perfect pipelines."""
    config = config_of("usplit", clients)
    sizes = sizes_of(config)
    for round in range(1, 6):
        plan = plan_round("usplit", clients, round, 0)
        rings = sum((2 * (1 - 1 / len(r)) + 1) * sizes[part] for part, r in plan.reporters.items())
        ring_s = rings * 4 * 8 / (100e6 * GOODPUT)
        assert seconds(plan, config, sizes, clients, 100) < 0.8 * ring_s


def test_a_thousand_ranks():
    cost = forecast_run(config_of("udec", 1024), 1024, 10_000)
    assert cost["rounds"][0]["seconds"] == pytest.approx(2 * 716_297 * 4 * 8 / (1e10 * GOODPUT), rel=0.01)
