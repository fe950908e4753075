"""How fast a training step could be: its counted products and bytes against what this device was seen to do.

Every convolution, matrix product and attention takes at least its operations at the measured rate of a matrix
product, and at least the bytes of its operands and results at the measured rate of a copy; so does Adam. All else
is taken to be fused into them and to cost nothing: a limit that nothing reaches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdiff.bench.measure import synchronise
from fdiff.config import Config
from fdiff.federation import Trainer

aten = torch.ops.aten
MATRIX, COPY_BYTES, REPEATS = 2048, 1 << 28, 5


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations, and bytes of its operands and results."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do: floating-point operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, work: Sequence[Work]) -> float:
        """The least time for these operations one after the other."""
        return sum(max(w.flops / self.flops_per_s, w.bytes / self.bytes_per_s) for w in work)


class Counter(TorchDispatchMode):
    """Notes in `work` the products that run inside it, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if (flops := _flops(op, args, out)) is not None:
            moved = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
            self.work.append(Work(flops, sum(t.nbytes for t in moved)))
        return out


def _flops(op: Any, args: Any, out: Any) -> float | None:
    """Of a product; None of anything else."""
    if op in (aten.mm.default, aten.bmm.default):
        return 2.0 * args[0].numel() * args[1].shape[-1]
    if op in (aten.addmm.default, aten.baddbmm.default):
        return 2.0 * args[1].numel() * args[2].shape[-1]
    if op == aten.convolution.default:
        return _convolution(args[0] if args[6] else out, args[1])
    if op == aten.convolution_backward.default:
        gradient, x, weight, transposed, wanted = *args[:3], args[7], args[10]
        return sum(wanted[:2]) * _convolution(x if transposed else gradient, weight)
    if "scaled_dot_product" in str(op):
        q, k = args[1:3] if "backward" in str(op) else args[:2]
        return (10.0 if "backward" in str(op) else 4.0) * q.numel() * k.shape[-2]
    return None


def _convolution(narrow: Tensor, weight: Tensor) -> float:
    """A multiplication and an addition for each pixel of the side that the kernel is laid on, and each weight."""
    return 2.0 * narrow.numel() * math.prod(weight.shape[1:])


def step_work(config: Config) -> list[Work]:
    """The operations of one training step; counted on the CPU, where every product passes in one thread."""
    counted = replace(config, runtime=replace(config.runtime, precision="float32"))
    trainer, data = Trainer(counted, torch.device("cpu")), config.data
    batch = torch.zeros(config.optim.batch_size, data.channels, data.image_side, data.image_side, dtype=torch.uint8)
    with Counter() as counter:
        trainer.step(batch, torch.zeros(len(batch), dtype=torch.int64))
    adam = Work(12.0 * len(trainer.buckets.flat), 7.0 * trainer.buckets.flat.nbytes)  # reads 4, writes 3
    return [*counter.work, adam]


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured now: the best of a large matrix product, also written as a 1×1 convolution, and of a large copy."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    image, kernel = a.t().reshape(1, MATRIX, 64, -1).contiguous(memory_format=torch.channels_last), b[:, :, None, None]
    product = min(_best(lambda: a @ b, device), _best(lambda: torch.conv2d(image, kernel), device))
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(2.0 * MATRIX**3 / product, 2.0 * COPY_BYTES / _best(lambda: target.copy_(source), device))


def _best(action: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        synchronise(device)
        began = time.perf_counter()
        action()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
