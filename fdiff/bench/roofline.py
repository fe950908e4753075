"""How fast a training step could be: its counted work against what this device was seen to do with work of that kind.

Every convolution, matrix product and attention takes at least its operations at the best rate of its kind, and at least
the bytes of its operands and results at the best rate of a copy; so does Adam. The rates are those of the step's own
operations, forwards and backwards, in its shapes, in both layouts, and of large matrix products and copies of several
sizes, each by itself and the best of several times: no operation of a step is faster. All else (norms, activations,
softmax, casts, the loss, the batch, gaps between kernels) is taken to be fused into them and to cost nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fdiff.bench.measure import synchronise
from fdiff.config import Config, RuntimeConfig
from fdiff.federation import Trainer

aten = torch.ops.aten
NOTE = "the roofline counts convolutions, products, attention, Adam; not norms, activations, softmax, loss, casts, gaps"
MATRICES = {"cpu": (1024, 2048), "cuda": (2048, 8192)}
COPIES = {"cpu": (1 << 20, 1 << 24, 1 << 28), "cuda": (1 << 22, 1 << 24, 1 << 26, 1 << 30)}  # bytes, in caches and out
LARGEST = 4  # operations of each kind that are timed, by their floating-point operations
REPEATS, AT_ONCE = 4, {"cpu": 1, "cuda": 20}  # the best of so many times of so many calls
DENSE, DEPTHWISE = "dense", "depthwise"


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations, bytes of its operands and results, its kind, and how to do it again."""

    flops: float
    bytes: float
    kind: str = DENSE
    again: Callable[[torch.device, torch.dtype, bool], Callable[[], object]] | None = None


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do: floating-point operations a second by kind, and bytes a second."""

    flops_per_s: dict[str, float]
    bytes_per_s: float

    def seconds(self, work: Iterable[Work]) -> float:
        """The least time for these operations one after the other."""
        return sum(max(w.flops / self.flops_per_s[w.kind], w.bytes / self.bytes_per_s) for w in work)


# --- what a step is made of ------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Notes in `work` the products that run inside it, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if (flops := _flops(op, args, out)) is not None:
            moved = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
            self.work.append(Work(flops, sum(t.nbytes for t in moved), _kind(op, args), _recipe(op, args)))
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


def _kind(op: Any, args: Any) -> str:
    """Depthwise convolutions do little with each value: they have a ceiling of their own."""
    groups = {aten.convolution.default: 8, aten.convolution_backward.default: 9}.get(op)
    return DEPTHWISE if groups is not None and args[groups] > 1 else DENSE


def _recipe(op: Any, args: Any) -> Callable[[torch.device, torch.dtype, bool], Callable[[], object]] | None:
    """How to do the same on fresh random values of a device, dtype and layout; None of an attention."""
    if "scaled_dot_product" in str(op):
        return None
    shapes = tree_map_only(Tensor, lambda t: t.to("meta"), args)

    def again(device: torch.device, dtype: torch.dtype, channels_last: bool) -> Callable[[], object]:
        def made(like: Tensor) -> Tensor:
            values = torch.randn(like.shape, device=device).to(dtype)
            last = channels_last and values.dim() == 4
            return values.contiguous(memory_format=torch.channels_last) if last else values

        made_args = tree_map_only(Tensor, made, shapes)
        return lambda: op(*made_args)

    return again


def step_work(config: Config) -> list[Work]:
    """The operations of one training step; counted on the CPU, where every product passes in one thread.

    Their bytes are those of the arithmetic in use; Adam's are always those of the parameters.
    """
    work, adam = _count(replace(config, runtime=RuntimeConfig(execution="eager")))
    width = dtype_of(config.runtime.precision).itemsize / 4
    return [*(replace(w, bytes=width * w.bytes) for w in work), adam]


@lru_cache(maxsize=2)
def _count(config: Config) -> tuple[list[Work], Work]:
    """The products of a step in float32, and Adam."""
    trainer, data = Trainer(config, torch.device("cpu")), config.data
    batch = torch.zeros(config.optim.batch_size, *data.shape, dtype=torch.uint8)
    with Counter() as counter:
        trainer.step(batch, torch.zeros(len(batch), dtype=torch.int64))
    flat = trainer.buckets.flat
    return counter.work, Work(12.0 * len(flat), 7.0 * flat.nbytes)  # Adam reads 4 and writes 3


def dtype_of(precision: str) -> torch.dtype:
    """What products are computed in under that `runtime.precision`."""
    return {"bf16": torch.bfloat16, "float64": torch.float64}.get(precision, torch.float32)


# --- what the device does --------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype, work: Sequence[Work]) -> Ceilings:
    """Measured now, in the float32 arithmetic that is set: the best rate of each kind of work, and of a copy."""
    rates = {DENSE: max(_product_rate(size, device, dtype) for size in MATRICES[device.type]), DEPTHWISE: 0.0}
    for kind in rates:
        for one in _largest(work, kind):
            for channels_last in (False, True):
                assert one.again is not None
                seconds = _best(one.again(device, dtype, channels_last), device)
                rates[kind] = max(rates[kind], one.flops / seconds)
    return Ceilings(rates, max(_copy_rate(size, device) for size in COPIES[device.type]))


def _largest(work: Sequence[Work], kind: str) -> list[Work]:
    """Of a kind those with the most operations, one of each amount: the same shapes come again and again."""
    distinct = {w.flops: w for w in work if w.kind == kind and w.again is not None}
    return [distinct[flops] for flops in sorted(distinct, reverse=True)[:LARGEST]]


def _product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device)


def _copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _best(lambda: target.copy_(source), device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, waited for once for several where launches would be measured."""
    times, seconds = AT_ONCE[device.type], []
    for _ in range(REPEATS):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(times):
            action()
        synchronise(device)
        seconds.append((time.perf_counter() - began) / times)
    return min(seconds)
