"""The round plans as pure functions: who reports what, for any clients and seeds, and what the paper's figures say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdiff.config import Config, FederationConfig
from fdiff.federation.forecast import forecast_run
from fdiff.model import PARTS, sizes_of
from fdiff.plan import (
    METHODS,
    communicated_parameters,
    count_new,
    host_of,
    hosted_by,
    is_first,
    neighbours,
    plan_round,
    reporting_ranks,
    shared_parts,
    wire_bytes,
)
from fdiff.presets import preset

SIZES = {"encoder": 1_280_642, "bottleneck": 999_376, "decoder": 716_297}
seeds = st.integers(0, 2**62)
clients = st.integers(1, 11)
rounds = st.integers(1, 50)
fractions = st.floats(0.01, 1.0)


def parts_of(plan, client) -> set[str]:
    return {part for part, reporters in plan.reporters.items() if client in reporters}


@given(st.sampled_from(list(METHODS)), clients, rounds, seeds, fractions)
def test_selection_is_a_sorted_subset_of_the_right_size(method, k, round, seed, fraction):
    plan = plan_round(method, k, round, seed, fraction)
    assert list(plan.selected) == sorted(set(plan.selected))
    assert set(plan.selected) <= set(range(k))
    assert len(plan.selected) == max(1, int(fraction * k + 0.5))
    assert plan == plan_round(method, k, round, seed, fraction)


@given(st.sampled_from(["full", "ulatdec", "udec"]), clients, rounds, seeds, fractions)
def test_every_selected_client_reports_every_shared_part(method, k, round, seed, fraction):
    plan = plan_round(method, k, round, seed, fraction)
    assert plan.reporters == {part: plan.selected for part in shared_parts(method)}


@given(clients, rounds, seeds, fractions)
def test_usplit_pairs_the_selected_clients(k, round, seed, fraction):
    plan = plan_round("usplit", k, round, seed, fraction)
    assert tuple(plan.reporters) == PARTS and all(plan.reporters.values())
    kinds = Counter(frozenset(parts_of(plan, client)) for client in plan.selected)
    pairs, odd = divmod(len(plan.selected), 2)
    if len(plan.selected) == 1:
        assert kinds == {frozenset(PARTS): 1}
        return
    encoders, decoders = len(plan.reporters["encoder"]), len(plan.reporters["decoder"])
    assert len(plan.reporters["bottleneck"]) == pairs + odd
    assert sorted((encoders, decoders)) == sorted((pairs, pairs + odd))
    # One of a pair has the bottleneck beside its part; the odd client has it beside one of the other two.
    ends = [frozenset({"encoder"}), frozenset({"decoder"})]
    middles = [end | {"bottleneck"} for end in ends]
    assert sum(kinds[end] for end in ends) == pairs
    assert sum(kinds[middle] for middle in middles) == pairs + odd
    assert set(kinds) <= {*ends, *middles}


def test_usplit_pairs_differ_between_rounds_and_seeds():
    plans = [plan_round("usplit", 10, round, seed).reporters["encoder"] for round in range(1, 21) for seed in range(3)]
    assert len(set(plans)) > 50  # of 252 ways to choose five of ten
    assert set().union(*plans) == set(range(10))
    bottlenecks = Counter(c for r in range(1, 201) for c in plan_round("usplit", 4, r, 0).reporters["bottleneck"])
    assert all(70 < bottlenecks[c] < 130 for c in range(4))  # 100 expected, deviation 7


@given(clients, st.integers(1, 11))
def test_hosting_gives_neighbours_to_a_rank_and_knows_them(k, ranks):
    ranks = min(ranks, k)
    hosted = [list(hosted_by(rank, k, ranks)) for rank in range(ranks)]
    assert sum(hosted, []) == list(range(k))
    assert max(map(len, hosted)) == -(-k // ranks) and min(map(len, hosted)) >= 1
    assert all(host_of(client, k, ranks) == rank for rank, own in enumerate(hosted) for client in own)


@given(st.sampled_from(list(METHODS)), clients, st.integers(1, 11), rounds, seeds, fractions)
def test_wire_bytes_follow_the_closed_form(method, k, ranks, round, seed, fraction):
    ranks = min(ranks, k)
    plan = plan_round(method, k, round, seed, fraction)
    expected = 0
    for part, reporters in plan.reporters.items():
        r = len(reporting_ranks(reporters, neighbours(k, ranks)))
        expected += (2 * (r - 1) + ranks - r) * SIZES[part] * 4
    assert wire_bytes(plan, SIZES, neighbours(k, ranks)) == expected


def test_usplit_with_four_clients_moves_two_thirds_of_full():
    full = wire_bytes(plan_round("full", 4, 1, 0), SIZES, neighbours(4, 4))
    for round in range(1, 20):
        assert wire_bytes(plan_round("usplit", 4, round, 0), SIZES, neighbours(4, 4)) == full * 2 // 3


@pytest.mark.parametrize("method, saving", [("full", 0.0), ("usplit", 25.0), ("ulatdec", 41.3), ("udec", 73.6)])
def test_savings_are_the_papers(method, saving):
    config = replace(preset("fmnist-k10"), method=method)
    assert sizes_of(config) == SIZES
    assert round(100 * forecast_run(config, ranks=10)["saving"], 1) == saving


def test_a_first_round_downloads_the_whole_model():
    plan = plan_round("udec", 3, 1, 0)
    later = plan_round("udec", 3, 2, 0)
    assert count_new([plan, later]) == [3, 0]
    assert communicated_parameters(plan, SIZES, 3) == 3 * (sum(SIZES.values()) + SIZES["decoder"])
    assert communicated_parameters(later, SIZES, 0) == 3 * 2 * SIZES["decoder"]


@pytest.mark.parametrize("method", METHODS)
def test_with_a_fraction_only_selected_clients_count_and_download_the_model_once(method):
    """The authors' count: the whole model when a client is first selected, the shared parts whenever it is again."""
    plans = [plan_round(method, 10, round, 3, 0.3) for round in range(1, 9)]
    total, shared = sum(SIZES.values()), sum(SIZES[part] for part in shared_parts(method))
    seen: set[int] = set()
    for plan, new in zip(plans, count_new(plans), strict=True):
        expected = sum(shared if client in seen else total for client in plan.selected)
        expected += sum(SIZES[part] for part in shared_parts(method) for _ in plan.reporters[part])
        assert new == sum(is_first(10, plan.round, 3, 0.3, client) for client in plan.selected)
        seen.update(plan.selected)
        assert communicated_parameters(plan, SIZES, new) == expected
    config = Config(method=method, federation=FederationConfig(clients=10, rounds=8, fraction=0.3))
    moved = [communicated_parameters(p, sizes_of(config), n) for p, n in zip(plans, count_new(plans), strict=True)]
    planned = forecast_run(replace(config, run=replace(config.run, seed=3)), 5)
    assert [row["parameters"] for row in planned["rounds"]] == moved


def test_neighbouring_parts_with_the_same_reporters_are_one_segment():
    assert plan_round("full", 4, 1, 0).segments() == [(PARTS, (0, 1, 2, 3))]
    assert plan_round("usplit", 1, 1, 0).segments() == [(PARTS, (0,))]
    for round in range(1, 20):
        plan = plan_round("usplit", 4, round, 0)
        assert sum((parts for parts, _ in plan.segments()), ()) == PARTS
        assert all(plan.reporters[p] == reporters for parts, reporters in plan.segments() for p in parts)
