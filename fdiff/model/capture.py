"""On a GPU: a step compiled, and captured into a CUDA graph, so that it is one launch and not a thousand.

The arithmetic is that of the step; only the order within sums may differ, as a compiler has it. Elsewhere than on a GPU
steps run as they are written, unless compiling is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARMUP = 3  # runs in which the compiler works and libraries choose their kernels: a capture must find all that done

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


def captures(device: torch.device, execution: str = "auto") -> bool:
    """Whether steps on this device are captured; `execution` as `runtime.execution`."""
    return device.type == "cuda" and execution != "eager"


def compiles(device: torch.device, execution: str = "auto") -> bool:
    """Whether they are compiled: where that is asked for, and by itself where there is a GPU and a compiler for it."""
    usable = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return execution == "compiled" or (execution == "auto" and usable)


def compiled(function: F, device: torch.device, execution: str = "auto") -> F:
    """The function, compiled if steps are.

    For one shape: each other is compiled anew, for up to a minute, so short batches go to the function as it is.
    """
    return torch.compile(function, dynamic=False) if compiles(device, execution) else function  # type: ignore[return-value]


class Graph(Generic[T]):
    """A step that reads and writes the same memory each time, captured; `replay` runs it.

    `state` are all tensors that the step changes and somebody goes on with: they, and the generator that it draws from,
    are after the capture what they were before. What the step returns is overwritten by the next replay.
    """

    def __init__(self, step: Callable[[], T], state: Sequence[Tensor], noise: torch.Generator | None = None) -> None:
        kept = [tensor.clone() for tensor in state]
        drawn = None if noise is None else noise.get_state()
        self._warm(step)
        self.result = self._capture(step, noise)
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
        if noise is not None and drawn is not None:
            noise.set_state(drawn)

    def _warm(self, step: Callable[[], T]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(aside)

    def _capture(self, step: Callable[[], T], noise: torch.Generator | None) -> T:
        self._graph = torch.cuda.CUDAGraph()
        if noise is not None:
            self._graph.register_generator_state(noise)
        # Other threads (a loader's that pins batches, a backend's watchdog) may go on calling the driver meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> T:
        """Run the step on what its memory holds now."""
        self._graph.replay()
        return self.result
