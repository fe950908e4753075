"""`fdiff bench step --variants`: the step in other arithmetics, executions, layouts and batches, in one call.

Each is a configuration that `fdiff train` takes. They are measured one after the other beside one plain loop, each in
its own arithmetic's roofline; one that fails is named and the others go on.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fdiff.bench.baseline import Baseline, as_plain
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.bench.step import NOTE, STEPS, epochs_of, limit_of, pixels, title
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.errors import one_line
from fdiff.runtime import allow_tf32

__all__ = ["NOTE", "chosen", "choices", "measure", "run"]

log = logging.getLogger(__name__)

REPEATS, WARMUP = 5, 2
PLAIN_REPEATS = 3  # of the plain loop, whose epochs are long
Choice = dict[str, Any]  # fields of `runtime`, and `batches`: by what the batch is multiplied

# What is most worth knowing first: a call that has little time ends before the last ones.
ON_GPU: list[Choice] = [
    {"execution": "captured"},
    {"execution": "captured", "precision": "tf32"},
    {"execution": "captured", "precision": "bf16"},
    {"execution": "eager"},
    {"execution": "captured", "precision": "tf32", "layout": "channels-last"},
    {"execution": "captured", "precision": "bf16", "layout": "channels-last"},
    {"execution": "captured", "precision": "tf32", "batches": 4},
    {"execution": "compiled", "precision": "tf32"},
    {"execution": "compiled"},
    {"execution": "compiled", "precision": "bf16"},
]
ON_CPU: list[Choice] = [
    {"execution": "eager"},
    {"execution": "eager", "layout": "channels-first"},
    {"execution": "eager", "precision": "bf16"},
    {"execution": "eager", "batches": 4},
    {"execution": "compiled"},
]


def choices(device: torch.device) -> list[Choice]:
    """The variants that there are on a device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def chosen(config: Config, choice: Choice) -> Config:
    """The configuration of a variant."""
    runtime = {name: value for name, value in choice.items() if name != "batches"}
    batch = config.optim.batch_size * choice.get("batches", 1)
    return replace(
        config, runtime=replace(config.runtime, **runtime), optim=replace(config.optim, batch_size=batch)
    )


def measure(
    config: Config, comm: Communicator, device: torch.device, until: float = float("inf")
) -> Iterator[tuple[Config, list[Result] | str]]:
    """Each variant's images/s beside the plain loop and beside its roofline, or why it could not be measured.

    A variant that would begin after `until`, of `time.monotonic`, is not.
    """
    config = as_plain(config)
    plain = _plain(config, comm, device)
    for choice in choices(device):
        variant = chosen(config, choice)
        if time.monotonic() > until:
            yield variant, "not reached in the time that there was"
            continue
        try:
            with _arithmetic(variant):
                yield variant, _beside(plain, variant, comm, device)
        except Exception as error:  # a compiler that is not there, memory that does not suffice
            yield variant, str(one_line(error))
        _forget(device)


def _plain(config: Config, comm: Communicator, device: torch.device) -> list[float]:
    images = STEPS[device.type] * config.optim.batch_size
    with _arithmetic(config), Baseline(config, device, pixels(config, images)) as baseline:
        taken = in_turns({"plain": lambda: baseline.call("train", 1, 1)}, comm, device, PLAIN_REPEATS)["plain"]
    return [images / s for s in taken]


def _beside(plain: list[float], config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    epoch, images = epochs_of(config, device)
    taken = in_turns({"ours": epoch}, comm, device, REPEATS, WARMUP)["ours"]
    ours = [images / s for s in taken]
    return [
        compare(title(config), ours, plain, "baseline", "images/s"),
        compare(f"{title(config)}, roofline", ours, [limit_of(config, device)], "bound", "images/s"),
    ]


@contextmanager
def _arithmetic(config: Config) -> Iterator[None]:
    """Float32 products in a variant's arithmetic, which is the process's; afterwards as before."""
    before = allow_tf32(config.runtime.precision == "tf32")
    try:
        yield
    finally:
        allow_tf32(before)


def _forget(device: torch.device) -> None:
    """Give back what a variant took, and what a compiler knows of it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Of all that can be measured the results; the others are named in a line each."""
    results: list[Result] = []
    for variant, found in measure(config, comm, device):
        if isinstance(found, str):
            log.warning("%s: %s", title(variant), found)
        else:
            results += found
    return results
