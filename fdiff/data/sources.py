"""A split of a data set, as its reader finds it and opened: labels in memory, images as tensors of one shape.

They are uint8, or where `data.range` is given float32, scaled to [-1, 1].
"""

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
from fdiff.data.decoding import decode, decode_values
from fdiff.data.images import BLOCK, fit, normalise, prepare
from fdiff.data.stored import Stored, StoredArrays
from fdiff.data.values import FULL, scale, told
from fdiff.errors import UserError


@dataclass(frozen=True)
class Split:
    """What a reader finds: n images, of type uint8 or one in `values.TYPES` as an array (n, C, H, W), or n files, or
    stored somewhere; integer labels (n,), if it has any.

    `name` tells data set, split and place, for errors and reports. `classes` are the names of label 0, 1, …, where
    there are such. `by_area`: resize as `prepare` does by area. `no_labels` says why there are none. `rows` (n,) are
    the places in their file of images in an array, where those are not 0 to n - 1.
    """

    name: str
    images: np.ndarray | list[Path] | Stored
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    by_area: bool = False
    no_labels: str = "has no labels"
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """The images at `rows` (m,), in that order."""
        kept = self.rows
        if isinstance(self.images, Stored):
            images = self.images.take(rows)
        elif isinstance(self.images, np.ndarray):
            images, kept = self.images[rows], np.asarray(rows) if kept is None else kept[rows]
        else:
            images = [self.images[row] for row in rows]
        return replace(self, images=images, labels=None if self.labels is None else self.labels[rows], rows=kept)

    @property
    def alike(self) -> tuple[int, int, int] | None:
        """(C, H, W) of all images, where that is known without a look at each."""
        if isinstance(self.images, np.ndarray):
            return self.images.shape[1:]
        return self.images.shape if isinstance(self.images, StoredArrays) else None

    def where(self, row: int) -> str:
        """Where the image at a row is, for errors."""
        if isinstance(self.images, StoredArrays):
            return self.images.where(row)
        if isinstance(self.images, np.ndarray):
            return f"{self.name}, image {row if self.rows is None else self.rows[row]}"
        return str(self.images[row])

    def numbered_by(self, classes: Sequence[str]) -> Split:
        """With the numbers that its classes have among `classes`; as it is, if folders do not name them."""
        if not self.classes:
            return self
        number: Mapping[str, int] = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[name] for name in self.classes])[self.labels]
        return replace(self, labels=labels, classes=tuple(classes))


class Source(Protocol):
    """Images (C, S, S) by index, and their labels; can be forked into loader processes."""

    name: str
    labels: np.ndarray  # (n,), int64; 0 where there are none
    labelled: bool  # whether there are
    no_labels: str  # why there are none
    shape: tuple[int, int, int]  # (C, S, S)
    dtype: torch.dtype  # of the images: uint8, or float32 in [-1, 1]
    decodes: bool  # whether reading an image takes work that is worth a process

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Image `index`, (C, S, S), on the host; UserError if it is unfit."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The images at `indices` in that order, (n, C, S, S), on the host; errors as `image`."""
        ...

    def identity(self) -> Iterator[bytes]:
        """What is other if the images are: all bytes of those in memory; of files the paths, sizes and times."""
        ...


class _Base:
    def __init__(self, split: Split, data: DataConfig) -> None:
        self.name, self.shape, self.labelled = split.name, data.shape, split.labels is not None
        self.no_labels, self._range = split.no_labels, data.range
        self.dtype = torch.uint8 if data.range is None else torch.float32
        if split.alike:
            _check_channels(self.shape[0], split.alike[0], split.name)
        self.labels = np.zeros(len(split), np.int64) if split.labels is None else split.labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)


class ArraySource(_Base):
    """A `Source` whose images are all in memory, resized once."""

    decodes = False

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        channels, side, _ = self.shape
        if data.range is None:
            images = torch.from_numpy(split.images)
        else:
            images = scale(split.images, data.range, split.where)
        self._images = prepare(images, side, channels, split.by_area)

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
        out = torch.empty(len(indices), *self.shape, dtype=self.dtype)
        for place in np.argsort(indices, kind="stable"):  # what lies together is read together
            out[place] = self.image(int(indices[place]))
        return out


class FileSource(_OneByOne):
    """A `Source` that reads an image's file each time it is asked for it."""

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        self.paths, self._max_pixels, self._background = split.images, data.max_pixels, data.background
        if self.shape[0] not in (1, 3):
            raise UserError(f"data.channels: {self.shape[0]} is not valid with {split.name}: image files have 1 or 3")

    def image(self, index: int) -> Tensor:
        file, (channels, side, _) = self.paths[index], self.shape
        if self._range is None:
            return fit(decode(file, self._max_pixels, self._background), side, channels)
        values = decode_values(file, self._max_pixels, self._background)
        return prepare(scale_file(values, self._range, str(file))[None], side, channels)[0]

    def identity(self) -> Iterator[bytes]:
        if isinstance(self.paths, Stored):
            yield from self.paths.identity()
            return
        for path in self.paths:
            state = path.stat()
            yield f"{path} {state.st_size} {state.st_mtime_ns}\n".encode()


def scale_file(values: np.ndarray, limits: tuple[float, float], file: str) -> Tensor:
    """float32 (C, H, W) in [-1, 1] of the uint8 or uint16 pixels of an image file.

    UserError for a value outside the limits, and for 8 bits where the limits are not all that 16 bits hold: only then
    white is white in both.
    """
    if values.dtype != np.uint8:
        return scale(values[None], limits, lambda _: file)[0]
    if limits != FULL:
        raise UserError(f"data.range: {file} has 8 bits a channel, whose values do not go over {told(limits)}")
    return normalise(torch.from_numpy(values), torch.float32)


class StoredSource(_OneByOne):
    """A `Source` that has an image's array read each time it is asked for it."""

    def __init__(self, split: Split, data: DataConfig) -> None:
        super().__init__(split, data)
        self._images = split.images

    def image(self, index: int) -> Tensor:
        channels, side, _ = self.shape
        values = self._images.image(index)[None]
        _check_channels(channels, values.shape[1], self._images.where(index))
        if self._range is None:
            images = torch.from_numpy(values)
        else:
            images = scale(values, self._range, lambda _: self._images.where(index))
        return prepare(images, side, channels)[0]

    def identity(self) -> Iterator[bytes]:
        return (self.image(index).numpy().tobytes() for index in range(len(self)))


def _check_channels(wanted: int, found: int, where: str) -> None:
    """UserError unless they are the same, or grey and RGB."""
    if wanted != found and {wanted, found} != {1, 3}:
        raise UserError(f"data.channels: {wanted} is not valid with {where}, with {found} channels; leave it out")


def check_labels(source: Source, classes: int) -> None:
    """UserError unless a model of `classes` labels (0: unconditional) knows all of the source's."""
    if not classes:
        return
    if not source.labelled:
        raise UserError(
            f"model.classes: {source.name} {source.no_labels}; give it a dataset `labels` or a subfolder for each "
            "class, or use --model.classes 0"
        )
    largest = int(source.labels.max())
    if largest >= classes:
        raise UserError(
            f"model.classes: {classes} is too few for {source.name}, which has a label {largest}; "
            f"it must be at least {largest + 1}, or 0"
        )
