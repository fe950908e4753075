"""Who sends what in a sum, and how long it takes: the shares of all ranks fit, and the forecast adds them up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdiff.config import preset
from fdiff.forecast import GOODPUT, forecast, seconds, sizes_of
from fdiff.plan import SHARED_PARTS, plan_round
from fdiff.schedule import PHASES, loads, phases

sizes = st.integers(0, 200)


@st.composite
def groups(draw) -> tuple[list[int], list[int]]:
    """Reporters, at least one, and receivers, among up to nine ranks."""
    kinds = draw(st.lists(st.sampled_from("rm-"), min_size=1, max_size=9).filter(lambda k: "r" in k))
    return [i for i, k in enumerate(kinds) if k == "r"], [i for i, k in enumerate(kinds) if k == "m"]


def count(spans) -> int:
    return sum(stop - start for _, (start, stop) in spans)


@given(sizes, groups())
def test_what_one_sends_the_other_receives_in_the_same_phase(size, those):
    shares = {rank: phases(size, *those, rank) for rank in range(9)}
    for at in range(PHASES):
        sent = sorted((a, b, span) for a, share in shares.items() for b, span in share[at].sends)
        received = sorted((a, b, span) for b, share in shares.items() for a, span in share[at].receives)
        assert sent == received


@given(sizes, groups())
def test_every_element_is_owned_once_and_the_bytes_are_the_closed_form(size, those):
    reporters, receivers = those
    shares = [phases(size, *those, rank) for rank in range(9)]
    owned = sorted(share[0].owns for share in shares if share[0].owns is not None)
    assert [e for start, stop in owned for e in range(start, stop)] == list(range(size))
    total = sum(count(phase.sends) for share in shares for phase in share)
    assert total == (2 * (len(reporters) - 1) + len(receivers)) * size


@given(sizes, groups())
def test_loads_are_what_the_phases_add_up_to(size, those):
    found = loads(size, *those)
    assert set(found) == set(those[0]) | set(those[1])
    for rank, load in found.items():
        share = phases(size, *those, rank)
        assert load == [(count(phase.sends), count(phase.receives)) for phase in share]


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
    slow, fast = (forecast(config, 6, bandwidth)["rounds"] for bandwidth in (100, 200))
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
    cost = forecast(config_of("udec", 1024), 1024, 10_000)
    assert cost["rounds"][0]["seconds"] == pytest.approx(2 * 716_297 * 4 * 8 / (1e10 * GOODPUT), rel=0.01)
