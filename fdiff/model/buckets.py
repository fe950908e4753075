"""The model's parameters as flat memory: one arena, a contiguous bucket a part, parameters being views of it.

Averaging, copying and saving a part is then one operation on one tensor. Gradients live in a twin of the arena.
This module knows tensors and layouts; who averages what is not its business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdiff.errors import RunError
from fdiff.model.parts import parameters_by_part


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives: its part, its offset in the part's bucket (in elements), its shape."""

    name: str
    part: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return int(torch.Size(self.shape).numel())


def layout_of(model: nn.Module, frozen: bool = False) -> tuple[Slot, ...]:
    """The canonical order of what is trained, or of what is `frozen`: part by part, in each as `named_parameters`.

    Needs no memory for the values. Errors as `parameters_by_part`.
    """
    slots = []
    for part, named in parameters_by_part(model).items():
        offset = 0
        for name, parameter in named.items():
            if parameter.requires_grad != frozen:
                slots.append(Slot(name, part, offset, tuple(parameter.shape)))
                offset += parameter.numel()
    return tuple(slots)


def part_sizes(layout: Sequence[Slot]) -> dict[str, int]:
    """Parameters of each part, in canonical order."""
    sizes: dict[str, int] = {}
    for slot in layout:
        sizes[slot.part] = sizes.get(slot.part, 0) + slot.numel
    return sizes


def arena_order(parts: Iterable[str], shared: Sequence[str]) -> list[str]:
    """The order in which the parts lie in an arena: private ones, then shared ones, each in canonical order."""
    return sorted(parts, key=lambda part: part in shared)  # sorting keeps the order of equals


class Buckets:
    """Moves a model's parameters and gradients into two arenas and keeps them there.

    `flat` and `grad` are (P,), one dtype, one device. The parts follow each other in canonical order, but the `shared`
    ones come last, so that they are contiguous whichever they are. What is not trained is in `frozen` (m,).
    """

    def __init__(self, model: nn.Module, shared: Sequence[str] = ()) -> None:
        self.model = model
        self.layout, self.frozen_layout = layout_of(model), layout_of(model, frozen=True)
        self.sizes = part_sizes(self.layout)
        self.order = arena_order(self.sizes, shared)
        self._named = dict(model.named_parameters())
        first = next(iter(self._named.values()))
        self._move(first.device, first.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Buckets:
        """Move the model, buffers included, and the arenas; parameters stay views. Returns self."""
        self.model.to(device=device, dtype=dtype)
        first = next(iter(self._named.values()))
        if (first.device, first.dtype) != (self.flat.device, self.flat.dtype):
            self._move(first.device, first.dtype)
        return self

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        total = sum(self.sizes.values())
        self.flat = torch.empty(total, dtype=dtype, device=device)
        self.grad = torch.zeros(total, device=device, dtype=dtype)
        self.frozen = torch.empty(sum(slot.numel for slot in self.frozen_layout), dtype=dtype, device=device)
        for slot, start in self._starts():
            self._adopt(slot, self.flat[start : start + slot.numel])
            self._named[slot.name].grad = self.grad[start : start + slot.numel].view(slot.shape)
        start = 0
        for slot in self.frozen_layout:
            self._adopt(slot, self.frozen[start : start + slot.numel])
            start += slot.numel

    def _adopt(self, slot: Slot, memory: Tensor) -> None:
        """Have a parameter live in this memory (n,)."""
        parameter = self._named[slot.name]
        memory.copy_(parameter.data.reshape(-1))
        parameter.data = memory.view(slot.shape)

    def _starts(self) -> list[tuple[Slot, int]]:
        starts = {part: self.span((part,)).start for part in self.sizes}
        return [(slot, starts[slot.part] + slot.offset) for slot in self.layout]

    def span(self, parts: Sequence[str]) -> slice:
        """The range of neighbouring parts in the arenas; (0, 0) for none. ValueError if they are not neighbours."""
        if not parts:
            return slice(0, 0)
        names = self.order
        first = names.index(parts[0])
        if tuple(names[first : first + len(parts)]) != tuple(parts):
            raise ValueError(f"parts {tuple(parts)} are not neighbours in {tuple(names)}")
        start = sum(self.sizes[n] for n in names[:first])
        return slice(start, start + sum(self.sizes[p] for p in parts))

    def part(self, name: str) -> Tensor:
        """A part's bucket (n,), a view of the arena."""
        return self.flat[self.span((name,))]

    def check_shared(self) -> None:
        """RunError if a parameter or gradient has left its arena, e.g. after `model.to()` behind our back."""
        for slot, start in self._starts():
            parameter = self._named[slot.name]
            pairs = (("parameter", parameter.data, self.flat), ("gradient", parameter.grad, self.grad))
            for kind, tensor, arena in pairs:
                if tensor is None or tensor.data_ptr() != arena[start:].data_ptr():
                    raise RunError(f"the {kind} of {slot.name} no longer shares storage with its bucket")
