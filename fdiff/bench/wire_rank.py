"""One rank of `fdiff bench wire`: python -m fdiff.bench.wire_rank CONFIG MBIT_PER_S, in a network of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from fdiff.bench import no_training
from fdiff.bench.measure import Result, compare, in_turns, slowest
from fdiff.bench.network import INTERFACE
from fdiff.bench.wire import as_rows
from fdiff.comm import Collectives, Communicator, Sum, connect, exchange_json
from fdiff.config import Config, from_dict
from fdiff.federation import bytes_by_purpose, plan_of, seconds
from fdiff.model import parts_of
from fdiff.plan import RoundPlan, methods_for, neighbours, reporting_ranks
from fdiff.runtime import launcher, set_up

ROUNDS, WARMUP = 6, 2
HEADERS = 66  # bytes of Ethernet, IPv4 and TCP with time stamps in front of each packet that the kernel counts


def main(file: str, mbit_per_s: str) -> None:
    """Measure all methods with a client a rank; rank 0 prints the results as JSON."""
    launch = launcher.detect()
    config = from_dict(yaml.safe_load(Path(file).read_text()))
    device = set_up(config.runtime, launch)
    comm = connect(config.runtime, launch)
    comm.open(device)
    methods = methods_for(parts_of(config))
    results = [r for method in methods for r in measure(replace(config, method=method), comm, float(mbit_per_s))]
    if comm.rank == 0:
        print(json.dumps(as_rows(results)))
    comm.close()


def measure(config: Config, comm: Communicator, mbit_per_s: float) -> list[Result]:
    """Bytes and time of a method's rounds."""
    config = no_training.quiet(config, comm.size)
    with no_training.federation(config, comm, torch.device("cpu")) as federation:
        payload, placement = federation.rank.payload, federation.rank.placement
        for round in range(1, WARMUP + 1):
            federation.round(round)
        plans = [_plan(config, WARMUP + 1 + i) for i in range(ROUNDS)]
        before, taken = _payload(), []
        for plan in plans:
            taken.append(federation.round(plan.round).seconds["aggregate"])
        sent = sum(exchange_json(comm, _payload() - before))
    ours = slowest(comm, {"ours": taken})["ours"]
    forecast = [seconds(plan, config, payload, placement, mbit_per_s) for plan in plans]
    planned = sum(bytes_by_purpose(plan, config, payload, placement)["parameters"] for plan in plans)
    compressed = config.compression.kind != "none"
    sums = {"library": _library(plans, payload.sizes, comm)}
    if compressed:  # those bytes, as they would travel without being encoded and decoded
        words = {p: -(-payload.of_one(p, len(plans[0].reporters.get(p, (0,)))) // 4) for p in payload.sizes}
        sums["collectives"] = _library(plans, words, comm)
    taken = in_turns(sums, comm, torch.device("cpu"), ROUNDS)
    library = taken["library"]
    name = f"{config.method}, {comm.size} ranks, {mbit_per_s:g} Mbit/s"
    return [
        compare(f"{name}: bytes a round", [sent / ROUNDS], [planned / ROUNDS], "bound", "bytes"),
        compare(f"{name}: time", ours, forecast, "bound", "s"),
        compare(f"{name}: beside library{', uncompressed' * compressed}", ours, library, "baseline", "s"),
        *[compare(f"{name}: {key} alone", taken[key], library, "baseline", "s") for key in taken if key != "library"],
    ]


def _plan(config: Config, round: int) -> RoundPlan:
    return plan_of(config, round, parts_of(config))


def _payload() -> int:
    """Bytes that this rank has sent, without the headers."""
    count = {n: int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_{n}").read_text()) for n in ("bytes", "packets")}
    return count["bytes"] - HEADERS * count["packets"]


def _library(plans: list[RoundPlan], sizes: dict[str, int], comm: Communicator) -> Callable[[], None]:
    """A function that sums the next round's parts, each time another one's, by the library's own collectives."""
    tensors = {part: torch.ones(size) for part, size in sizes.items()}
    rounds = [
        [
            Sum(tensors[part], those, tuple(r for r in range(comm.size) if r not in those))
            for part, reporters in plan.reporters.items()
            if (those := reporting_ranks(reporters, neighbours(comm.size, comm.size)))
        ]
        for plan in plans
    ]
    turn = iter(rounds * 10)
    assert isinstance(comm, Collectives)

    def carry_out() -> None:
        with comm.ledger.purpose("statistics"):
            for one in next(turn):
                comm.by_library(one)

    return carry_out


if __name__ == "__main__":
    main(*sys.argv[1:])
