"""The bytes of a compressed part, in closed form: what is all-reduced or gathered, and what a server would send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fdiff.compression.low_rank import dense_of, factor_sizes
from fdiff.compression.quantize import bits_of, blocks_of, words_of
from fdiff.compression.sparsify import kept_of
from fdiff.config import CompressionConfig
from fdiff.model import Slot


@dataclass(frozen=True)
class Payload:
    """Bytes of each part's update, for runs with or without compression; `slots` are the model's, by part.

    `itemsize` is that of a parameter.
    """

    config: CompressionConfig
    slots: Mapping[str, Sequence[Slot]]
    itemsize: int

    @property
    def layout(self) -> list[Slot]:
        """All slots, in order."""
        return [slot for slots in self.slots.values() for slot in slots]

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters of each part."""
        return {part: self._size(part) for part in self.slots}

    def of_one(self, part: str, reporters: int) -> int:
        """Bytes that stand for a part's update when so many clients report it: what is all-reduced, or one's pairs."""
        size, config = self._size(part), self.config
        if config.kind == "quantize":
            blocks = blocks_of(size, config.block)
            words = words_of(blocks * config.block, bits_of(config.levels, reporters))
            return 8 * words + blocks * self.itemsize
        if config.kind == "random-k":
            return kept_of(size, config.fraction) * self.itemsize
        if config.kind == "top-k":
            return kept_of(size, config.fraction) * (4 + self.itemsize)
        if config.kind == "low-rank":
            factors = sum(factor_sizes(self.slots[part], config.rank))
            return (factors + dense_of(self.slots[part], config.rank)) * self.itemsize
        return size * self.itemsize

    def of_sum(self, part: str, reporters: int) -> int:
        """Bytes that stand for the sum of so many: the pairs of all, dense at most; else as many as one's."""
        one = self.of_one(part, reporters)
        return min(reporters * one, self._size(part) * self.itemsize) if self.config.kind == "top-k" else one

    def sent(self, part: str, reporters: int, reporting_ranks: int, ranks: int) -> int:
        """Bytes that all ranks together send for a part: 2(r-1)+m times of it, or each client's pairs to all others."""
        one = self.of_one(part, reporters)
        if self.config.kind == "top-k":
            return reporters * one * (ranks - 1)
        return (2 * (reporting_ranks - 1) + ranks - reporting_ranks) * one if reporting_ranks else 0

    def _size(self, part: str) -> int:
        return sum(slot.numel for slot in self.slots[part])


def payload_for(config: CompressionConfig, layout: Sequence[Slot], itemsize: int) -> Payload:
    """The payload of a model of this layout."""
    parts = dict.fromkeys(slot.part for slot in layout)
    return Payload(config, {part: [slot for slot in layout if slot.part == part] for part in parts}, itemsize)
