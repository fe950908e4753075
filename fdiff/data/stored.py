"""Images that are not in memory but are had from somewhere when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import numpy as np


class Stored(ABC):
    """Images somewhere, or some of them in another order. They are forked into loader processes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: np.ndarray) -> Self:
        """Those at `rows` (m,), in that order."""

    @abstractmethod
    def contents(self, most: int, tell_unfit: bool) -> Iterator[bytes | np.ndarray]:
        """What is other if the images are, in a fixed order: of all, or of so many that make up `most` bytes.

        UserError at one that is unfit, unless its row is to be told instead.
        """


class StoredArrays(Stored):
    """Images that are arrays: uint8, or of another type in `values.TYPES` where `data.range` says their range."""

    shape: tuple[int, int, int] | None = None  # (C, H, W), if all are alike and that is known

    @abstractmethod
    def image(self, row: int) -> np.ndarray:
        """The image at a row: (C, H, W). UserError if it cannot be had, or is something else."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Where the image at a row is, for errors."""
