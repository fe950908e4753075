"""How long a round takes over links of some bandwidth: what the schedule of its sums adds up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fdiff.config import OptimConfig, RunConfig, SampleConfig
from fdiff.federation.forecast import GOODPUT, forecast_run, payload_of, seconds
from fdiff.model import sizes_of
from fdiff.plan import METHODS, neighbours, plan_round
from fdiff.presets import preset


def config_of(method: str, clients: int, reduction: str = "fast"):
    config = replace(preset(f"fmnist-k{clients}"), method=method)
    runtime = replace(config.runtime, reduction=reduction)
    return replace(config, runtime=runtime, sample=replace(config.sample, every=0))


def test_full_takes_two_phases_of_all_but_the_own_share():
    config = config_of("full", 4)
    total = sum(sizes_of(config).values())
    link = 2 * (total - total // 4) * 4 * 8 / (100e6 * GOODPUT)
    plan = plan_round("full", 4, 1, 0)
    assert seconds(plan, config, payload_of(config), neighbours(4, 4), 100) == pytest.approx(link, rel=1e-5)


def test_one_reporter_sends_each_receiver_its_piece_and_they_the_rest():
    config = config_of("udec", 3)
    plan = plan_round("udec", 3, 1, 0).without({1, 2})
    decoder = sizes_of(config)["decoder"] * 4 * 8 / (1000e6 * GOODPUT)
    assert seconds(plan, config, payload_of(config), neighbours(3, 3), 1000) == pytest.approx(1.5 * decoder, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
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
        assert seconds(plan, config, payload_of(config), neighbours(clients, clients), 100) < 0.8 * ring_s


def test_a_thousand_ranks():
    cost = forecast_run(config_of("udec", 1024), 1024, 10_000)
    assert cost["rounds"][0]["seconds"] == pytest.approx(2 * 716_297 * 4 * 8 / (1e10 * GOODPUT), rel=0.01)


def test_moving_averages_and_pictures_are_planned_where_they_are_sampled_or_saved():
    config = replace(preset("mini"), sample=SampleConfig(every=4), run=RunConfig(checkpoint_every=3))
    plain = replace(config, optim=OptimConfig(), sample=SampleConfig(every=0))
    planned, without = forecast_run(config, 2), forecast_run(plain, 2)
    extra = [a["wire_bytes"] - b["wire_bytes"] for a, b in zip(planned["rounds"], without["rounds"], strict=True)]
    decoder, grid = without["rounds"][0]["wire_bytes"], 16 * 16 * 16
    saved, sampled = {3, 6, 9, 12, 14}, {4, 8, 12, 14}
    assert extra == [decoder * (r in saved | sampled) + grid * (r in sampled) for r in range(1, 15)]
