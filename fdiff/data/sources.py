"""A split of a data set, as its reader finds it and opened: labels in memory, images as uint8 tensors of one shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fdiff.config import DataConfig
from fdiff.data.decoding import decode
from fdiff.data.images import BLOCK, fit, prepare
from fdiff.data.own_images import OwnImages
from fdiff.errors import UserError


@dataclass(frozen=True)
class Split:
    """What a reader finds: images uint8 (n, C, H, W), C 1 or 3, or n files, or a set of the user's own; integer labels
    (n,), if it has any.

    `name` tells data set, split and place, for errors and reports. `classes` are the names of label 0, 1, …, where
    folders have them. `by_area`: resize as `prepare` does by area.
    """

    name: str
    images: np.ndarray | list[Path] | OwnImages
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    by_area: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """The images at `rows` (m,), in that order."""
        if isinstance(self.images, OwnImages):
            images = self.images.take(rows)
        else:
            images = self.images[rows] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return replace(self, images=images, labels=None if self.labels is None else self.labels[rows])

    def numbered_by(self, classes: Sequence[str]) -> Split:
        """With the numbers that its classes have among `classes`; as it is, if folders do not name them."""
        if not self.classes:
            return self
        number: Mapping[str, int] = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[name] for name in self.classes])[self.labels]
        return replace(self, labels=labels, classes=tuple(classes))


class Source(Protocol):
    """Images uint8 (C, S, S) by index, and their labels; can be forked into loader processes."""

    name: str
    labels: np.ndarray  # (n,), int64; 0 where there are none
    labelled: bool  # whether there are
    shape: tuple[int, int, int]  # (C, S, S)
    decodes: bool  # whether reading an image takes work that is worth a process

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 (C, S, S), on the host; UserError if its file is unfit."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The images at `indices` in that order, uint8 (n, C, S, S), on the host; errors as `image`."""
        ...

    def identity(self) -> Iterator[bytes]:
        """What is other if the images are: all bytes of those in memory; of files the paths, sizes and times."""
        ...


class _Base:
    def __init__(self, split: Split, data: DataConfig) -> None:
        self.name, self.shape, self.labelled = split.name, data.shape, split.labels is not None
        self.labels = np.zeros(len(split), np.int64) if split.labels is None else split.labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)


class ArraySource(_Base):
    """A `Source` whose images are all in memory, resized once."""

    decodes = False

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        channels, side, _ = self.shape
        self._images = prepare(torch.from_numpy(split.images), side, channels, split.by_area)

    def image(self, index: int) -> Tensor:
        return self._images[index]

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]

    def identity(self) -> Iterator[bytes]:
        return (block.numpy().tobytes() for block in self._images.split(BLOCK))


class _OneByOne(_Base, ABC):
    decodes = True

    @abstractmethod
    def image(self, index: int) -> Tensor: ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        out = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for row, index in zip(out, indices, strict=True):
            row.copy_(self.image(int(index)))
        return out


class FileSource(_OneByOne):
    """A `Source` that reads an image's file each time it is asked for it."""

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        self.paths, self._max_pixels, self._background = split.images, data.max_pixels, data.background

    def image(self, index: int) -> Tensor:
        image = decode(self.paths[index], self._max_pixels, self._background)
        return fit(image, self.shape[1], self.shape[0])

    def identity(self) -> Iterator[bytes]:
        for path in self.paths:
            state = path.stat()
            yield f"{path} {state.st_size} {state.st_mtime_ns}\n".encode()


class OwnSource(_OneByOne):
    """A `Source` that asks a set of the user's own for an image each time."""

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        self._images = split.images

    def image(self, index: int) -> Tensor:
        channels, side, _ = self.shape
        return prepare(torch.from_numpy(self._images.image(index))[None], side, channels)[0]

    def identity(self) -> Iterator[bytes]:
        return (self.image(index).numpy().tobytes() for index in range(len(self)))


def check_labels(source: Source, classes: int) -> None:
    """UserError unless a model of `classes` labels (0: unconditional) knows all of the source's."""
    if not classes:
        return
    if not source.labelled:
        raise UserError(
            f"model.classes: {source.name} has no labels; give it a dataset `labels` or a subfolder for each class, or "
            "use --model.classes 0"
        )
    largest = int(source.labels.max())
    if largest >= classes:
        raise UserError(
            f"model.classes: {classes} is too few for {source.name}, which has a label {largest}; "
            f"it must be at least {largest + 1}, or 0"
        )
