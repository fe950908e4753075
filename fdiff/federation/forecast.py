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
from fdiff.compression import Payload, payload_for
from fdiff.config import CompressionConfig, Config
from fdiff.errors import UserError
from fdiff.federation.compressed import compresses, kept_by_federation
from fdiff.federation.sample_batches import grid_batches
from fdiff.model import describe_model, frozen_parts, layout_of, sizes_of
from fdiff.plan import (
    Placement,
    RoundPlan,
    balanced,
    communicated_parameters,
    count_new,
    idle_share,
    methods_for,
    neighbours,
    plan_round,
    reporting_ranks,
    select_clients,
    shared_parts,
    wire_bytes,
)

Images = Mapping[int, int] | None  # training images of each client, where they are known

ROUNDS_LOOKED_AT = 100  # of a run, for how long ranks wait
GOODPUT = 1448 / 1538  # of a link: what TCP over IPv4 leaves of an Ethernet frame of 1500 bytes and the gap behind it


def itemsize(config: Config) -> int:
    """Bytes of a parameter."""
    return 8 if config.runtime.precision == "float64" else 4


def plan_of(config: Config, round: int, parts: Sequence[str], images: Images = None) -> RoundPlan:
    """The plan of a round, of a model with these parts; NeedsImages where a method asks for `images` that are None."""
    fed = config.federation
    seed, frozen = config.run.seed, frozen_parts(config)
    return plan_round(config.method, fed.clients, round, seed, fed.fraction, tuple(parts), images, frozen)


def plans(config: Config, parts: Sequence[str], images: Images = None) -> list[RoundPlan]:
    """The plans of all rounds."""
    return [plan_of(config, round, parts, images) for round in range(1, config.federation.rounds + 1)]


def placement_for(config: Config, ranks: int, images: Images = None) -> Placement:
    """On which rank each client is, for the whole run: balanced by images where they are known and that shortens it.

    Neighbours with private silos, which each rank opens for itself, and with `ordered`, whose sums follow the ranks.
    """
    stays = config.data.partition == "private" or config.runtime.reduction == "ordered"
    return neighbours(config.federation.clients, ranks) if images is None or stays else balanced(images, ranks)


def forecast_run(
    config: Config, ranks: int, bandwidth: float | None = None, images: Images = None
) -> dict[str, Any]:
    """The whole run's communication on so many ranks, as `fdiff plan --json` prints it.

    With the bandwidth of a rank's link, in Mbit/s, also the time of the collectives, as `seconds` of each round.
    """
    payload = payload_of(config)
    sizes = payload.sizes
    shared = shared_parts(config.method, tuple(sizes), frozen_parts(config))
    kept_by_federation(config, payload.layout, shared)  # or there is nothing to do
    planned = plans(config, tuple(sizes), images)
    placement = placement_for(config, ranks, images)
    by_purpose = [bytes_by_purpose(plan, config, payload, placement) for plan in planned]
    rounds = [
        {
            "round": plan.round,
            "reporters": {part: list(reporters) for part, reporters in plan.reporters.items()},
            "parameters": communicated(plan, payload, new),
            "wire_bytes": sum(sent.values()),
            **({"seconds": seconds(plan, config, payload, placement, bandwidth)} if bandwidth else {}),
        }
        for plan, new, sent in zip(planned, count_new(planned), by_purpose, strict=True)
    ]
    moved, full = sum(r["parameters"] for r in rounds), _parameters_of_full(config, sizes)
    return {
        "parameters": {**sizes, "total": sum(sizes.values())},
        **_compressed(config, payload, planned[0], placement),
        **_idle(planned, images, placement),
        "communicated_parameters": moved,
        "communicated_parameters_full": full,
        "saving": 1 - moved / full,
        "wire_bytes": sum(r["wire_bytes"] for r in rounds),
        "bytes_by_purpose": {purpose: sum(sent[purpose] for sent in by_purpose) for purpose in Ledger.PURPOSES},
        "never_selected": never_selected(config, planned),
        "rounds": rounds,
    }


