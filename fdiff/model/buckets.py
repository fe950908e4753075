"""The model's parameters as flat memory: one arena, a contiguous bucket a part, parameters being views of it.

Averaging, copying and saving a part is then one operation on one tensor. Gradients live in a twin of the arena.
This module knows tensors and layouts; who averages what is not its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdiff.errors import RunError


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


def layout_of(model: nn.Module, parts: Sequence[str]) -> tuple[Slot, ...]:
    """The canonical order: part by part, in each the order of `named_parameters`. Needs no memory for the values."""
    slots = []
    for part in parts:
        offset = 0
        for name, parameter in model.get_submodule(part).named_parameters():
            slots.append(Slot(f"{part}.{name}", part, offset, tuple(parameter.shape)))
            offset += parameter.numel()
    if sum(s.numel for s in slots) != sum(p.numel() for p in model.parameters()):
        raise ValueError(f"the parts {', '.join(parts)} do not hold all of the model's parameters")
    return tuple(slots)


def part_sizes(layout: Sequence[Slot]) -> dict[str, int]:
    """Parameters of each part, in canonical order."""
    sizes: dict[str, int] = {}
    for slot in layout:
        sizes[slot.part] = sizes.get(slot.part, 0) + slot.numel
    return sizes


class Buckets:
    """Moves a model's parameters and gradients into two arenas and keeps them there.

    `flat` and `grad` are (P,), one dtype, one device; the parts follow each other in canonical order, so a range of
    neighbouring parts is contiguous as well.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str]) -> None:
        self.model = model
        self.layout = layout_of(model, parts)
        self.sizes = part_sizes(self.layout)
        self._named = dict(model.named_parameters())
        first = next(iter(self._named.values()))
        self._move(first.device, first.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Buckets:
        """Move the model, buffers included, and both arenas; parameters stay views. Returns self."""
        self.model.to(device=device, dtype=dtype)
        first = next(iter(self._named.values()))
        if (first.device, first.dtype) != (self.flat.device, self.flat.dtype):
            self._move(first.device, first.dtype)
        return self

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        total = sum(self.sizes.values())
        self.flat = torch.empty(total, dtype=dtype, device=device)
        self.grad = torch.zeros(total, device=device, dtype=dtype)
        for slot, start in self._starts():
            parameter, end = self._named[slot.name], start + slot.numel
            self.flat[start:end].copy_(parameter.data.reshape(-1))
            parameter.data = self.flat[start:end].view(slot.shape)
            parameter.grad = self.grad[start:end].view(slot.shape)

    def _starts(self) -> list[tuple[Slot, int]]:
        starts = {part: self.span((part,)).start for part in self.sizes}
        return [(slot, starts[slot.part] + slot.offset) for slot in self.layout]

    def span(self, parts: Sequence[str]) -> slice:
        """The range of neighbouring parts in the arenas; (0, 0) for none. ValueError if they are not neighbours."""
        if not parts:
            return slice(0, 0)
        names = list(self.sizes)
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
