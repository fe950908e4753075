"""Step 3: thirty captured steps, and the kernels in which they spend their time.

Names and times are of the captured steps. A replayed kernel does not say which operation it belongs to; bytes and
floating-point operations come from one eager step, in which it does: bytes of the operation's operands, of which a
kernel may read only some.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from fdiff.bench.measure import synchronise
from fdiff.bench.step import client_of
from fdiff.config import Config
from fdiff.federation import Trainer
from tests.gpu.record import Record
from tests.gpu.sizes import paper

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting

STEPS, KERNELS = 30, 20


@dataclass
class Spent:
    """What all calls of a kernel came to: microseconds, bytes and floating-point operations."""

    calls: int = 0
    us: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0


def run(record: Record, setting: Setting) -> None:
    """The 20 kernels of the captured step that take longest, in float32."""
    config, execution = paper(setting), "eager" if setting.dry else "captured"
    if setting.dry:
        record.skip("captured steps: the profile is of eager ones")
    steps = 2 if setting.dry else STEPS
    captured = _profiled(_with(config, execution), setting, steps)
    record.add(f"{steps} {execution} steps")
    work = _by_kernel(_profiled(_with(config, "eager"), setting, 1), setting)
    spent = _by_kernel(captured, setting)
    record.add("bytes and operations, of an eager step", kernels=_rows(spent, work, steps))
    total = sum(s.us for s in spent.values())
    busiest = record.facts["kernels"][0] if spent else {"kernel": "none", "share": 0.0}
    table = {
        "kernels of a step": f"{sum(s.calls for s in spent.values()) // steps}, {total / steps / 1e3:.3g} ms in all",
        f"the busiest: `{busiest['kernel'][:60]}`": f"{busiest['share']:.1%} of the time",
    }
    record.add("table", table=table)


def _with(config: Config, execution: str) -> Config:
    return replace(config, runtime=replace(config.runtime, execution=execution))


def _profiled(config: Config, setting: Setting, steps: int) -> list[Any]:
    """The profiler's events of so many steps after two that warm up."""
    device = setting.device
    trainer, client = Trainer(config, device), client_of(config, config.optim.batch_size, device)
    trainer.prepare(client, 1)
    [(images, labels)] = client.shard.batches(torch.arange(len(client.shard)), config.optim.batch_size)
    for _ in range(2):
        trainer.step(images, labels)
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
        for _ in range(steps):
            trainer.step(images, labels)
        synchronise(device)
    return list(profiler.events())


def _by_kernel(events: list[Any], setting: Setting) -> dict[str, Spent]:
    """By a kernel's name; on a CPU an operation is its own kernel."""
    spent: dict[str, Spent] = defaultdict(Spent)
    for event in events:
        if setting.dry:
            _count(spent[event.name], event.self_cpu_time_total, event)
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            _count(spent[event.name], event.self_device_time_total, None)
        for kernel in () if setting.dry else event.kernels:
            _count(spent[kernel.name], 0.0, event, calls=0)
    return spent


def _count(spent: Spent, us: float, event: Any, calls: int = 1) -> None:
    spent.calls += calls
    spent.us += us
    if event is not None:
        shapes = [s for s in event.input_shapes or [] if s and all(isinstance(n, int) for n in s)]
        spent.bytes += 4.0 * sum(math.prod(s) for s in shapes)
        spent.flops += event.flops or 0


def _rows(spent: dict[str, Spent], work: dict[str, Spent], steps: int) -> list[dict[str, Any]]:
    """The longest ones, each with its share of the time and what a step of it moves and computes, where known."""
    total = sum(s.us for s in spent.values()) or 1.0
    longest = sorted(spent, key=lambda name: spent[name].us, reverse=True)[:KERNELS]
    return [
        {
            "kernel": name,
            "share": spent[name].us / total,
            "us_a_step": spent[name].us / steps,
            "calls_a_step": spent[name].calls / steps,
            "bytes_a_step": work[name].bytes if name in work else None,
            "flops_a_step": work[name].flops if name in work else None,
        }
        for name in longest
    ]
