"""How anything is timed here: in turns beside what it is held against, with warm-up, median and spread.

The device is waited for at the two ends of a timed span and nowhere inside. On several ranks all begin together, and
a span takes as long as on the slowest of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fdiff.comm import Communicator, exchange_json, transports

Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """A measured quantity, median and spread (interquartile range) of its repeats, beside a baseline or a bound."""

    name: str
    median: float
    spread: float
    beside: float
    kind: Literal["baseline", "bound"]
    unit: str

    @property
    def ratio(self) -> float:
        """Ours over the baseline or bound."""
        return self.median / self.beside

    def as_json(self) -> dict[str, Any]:
        """Its object in `fdiff bench --json`."""
        return {
            "name": self.name,
            "ours": self.median,
            self.kind: self.beside,
            "ratio": self.ratio,
            "unit": self.unit,
            "median": self.median,
            "spread": self.spread,
        }


def compare(
    name: str,
    ours: Sequence[float],
    beside: Sequence[float],
    kind: Literal["baseline", "bound"],
    unit: str,
) -> Result:
    """The result of two series of measurements in the same unit."""
    low, median, high = np.percentile(ours, (25, 50, 75))
    return Result(name, float(median), float(high - low), float(np.median(beside)), kind, unit)


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    comm: Communicator,
    device: torch.device,
    repeats: int,
    warmup: int = 1,
) -> Seconds:
    """Seconds of each action in each repeat, all actions once a repeat, each time another one first.

    Every rank calls it with the same names, and gets the slowest rank's times.
    """
    taken: Seconds = {name: [] for name in actions}
    names = list(actions)
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _timed(actions[name], comm, device)
            if turn >= 0:
                taken[name].append(seconds)
    return slowest(comm, taken)


def slowest(comm: Communicator, taken: Seconds) -> Seconds:
    """Of all ranks' times the longest, repeat by repeat."""
    everyone = exchange_json(comm, taken)
    return {name: list(map(max, zip(*(each[name] for each in everyone), strict=True))) for name in taken}


def _timed(action: Callable[[], object], comm: Communicator, device: torch.device) -> float:
    synchronise(device)
    align(comm, device)
    began = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def align(comm: Communicator, device: torch.device) -> None:
    """Let all ranks go on at once: a vote alone lets them leave milliseconds apart."""
    comm.exchange(b"")
    with comm.ledger.purpose("statistics"):
        comm.all_reduce(torch.zeros(1, device=device), range(comm.size))
    synchronise(device)


def machine(comm: Communicator, device: torch.device) -> dict[str, Any]:
    """What the figures depend on: the device, cores, threads and ranks, versions. Not the host's name."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks": comm.size,
        "communicator": comm.name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mpi": transports().mpi,
    }


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def table(results: Sequence[Result], about: Mapping[str, Any], note: str = "") -> str:
    """The results for a reader, what is to be said of them, and the machine in a last line."""
    width = max(44, *(len(r.name) for r in results)) if results else 44
    lines = [f"{'':{width}} {'ours':>12} {'± spread':>10} {'beside':>12} {'':8} {'unit':9} {'ratio':>8}"]
    lines += [
        f"{r.name:{width}} {r.median:12.4g} {r.spread:10.2g} {r.beside:12.4g} {r.kind:8} {r.unit:9} {r.ratio:8.3f}"
        for r in results
    ]
    lines += ["", note] if note else [""]
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in about.items() if v is not None)])
