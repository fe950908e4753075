"""Say what a run will communicate and need, without training: reporters, N, saving, bytes, time, memory."""

from __future__ import annotations

import json as json_module
from statistics import mean
from typing import Any

from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation import (
    GIB,
    Memory,
    count_images,
    forecast_run,
    infer_image_shape,
    memory_of_rank,
    methods_table,
)
from fdiff.plan import NeedsImages


def run(config: Config, *, json: bool = False, ranks: int | None = None, bandwidth: float | None = None) -> None:
    """Print the plan.

    Args:
        json: Print one JSON object instead of a table.
        ranks: Ranks among which the clients are spread; by default one for each client.
        bandwidth: Bandwidth of each rank's link in Mbit/s, to say how long the collectives take.
    """
    clients = config.federation.clients
    ranks = clients if ranks is None else ranks
    if not 1 <= ranks <= clients:
        raise UserError(f"--ranks: {ranks} is not valid; it must be between 1 and federation.clients = {clients}")
    if bandwidth is not None and not bandwidth > 0:
        raise UserError(f"--bandwidth: {bandwidth} is not valid; it must be greater than 0 Mbit/s")
    config = _with_image_shape(config)
    images = None
    try:
        cost = forecast_run(config, ranks, bandwidth)
    except NeedsImages:
        images = count_images(config)
        cost = forecast_run(config, ranks, bandwidth, images)
    if json:
        print(json_module.dumps(cost))
        return
    sizes = cost["parameters"]
    print(f"parameters  {'  '.join(f'{part} {n:,}' for part, n in sizes.items())}")
    for row in cost["rounds"]:
        reporters = "  ".join(f"{part} {_names(r)}" for part, r in row["reporters"].items())
        print(f"round {row['round']:3}  {row['wire_bytes']:>13,} bytes  reporters: {reporters}")
    sent = "  ".join(f"{purpose} {n:,}" for purpose, n in cost["bytes_by_purpose"].items() if n)
    print(f"\nbytes on the wire: {sent or 0}")
    if "compression" in cost:
        print(_compression(cost["compression"], config))
    print(f"{config.method}: N = {cost['communicated_parameters']:,} parameters, {cost['saving']:.1%} less than full")
    if config.federation.fraction < 1:
        print("N counts the selected clients only; the bytes count every rank, as each sum reaches all")
    if bandwidth:
        print(_time(cost, bandwidth))
    print(_memory(memory_of_rank(config, 0, ranks)))
    print(f"\nall methods, {config.federation.rounds} rounds, {clients} clients on {ranks} ranks:")
    print(methods_table(config, ranks, images))


def _with_image_shape(config: Config) -> Config:
    """The configuration with the images' shape; the images are opened only where nothing else tells it."""
    try:
        return infer_image_shape(config, SoloCommunicator())
    except UserError as error:
        raise UserError(f"{error}; or give --data.image_side and --data.channels, to plan without images") from None


def _names(clients: list[int]) -> str:
    """All of a few; of many their number."""
    return ",".join(map(str, clients)) if len(clients) <= 16 else f"{len(clients)} clients"


def _compression(made: dict[str, Any], config: Config) -> str:
    bits = ", ".join(f"{part} {b:.2f}" for part, b in made["bits_per_value"].items())
    lines = [f"{made['kind']}: bits a value: {bits}; {made['share_of_dense']:.3f} of the bytes without compression"]
    if config.optim.ema and made["kind"] != "quantize":
        lines.append("moving averages travel whole: only quantize compresses them")
    if made["share_of_dense"] >= 1:
        lines.append("warning: this compression saves no bytes; use a smaller compression.fraction, or another kind")
    return "\n".join(lines)


def _time(cost: dict[str, Any], bandwidth: float) -> str:
    each = [row["seconds"] for row in cost["rounds"]]
    return (
        f"collectives at {bandwidth:g} Mbit/s a rank: {mean(each):.3g} s a round, {sum(each):.3g} s in all; "
        "see fdiff/comm/README.md"
    )


def _memory(budget: Memory) -> str:
    return (
        f"memory of rank 0, at least: {budget.device / GIB:.2f} GiB on its device ({budget.activations / GIB:.2f} of "
        f"it for a step's activations), {budget.host / GIB:.2f} GiB on the host ({budget.clients / GIB:.2f} for its "
        "clients); images come on top"
    )
