"""Say what a run will communicate and need, without training: reporters, N, saving, bytes, time, memory."""

from __future__ import annotations

import itertools
import json as json_module
import logging
import re
from dataclasses import replace
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
    idle_note,
    infer_image_shape,
    memory_of_rank,
    methods_table,
    placement_for,
)
from fdiff.model import parts_of
from fdiff.plan import NeedsImages, hosted_at, methods_for

log = logging.getLogger(__name__)


def run(
    config: Config,
    *,
    json: bool = False,
    ranks: int | None = None,
    bandwidth: float | None = None,
    clients: str | None = None,
) -> None:
    """Print the plan.

    Args:
        clients: Instead of the plan, how N, bytes and memory of each method grow with so many clients: 1,10,100,1000.
        json: Print one JSON object instead of a table.
        ranks: Ranks among which the clients are spread; by default one for each client.
        bandwidth: Bandwidth of each rank's link in Mbit/s, to say how long the collectives take.
    """
    if clients is not None:
        if json or bandwidth is not None:
            raise UserError("--clients: is a table of its own; leave out --json and --bandwidth")
        if ranks is not None and ranks < 1:
            raise UserError(f"--ranks: {ranks} is not valid; it must be at least 1")
        print(_growth(_with_image_shape(config), _counts(clients), ranks))
        return
    total = config.federation.clients
    ranks = total if ranks is None else ranks
    if not 1 <= ranks <= total:
        raise UserError(f"--ranks: {ranks} is not valid; it must be between 1 and federation.clients = {total}")
    if bandwidth is not None and not bandwidth > 0:
        raise UserError(f"--bandwidth: {bandwidth} is not valid; it must be greater than 0 Mbit/s")
    config = _with_image_shape(config)
    images = _images(config, ranks)
    try:
        cost = forecast_run(config, ranks, bandwidth, images)
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
        if never := cost["never_selected"]:
            which = f": {_names(never)}" if len(never) <= 16 else ""
            print(f"{len(never)} of {total} clients are never selected{which}")
    if bandwidth:
        print(_time(cost, bandwidth))
    placement = placement_for(config, ranks, images)
    most = max(len(hosted_at(placement, rank)) for rank in range(ranks))
    print(_memory(memory_of_rank(config, 0, ranks, most), most))
    if note := idle_note(config, placement, images):
        print(note)
    if cost["idle"]["neighbours"] > cost["idle"]["balanced"]:
        print(f"with neighbours on a rank, in place of clients balanced by images: {cost['idle']['neighbours']:.0%}")
    print(f"\nall methods, {config.federation.rounds} rounds, {total} clients on {ranks} ranks:")
    print(methods_table(config, ranks, images))


def _counts(text: str) -> list[int]:
    """The numbers of `--clients`."""
    counts = [int(word) if re.fullmatch(r"\d{1,6}", word) else 0 for word in text.split(",")]
    if not all(1 <= count <= 100_000 for count in counts):
        raise UserError(f"--clients: {text!r} is not valid; give numbers between 1 and 100000, e.g. 1,10,100,1000")
    return counts


def _growth(config: Config, counts: list[int], ranks: int | None) -> str:
    """A table of N, bytes on the wire and host memory of a rank, by method and number of clients.

    On as many ranks as clients, or on so many at most; clients are alike in size.
    """
    head = "clients", "ranks", "method", "N (parameters)", "wire bytes", "host GiB a rank"
    lines = ["{:>8} {:>6} {:12} {:>18} {:>18} {:>16}".format(*head)]
    methods = dict.fromkeys([*methods_for(parts_of(config)), config.method])
    for count, method in itertools.product(counts, methods):
        on = min(count, ranks or count)
        of = replace(config, method=method, federation=replace(config.federation, clients=count))
        cost, memory = forecast_run(of, on, images=dict.fromkeys(range(count), 1)), memory_of_rank(of, 0, on)
        lines.append(
            f"{count:>8} {on:>6} {method:12} {cost['communicated_parameters']:>18,} {cost['wire_bytes']:>18,} "
            f"{memory.host / GIB:>16.3f}"
        )
    return "\n".join(lines)


def _with_image_shape(config: Config) -> Config:
    """The configuration with the images' shape; the images are opened only where nothing else tells it."""
    try:
        return infer_image_shape(config, SoloCommunicator())
    except UserError as error:
        raise UserError(f"{error}; or give --data.image_side and --data.channels, to plan without images") from None


def _images(config: Config, ranks: int) -> dict[int, int] | None:
    """Training images of each client, where unequal ones share ranks and the images are here."""
    if ranks == config.federation.clients or config.data.partition in ("iid", "private"):
        return None
    try:
        return count_images(config)
    except UserError as error:
        log.warning("clients are planned as neighbours on a rank, since nobody knows their sizes here: %s", error)
        return None


def _names(clients: list[int]) -> str:
    """All of a few; of many their number."""
    return ",".join(map(str, clients)) if len(clients) <= 16 else f"{len(clients)} clients"


def _compression(made: dict[str, Any], config: Config) -> str:
    bits = ", ".join(f"{part} {b:.2f}" for part, b in made["bits_per_value"].items())
    share = made["share_of_dense"]
    of_dense = "" if share is None else f"; {share:.3f} of the bytes without compression"
    lines = [f"{made['kind']}: bits a value: {bits}{of_dense}"]
    if config.optim.ema and made["kind"] != "quantize":
        lines.append("moving averages travel whole: only quantize compresses them")
    if share is not None and share >= 1:
        lines.append("warning: this compression saves no bytes; use a smaller compression.fraction, or another kind")
    return "\n".join(lines)


def _time(cost: dict[str, Any], bandwidth: float) -> str:
    each = [row["seconds"] for row in cost["rounds"]]
    return (
        f"collectives at {bandwidth:g} Mbit/s a rank: {mean(each):.3g} s a round, {sum(each):.3g} s in all; "
        "see fdiff/comm/README.md"
    )


def _memory(budget: Memory, clients: int) -> str:
    return (
        f"memory of a rank with {clients} clients, at least: {budget.device / GIB:.2f} GiB on its device "
        f"({budget.activations / GIB:.2f} of it for a step's activations), {budget.host / GIB:.2f} GiB on the host "
        f"({budget.clients / GIB:.2f} for its clients); images come on top"
    )