def payload_of(config: Config) -> Payload:
    """The bytes that stand for each part of the configured model; takes no memory for it."""
    return payload_for(config.compression, layout_of(describe_model(config)), itemsize(config))


def communicated(plan: RoundPlan, payload: Payload, new: int) -> int:
    """The round's share of N, in parameters of this run's precision, as `plan.communicated_parameters` counts.

    With compression what it takes to send as many bytes: the whole model to clients selected for the first time, what
    stands for the sums to the others, and what stands for its own parts from each reporter.
    """
    if payload.config.kind == "none":
        return communicated_parameters(plan, payload.sizes, new)
    parts = {part: len(reporters) for part, reporters in plan.reporters.items()}
    down = sum(payload.of_sum(part, r) for part, r in parts.items()) * (len(plan.selected) - new)
    up = sum(r * payload.of_one(part, r) for part, r in parts.items())
    return new * sum(payload.sizes.values()) + math.ceil((down + up) / payload.itemsize)


def _idle(planned: Sequence[RoundPlan], images: Images, placement: Placement) -> dict[str, Any]:
    """The share of their time in which ranks wait for the slowest, as clients are placed and as neighbours.

    Of clients alike in size where nobody knows their images.
    """
    images = images or dict.fromkeys(range(len(placement)), 1)
    selected, plain = [plan.selected for plan in planned], neighbours(len(images), max(placement) + 1)
    shares = {"balanced": idle_share(selected, images, placement), "neighbours": idle_share(selected, images, plain)}
    return {"idle": shares}


def idle_note(config: Config, placement: Placement, images: Images = None) -> str:
    """Which ranks wait for others while clients train, and how many ranks would not; "" where hardly any does.

    Of clients alike in size where nobody knows their images.
    """
    fed, ranks = config.federation, max(placement) + 1
    sizes = images or dict.fromkeys(range(fed.clients), 1)
    rounds = range(1, min(fed.rounds, ROUNDS_LOOKED_AT) + 1)
    selected = [select_clients(fed.clients, round, config.run.seed, fed.fraction) for round in rounds]
    share = idle_share(selected, sizes, placement)
    if share < 0.005:
        return ""
    note = f"{fed.clients} clients on {ranks} ranks: ranks wait for the slowest for {share:.0%} of the training time"
    most = max(placement.count(rank) for rank in range(ranks))
    short = sum(placement.count(rank) < most for rank in range(ranks))
    if fed.fraction < 1 or not short or max(sizes.values()) > min(sizes.values()) + 1:
        return note
    fewest, more = math.ceil(fed.clients / most), math.ceil(fed.clients / (most - 1))
    note += f"; ranks with nothing to do for 1/{most} of each round: {short}"
    same = f"{fewest} ranks as long, " if fewest < ranks else ""
    return f"{note}; it would take {same}{more} ranks {math.ceil(fed.clients / more)}/{most} of the time"


def _compressed(config: Config, payload: Payload, first: RoundPlan, placement: Placement) -> dict[str, Any]:
    """What compression makes of a value of each part that the first round shares, in bits, and of the bytes sent.

    Nothing without it; no share where nothing is sent.
    """
    if config.compression.kind == "none":
        return {}
    parts = {part: len(reporters) for part, reporters in first.reporters.items()}
    bits = {part: 8 * payload.of_one(part, r) / payload.sizes[part] for part, r in parts.items()}
    dense = wire_bytes(first, payload.sizes, placement, payload.itemsize)
    share = bytes_by_purpose(first, config, payload, placement)["parameters"] / dense if dense else None
    return {"compression": {"kind": config.compression.kind, "bits_per_value": bits, "share_of_dense": share}}


def never_selected(config: Config, planned: Sequence[RoundPlan]) -> list[int]:
    """The clients that no round selects: with private parts they have a model that nobody ever trained."""
    selected = {client for plan in planned for client in plan.selected}
    return [client for client in range(config.federation.clients) if client not in selected]


