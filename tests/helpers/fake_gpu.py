"""A GPU of fake tensors: what runs on it knows its device, dtypes and shapes, and computes nothing.

Inside `fake_gpu` the product runs as on one GPU, on a machine that has none. Two tensors of different devices or dtypes
in one operation are an error, as on a real one; where the host would wait for the device is written down.

It cannot see: values, so no numerical mistake; backward passes, which torch runs only where there is a driver (the
gradients stay what they were); kernels, graphs, streams and their order, for which calls stand in; memory that is freed
too early; a copy that is read before it is complete.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from called_graph import use_called_graphs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdiff.evaluation import extractors
from fdiff.federation import client
from fdiff.model import capture

GPU = torch.device("cuda", 0)
MEMORY_BYTES = 80 << 30
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)
ONE_DTYPE = (aten.convolution.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)


class Watch(TorchDispatchMode):
    """Says which lines of fdiff wait for the device, how often: `waits`, by module and function."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op in ONE_DTYPE:
            _check_dtypes(op, args)
        if op in COPIES and _waits(op, args, kwargs):
            self.waits[_caller()] += 1
        if op == aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        return op(*args, **kwargs)


def _waits(op: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation makes the host wait for the GPU: it reads a number, or copies between the two and says so.

    A copy to pageable memory waits even if it is asked not to; that of fake tensors is not known to be pinned.
    """
    if op == aten._local_scalar_dense.default:
        return args[0].is_cuda
    target = torch.device(kwargs.get("device") or args[0].device) if op == aten._to_copy.default else args[0].device
    source = args[0] if op == aten._to_copy.default else args[1]
    blocking = not (kwargs.get("non_blocking") or (op == aten.copy_.default and len(args) > 2 and args[2]))
    return blocking and target.type != source.device.type


class Draws(TorchFunctionMode):
    """A generator of another device is an error on a real GPU; fake tensors take any."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        wanted = torch.device(kwargs.get("device") or "cpu").type
        if generator is not None and wanted != (found := getattr(generator, "of_device", "cpu")):
            raise RuntimeError(f"Expected a {wanted!r} device type for generator but found {found!r}")
        return function(*args, **kwargs)


def _check_dtypes(op: Any, args: Any) -> None:
    """Products of two dtypes fail in the kernel, of which fake tensors have none."""
    found = {t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)}
    if len(found) > 1:
        raise RuntimeError(f"{op}: expected all tensors to have one dtype, but found {sorted(map(str, found))}")


def _caller() -> str:
    """The innermost function of fdiff that is running, as module.function."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("fdiff.") and not frame.f_code.co_name.startswith("<"):
            return f"{name.removeprefix('fdiff.')}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class AnyGenerator(torch.Generator):
    """A generator of the host that passes for one of the device that was asked for."""

    of_device: str

    def __new__(cls, device: Any = "cpu") -> AnyGenerator:
        generator = super().__new__(cls)
        generator.of_device = torch.device(device).type
        return generator


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Inside the block there is one GPU, `GPU`; `Watch` notes who waits for it."""
    watch = Watch()
    use_called_graphs(monkeypatch)
    monkeypatch.setattr(capture, "WARMUP", 1)
    _stand_in_for_cuda(monkeypatch, watch)
    _stand_in_for_tensors(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True), Draws(), watch:
        yield watch


def _stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    """The driver's answers."""

    def wait() -> None:
        watch.waits[_caller()] += 1

    properties = SimpleNamespace(name="fake GPU", uuid="0000")
    answers = {
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "current_stream": lambda device=None: SimpleNamespace(synchronize=wait),
        "synchronize": lambda device=None: wait(),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)


def _stand_in_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fake tensors lack: generators of a GPU, moves of modules, backward passes, views as numpy arrays."""
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    for name in ("_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, _with_any_rate(getattr(torch, name)))
    monkeypatch.setattr(client, "build_model", _on_gpu(client.build_model))
    monkeypatch.setattr(extractors, "FmnistCnn", _on_gpu(extractors.FmnistCnn))
    monkeypatch.setattr(extractors, "load_file", _not_fake(extractors.load_file))
    monkeypatch.setattr(nn.Module, "to", _move)
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(Tensor, "numpy", _as_array)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


def _on_gpu(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same, with new tensors on the GPU unless a line says otherwise."""

    def build_there(*arguments: Any) -> nn.Module:
        with torch.device(GPU):
            return build(*arguments)

    return build_there


def _with_any_rate(step: Callable[..., Any]) -> Callable[..., Any]:
    """The same, also with a learning rate on the device, for which there is a kernel but no fake one."""

    def take(*arguments: Any, lr: Any, **how: Any) -> Any:
        if isinstance(lr, Tensor):
            assert lr.is_cuda and lr.dtype == torch.float32 and not lr.shape, "what the kernel reads"
        return step(*arguments, lr=0.0 if isinstance(lr, Tensor) else lr, **how)

    return take


def _not_fake(read: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with real tensors: of a library that makes them from bytes."""

    def read_really(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return read(*arguments)

    return read_really


def _move(module: nn.Module, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """`Module.to` of a module that is where it is to be; only dtypes change."""
    assert all(p.device == torch.device(device) for p in module.parameters()), "build it on the GPU"
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None and dtype not in (None, parameter.dtype):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = buffer.to(device, dtype or buffer.dtype)
    return module


def _as_array(tensor: Tensor, *, force: bool = False) -> np.ndarray:
    """Zeros of its shape; of a tensor on the GPU the error that torch raises."""
    if not isinstance(tensor, FakeTensor):
        return np.asarray(tensor.detach().tolist())
    if tensor.is_cuda:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
