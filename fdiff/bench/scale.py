"""Many clients on few ranks: the time of a round, and the memory that they take, over the number of clients.

A tiny model, and two images a client, so that a round is what its clients cost beside their training. Start it on 1,
2 and 4 ranks: each call measures the ranks that it was given.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import numpy as np
import torch

from fdiff.bench import no_training
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config
from fdiff.federation import Federation, memory_of_rank
from fdiff.plan import idle_share, neighbours

CLIENTS = (1, 2, 5, 10, 20, 50, 100)
REPEATS, WARMUP = 3, 2
UNEQUAL = 8  # clients of quantity-skew, beta 1


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """A round's time for each number of clients beside the straight line through all, its slope, and the memory."""
    config = replace(
        config,
        method="udec",
        model=replace(config.model, dim=8, dim_mults=(1, 2), head_dim=8),
        optim=replace(config.optim, batch_size=2, ema=0.0),
    )
    numbers = [clients for clients in CLIENTS if clients >= comm.size]
    measured = [_measure(config, clients, comm, device) for clients in numbers]
    hosted = np.array([-(-clients // comm.size) for clients in numbers], dtype=float)
    times = [1e3 * float(np.median(seconds)) for seconds, _, _ in measured]
    slope, start = np.polyfit(hosted, times, 1)
    line = slope * hosted + start
    results = [
        compare(f"round, {clients} clients on {comm.size} ranks", [1e3 * s for s in seconds], [on_line], "bound", "ms")
        for clients, (seconds, _, _), on_line in zip(numbers, measured, line, strict=True)
    ]
    unexplained = float(np.sum((np.array(times) - line) ** 2) / np.sum((np.array(times) - np.mean(times)) ** 2))
    results.append(compare(f"a client more a rank: {slope:.3g} ms, R²", [1 - unexplained], [1.0], "bound", ""))
    held, planned = measured[-1][1:]
    results.append(compare(f"host memory of {numbers[-1]} clients", [held / 1e6], [planned / 1e6], "bound", "MB"))
    if comm.size > 1:
        results.append(_placement(config, comm, device))
    if device.type == "cuda":
        results.append(_device_memory(config, numbers, comm, device))
    return results


def _placement(config: Config, comm: Communicator, device: torch.device) -> Result:
    """A round of unequal clients that are balanced over the ranks, beside one with neighbours on a rank."""
    config = no_training.quiet(config, UNEQUAL)
    data = replace(config.data, partition="quantity-skew", beta=1.0, limit=None)
    config = replace(config, data=data, optim=replace(config.optim, batch_size=32))
    places = {"neighbours": lambda config, ranks, images: neighbours(len(images), ranks), "balanced": None}
    actions, waits = {}, {}
    with ExitStack() as stack:
        for name, place in places.items():
            federation = stack.enter_context(no_training.federation(config, comm, device, trains=True, place=place))
            numbers = count(1)
            actions[name] = lambda federation=federation, numbers=numbers: federation.round(next(numbers))
            rank = federation.rank
            waits[name] = idle_share([range(UNEQUAL)], rank.images, rank.placement)
        taken = in_turns(actions, comm, device, REPEATS, WARMUP)
    told = f"ranks wait {waits['balanced']:.0%} of the time instead of {waits['neighbours']:.0%}"
    milliseconds = {name: [1e3 * s for s in seconds] for name, seconds in taken.items()}
    name = f"round, {UNEQUAL} unequal clients balanced over {comm.size} ranks; {told}"
    return compare(name, milliseconds["balanced"], milliseconds["neighbours"], "baseline", "ms")


def _measure(config: Config, clients: int, comm: Communicator, device: torch.device) -> tuple[list[float], int, int]:
    """Seconds of rounds; bytes that the clients of all ranks hold on the host, and what the budget says of them."""
    config = no_training.quiet(config, clients)
    config = replace(config, data=replace(config.data, limit=2 * clients))
    with no_training.federation(config, comm, device, trains=True) as federation:
        rounds = count(1)
        taken = in_turns({"round": lambda: federation.round(next(rounds))}, comm, device, REPEATS, WARMUP)["round"]
        held = sum(exchange_json(comm, _held(federation)))
    return taken, held, sum(memory_of_rank(config, rank, comm.size).clients for rank in range(comm.size))


def _held(federation: Federation) -> int:
    return sum(t.nbytes for c in federation.rank.host.clients for kept in (c.parked, c.spare) for t in kept.values())


def _device_memory(config: Config, numbers: list[int], comm: Communicator, device: torch.device) -> Result:
    """The peak with the most clients, beside that with a few."""
    few = next(clients for clients in numbers if clients >= 2 * comm.size)
    peaks = []
    for clients in (numbers[-1], few):
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        _measure(config, clients, comm, device)
        peaks.append(torch.cuda.max_memory_allocated(device) / 1e6)
    return compare(f"device memory, {numbers[-1]} clients beside {few}", peaks[:1], peaks[1:], "bound", "MB")
