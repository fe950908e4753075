"""What a run will communicate, known before it starts: parameters by part, N, saving, bytes on the wire, time.

Trains nothing and needs no data set: everything follows from the plan and from the model's layout.

Time is that of the busiest link, phase by phase (see `schedule`): each rank has one of its own, which carries both
directions at once. What the processors need to copy and to add is not in it, nor that phases may overlap. Bytes and
time are nominal, those of a ring: a library's all-reduce may move otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fdiff.comm import PHASES, Ledger, loads
from fdiff.config import Config
from fdiff.federation.sample_batches import grid_batches
from fdiff.model import sizes_of
from fdiff.plan import (
    RoundPlan,
    communicated_parameters,
    count_new,
    methods_for,
    plan_round,
    reporting_ranks,
    shared_parts,
    wire_bytes,
)

Images = Mapping[int, int] | None  # training images of each client, where they are known

GOODPUT = 1448 / 1538  # of a link: what TCP over IPv4 leaves of an Ethernet frame of 1500 bytes and the gap behind it


def itemsize(config: Config) -> int:
    """Bytes of a parameter."""
    return 8 if config.runtime.precision == "float64" else 4


def plan_of(config: Config, round: int, parts: Sequence[str], images: Images = None) -> RoundPlan:
    """The plan of a round, of a model with these parts; NeedsImages where a method asks for `images` that are None."""
    fed = config.federation
    return plan_round(config.method, fed.clients, round, config.run.seed, fed.fraction, tuple(parts), images)


def plans(config: Config, parts: Sequence[str], images: Images = None) -> list[RoundPlan]:
    """The plans of all rounds."""
    return [plan_of(config, round, parts, images) for round in range(1, config.federation.rounds + 1)]


def forecast_run(
    config: Config, ranks: int, bandwidth: float | None = None, images: Images = None
) -> dict[str, Any]:
    """The whole run's communication on so many ranks, as `fdiff plan --json` prints it.

    With the bandwidth of a rank's link, in Mbit/s, also the time of the collectives, as `seconds` of each round.
    """
    sizes = sizes_of(config)
    planned = plans(config, tuple(sizes), images)
    by_purpose = [bytes_by_purpose(plan, config, sizes, ranks) for plan in planned]
    rounds = [
        {
            "round": plan.round,
            "reporters": {part: list(reporters) for part, reporters in plan.reporters.items()},
            "parameters": communicated_parameters(plan, sizes, new),
            "wire_bytes": sum(sent.values()),
            **({"seconds": seconds(plan, config, sizes, ranks, bandwidth)} if bandwidth else {}),
        }
        for plan, new, sent in zip(planned, count_new(planned), by_purpose, strict=True)
    ]
    moved, full = sum(r["parameters"] for r in rounds), _parameters_of_full(config, sizes)
    return {
        "parameters": {**sizes, "total": sum(sizes.values())},
        "communicated_parameters": moved,
        "communicated_parameters_full": full,
        "saving": 1 - moved / full,
        "wire_bytes": sum(r["wire_bytes"] for r in rounds),
        "bytes_by_purpose": {purpose: sum(sent[purpose] for sent in by_purpose) for purpose in Ledger.PURPOSES},
        "rounds": rounds,
    }


def averages_ema(config: Config, round: int) -> bool:
    """Whether the moving averages of this round are averaged: where they are sampled or saved."""
    return bool(config.optim.ema) and (config.samples(round) or config.saves(round))


def bytes_by_purpose(plan: RoundPlan, config: Config, sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Payload bytes that all ranks together send in a round, for each of the ledger's purposes.

    A round sends no statistics, which are those of `fdiff evaluate`.
    """
    parameters = wire_bytes(plan, sizes, config.federation.clients, ranks, itemsize(config))
    ema = parameters if averages_ema(config, plan.round) else 0
    by_client = len(plan.reporters) < len(sizes)
    pictures = _bytes_of_grid(config, by_client, ranks) if config.samples(plan.round) else 0
    return {"parameters": parameters, "ema": ema, "statistics": 0, "pictures": pictures}


def _bytes_of_grid(config: Config, by_client: bool, ranks: int) -> int:
    """Bytes of the images of a sample grid that rank 0 does not draw itself."""
    sent = sum(batch.last - batch.first for batch in grid_batches(config, by_client, ranks) if batch.rank != 0)
    return sent * math.prod(config.data.shape)


def seconds(plan: RoundPlan, config: Config, sizes: Mapping[str, int], ranks: int, bandwidth: float) -> float:
    """Time of a round's sums if every rank's link has so many Mbit/s."""
    clients, elements = config.federation.clients, 0
    segments = [
        (sum(sizes[part] for part in parts), reporting_ranks(reporters, clients, ranks))
        for parts, reporters in plan.segments()
    ]
    if config.runtime.reduction == "ordered":  # each sum is passed on from rank to rank, then delivered
        for size, those in segments:
            elements += (len(those) - 1) * size + _busiest([(size, those[-1:])], ranks)
    else:
        elements = _busiest(segments, ranks)
    sums = 2 if averages_ema(config, plan.round) else 1
    return sums * elements * itemsize(config) * 8 / (bandwidth * 1e6 * GOODPUT)


def _busiest(segments: Sequence[tuple[int, Sequence[int]]], ranks: int) -> int:
    """Elements over the busiest link, phase by phase, of sums of so many elements over those ranks, all at once."""
    total = [[[0, 0] for _ in range(ranks)] for _ in range(PHASES)]
    for size, reporters in segments:
        receivers = sorted(set(range(ranks)) - set(reporters))
        for rank, phases in loads(size, reporters, receivers).items():
            for at, (sent, received) in enumerate(phases):
                total[at][rank][0] += sent
                total[at][rank][1] += received
    return sum(max(max(link) for link in phase) for phase in total)


def _parameters_of_full(config: Config, sizes: Mapping[str, int]) -> int:
    planned = plans(replace(config, method="full"), tuple(sizes))
    return sum(communicated_parameters(plan, sizes, new) for plan, new in zip(planned, count_new(planned), strict=True))


def methods_table(config: Config, ranks: int, images: Images = None) -> str:
    """A line for each method: what it shares, N, saving against FULL, bytes on the wire on so many ranks."""
    parts = tuple(sizes_of(config))
    shared = {method: ", ".join(shared_parts(method, parts)) for method in dict.fromkeys(
        [*methods_for(parts), config.method]
    )}
    name, what = max(map(len, ("ulatdec", *shared))) + 1, max(28, *map(len, shared.values()))
    lines = [f"{'method':{name}} {'shared parts':{what}} {'N (parameters)':>15} {'saving':>7} {'wire bytes':>15}"]
    for method, those in shared.items():
        cost = forecast_run(replace(config, method=method), ranks, images=images)
        lines.append(
            f"{method:{name}} {those:{what}} {cost['communicated_parameters']:>15,} {cost['saving']:>7.1%} "
            f"{cost['wire_bytes']:>15,}"
        )
    return "\n".join(lines)
