"""A split of a data set, opened: labels in memory, images as uint8 tensors of one shape on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fdiff.data.images import prepare, read_image
from fdiff.errors import UserError


@dataclass(frozen=True)
class Split:
    """What a reader finds: images uint8 (n, C, H, W), C 1 or 3, or their n files; integer labels (n,).

    `name` tells data set, split and place, for errors and reports.
    """

    name: str
    images: np.ndarray | list[Path]
    labels: np.ndarray


class Source(Protocol):
    """Images uint8 (C, S, S) by index, and their labels; can be forked into loader processes."""

    name: str
    labels: np.ndarray  # (n,), int64
    shape: tuple[int, int, int]  # (C, S, S)
    decodes: bool  # whether reading an image takes work that is worth a process

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 (C, S, S), on the host; UserError if its file is unfit."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The images at `indices` in that order, uint8 (n, C, S, S), on the host; errors as `image`."""
        ...


class ArraySource:
    """A `Source` whose images are all in memory, resized once."""

    decodes = False

    def __init__(self, split: Split, side: int, channels: int) -> None:
        self.name, self.labels = split.name, split.labels.astype(np.int64)
        self.shape = (channels, side, side)
        self._images = prepare(torch.from_numpy(split.images), side, channels)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        return self._images[index]

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]


class FileSource:
    """A `Source` that reads an image's file each time it is asked for it."""

    decodes = True

    def __init__(self, split: Split, side: int, channels: int) -> None:
        self.name, self.labels = split.name, split.labels.astype(np.int64)
        self.shape = (channels, side, side)
        self.paths = split.images

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.shape[1], self.shape[0])

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        out = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for row, index in zip(out, indices, strict=True):
            row.copy_(self.image(int(index)))
        return out


def check_labels(source: Source, classes: int) -> None:
    """UserError unless a model of `classes` labels (0: unconditional) knows all of the source's."""
    largest = int(source.labels.max())
    if classes and largest >= classes:
        raise UserError(
            f"model.classes: {classes} is too few for {source.name}, which has a label {largest}; "
            f"it must be at least {largest + 1}, or 0"
        )
