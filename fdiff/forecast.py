"""What a run will communicate, known before it starts: parameters by part, N, saving, bytes on the wire, time.

Trains nothing and needs no data set: everything follows from the plan and from the model's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fdiff.buckets import layout_of, part_sizes
from fdiff.client import build_model
from fdiff.config import Config
from fdiff.plan import SHARED_PARTS, RoundPlan, communicated_parameters, plan_round, wire_bytes
from fdiff.unet import PARTS


def sizes_of(config: Config) -> dict[str, int]:
    """Parameters of each part of the configured model; takes no memory for them."""
    with torch.device("meta"):
        return part_sizes(layout_of(build_model(config), PARTS))


def itemsize(config: Config) -> int:
    """Bytes of a parameter."""
    return 8 if config.runtime.precision == "float64" else 4


def plans(config: Config) -> list[RoundPlan]:
    """The plans of all rounds."""
    fed, seed = config.federation, config.run.seed
    return [plan_round(config.method, fed.clients, r, seed, fed.fraction) for r in range(1, fed.rounds + 1)]


def forecast(config: Config, ranks: int) -> dict[str, Any]:
    """The whole run's communication on so many ranks, as `fdiff plan --json` prints it."""
    sizes, clients = sizes_of(config), config.federation.clients
    rounds = [
        {
            "round": plan.round,
            "reporters": {part: list(reporters) for part, reporters in plan.reporters.items()},
            "parameters": communicated_parameters(plan, sizes, clients),
            "wire_bytes": wire_bytes(plan, sizes, clients, ranks, itemsize(config)),
        }
        for plan in plans(config)
    ]
    moved, full = sum(r["parameters"] for r in rounds), _parameters_of_full(config, sizes)
    return {
        "parameters": {**sizes, "total": sum(sizes.values())},
        "communicated_parameters": moved,
        "communicated_parameters_full": full,
        "saving": 1 - moved / full,
        "wire_bytes": sum(r["wire_bytes"] for r in rounds),
        "rounds": rounds,
    }


def _parameters_of_full(config: Config, sizes: Mapping[str, int]) -> int:
    full = replace(config, method="full")
    return sum(communicated_parameters(plan, sizes, config.federation.clients) for plan in plans(full))


def methods_table(config: Config, ranks: int) -> str:
    """A line for each method: what it shares, N, saving against FULL, bytes on the wire on so many ranks."""
    lines = [f"{'method':8} {'shared parts':28} {'N (parameters)':>15} {'saving':>7} {'wire bytes':>15}"]
    for method, parts in SHARED_PARTS.items():
        cost = forecast(replace(config, method=method), ranks)
        lines.append(
            f"{method:8} {', '.join(parts):28} {cost['communicated_parameters']:>15,} {cost['saving']:>7.1%} "
            f"{cost['wire_bytes']:>15,}"
        )
    return "\n".join(lines)