def averages_ema(config: Config, round: int) -> bool:
    """Whether the moving averages of this round are averaged: where they are sampled or saved."""
    return bool(config.optim.ema) and (config.samples(round) or config.saves(round))


def bytes_by_purpose(plan: RoundPlan, config: Config, payload: Payload, placement: Placement) -> dict[str, int]:
    """Payload bytes that all ranks together send in a round, for each of the ledger's purposes.

    A round sends no statistics, which are those of `fdiff evaluate`.
    """
    parameters = sum(
        payload.sent(part, len(reporters), len(reporting_ranks(reporters, placement)), max(placement) + 1)
        for part, reporters in plan.reporters.items()
    )
    whole = wire_bytes(plan, payload.sizes, placement, payload.itemsize)
    ema = (parameters if compresses(config, "ema") else whole) if averages_ema(config, plan.round) else 0
    by_client = len(plan.reporters) < len(payload.sizes)
    pictures = _bytes_of_grid(config, by_client, placement) if config.samples(plan.round) else 0
    return {"parameters": parameters, "ema": ema, "statistics": 0, "pictures": pictures}


def _bytes_of_grid(config: Config, by_client: bool, placement: Placement) -> int:
    """Bytes of the images of a sample grid that rank 0 does not draw itself."""
    sent = sum(batch.last - batch.first for batch in grid_batches(config, by_client, placement) if batch.rank != 0)
    return sent * math.prod(config.data.shape) * config.data.itemsize


def seconds(plan: RoundPlan, config: Config, payload: Payload, placement: Placement, bandwidth: float) -> float:
    """Time of a round's sums if every rank's link has so many Mbit/s."""
    sent = _busiest_bytes(plan, config, payload, placement)
    if averages_ema(config, plan.round):
        whole = Payload(CompressionConfig(), payload.slots, payload.itemsize)
        sent += sent if compresses(config, "ema") else _busiest_bytes(plan, config, whole, placement)
    return sent * 8 / (bandwidth * 1e6 * GOODPUT)


def _busiest_bytes(plan: RoundPlan, config: Config, payload: Payload, placement: Placement) -> int:
    """Bytes over the busiest link in a round's sums of parameters."""
    ranks = max(placement) + 1
    segments = [
        (sum(payload.of_one(part, len(reporters)) for part in parts), reporting_ranks(reporters, placement))
        for parts, reporters in plan.segments()
    ]
    if payload.config.kind == "top-k":  # each client's pairs go to all ranks, one after the other
        pairs = sum(payload.of_one(part, 1) * len(reporters) for part, reporters in plan.reporters.items())
        return pairs if ranks > 1 else 0
    if config.runtime.reduction == "ordered" and payload.config.kind != "quantize":
        # Each sum is passed on from rank to rank, then delivered.
        return sum((len(those) - 1) * size + _busiest([(size, those[-1:])], ranks) for size, those in segments)
    return _busiest(segments, ranks)


def _busiest(segments: Sequence[tuple[int, Sequence[int]]], ranks: int) -> int:
    """Bytes over the busiest link, phase by phase, of sums of so many bytes over those ranks, all at once."""
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
    parts, frozen = tuple(sizes_of(config)), frozen_parts(config)
    shared = {method: ", ".join(shared_parts(method, parts, frozen)) for method in dict.fromkeys(
        [*methods_for(parts), config.method]
    )}
    name, what = max(map(len, ("ulatdec", *shared))) + 1, max(28, *map(len, shared.values()))
    lines = [f"{'method':{name}} {'shared parts':{what}} {'N (parameters)':>15} {'saving':>7} {'wire bytes':>15}"]
    for method, those in shared.items():
        try:
            cost = forecast_run(replace(config, method=method), ranks, images=images)
        except UserError as error:  # what it shares may be nothing for this compression
            lines.append(f"{method:{name}} {error}")
            continue
        lines.append(
            f"{method:{name}} {those:{what}} {cost['communicated_parameters']:>15,} {cost['saving']:>7.1%} "
            f"{cost['wire_bytes']:>15,}"
        )
    return "\n".join(lines)
