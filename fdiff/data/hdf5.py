"""A client's own HDF5 file: `images` (n, H, W), (n, H, W, C) or in other axes, and optional `labels` (n,).

To be evaluated it holds `test_images` and, if need be, `test_labels` of the same kind. Images are read when they are
asked for, or all at once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fdiff.config import DataConfig
from fdiff.data.decoding import ASPECT
from fdiff.data.hdf5_process import Silo
from fdiff.data.sources import Split
from fdiff.data.stored import StoredArrays
from fdiff.data.values import CHANNELS, check_type
from fdiff.errors import UserError
from fdiff.runtime import free_memory

UNUSUAL_ASPECT = 4  # of images: more likely the axes are others than they seem
BLOCK = 2**24  # bytes of images asked for at once
WHATEVER = (
    f"it must be (n, H, W) or (n, H, W, C) with C 1 to {CHANNELS}, or say what its axes are with --data.axes and "
    "--data.channels"
)


class Hdf5Images(StoredArrays):
    """The images of a split, or some of them, in the file. `axes` has the letters of the stored axes in their order."""

    def __init__(
        self, silo: Silo, name: str, axes: str, shape: Sequence[int], dtype: np.dtype, rows: np.ndarray
    ) -> None:
        self._silo, self._name, self._axes, self._stored, self.dtype = silo, name, axes, tuple(shape), dtype
        self._rows, self._axis = rows, axes.index("N")
        sizes = dict(zip(axes, shape, strict=True))
        self.shape = (sizes.get("C", 1), sizes["H"], sizes["W"])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """What they take in memory, as they are."""
        return len(self) * math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> np.ndarray:
        """Their places in the file (n,)."""
        return self._rows

    def take(self, rows: np.ndarray) -> Self:
        parts = (self._silo, self._name, self._axes, self._stored, self.dtype)
        return type(self)(*parts, self._rows[rows])

    def where(self, row: int) -> str:
        return f"{self._name}, image {int(self._rows[row])}"

    def image(self, row: int) -> np.ndarray:
        return self._read(int(self._rows[row]), int(self._rows[row]) + 1)[0]

    def contents(self, most: int, tell_unfit: bool) -> Iterator[np.ndarray]:
        """All of them: the same whether they are in memory or not."""
        at_once = max(1, BLOCK // (math.prod(self.shape) * self.dtype.itemsize))
        breaks = np.flatnonzero(np.diff(self._rows) != 1) + 1
        for run in np.split(self._rows, breaks):
            for start in range(0, len(run), at_once):
                part = run[start : start + at_once]
                yield self._read(int(part[0]), int(part[-1]) + 1)

    def load(self) -> np.ndarray:
        """All of them in memory, (n, C, H, W); the process that reads the file is ended."""
        if len(self) == self._stored[self._axis] and (np.diff(self._rows) == 1).all():
            images = np.empty(self._stored, self.dtype)  # as it lies in the file, whichever axis is the first there
            at_once = max(1, BLOCK // (math.prod(self._stored[1:]) * self.dtype.itemsize))
            for start in range(0, len(images), at_once):
                stop = min(start + at_once, len(images))
                images[start:stop] = self._silo.reader().images(0, start, stop)
            found = self._arranged(images)
        else:
            found, start = np.empty((len(self), *self.shape), self.dtype), 0
            for block in self.contents(0, False):
                found[start : start + len(block)] = block
                start += len(block)
        self._silo.close()
        return found

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._arranged(self._silo.reader().images(self._axis, start, stop))

    def _arranged(self, images: np.ndarray) -> np.ndarray:
        """Images in the stored axes as (n, C, H, W)."""
        images = images.transpose([self._axes.index(axis) for axis in "NCHW" if axis in self._axes])
        return np.ascontiguousarray(images if "C" in self._axes else images[:, None])


def read_hdf5(path: Path, split: str, data: DataConfig) -> Split:
    """The images of the file's `train` or `test` split, not in memory yet. UserError says what is wrong.

    `data.axes` are those of the images, N, H, W and C in their order, as the program that wrote them has them; if it is
    None they are inferred. What a damaged file does to the HDF5 library happens to another process.
    """
    silo = Silo(path, split)
    try:
        return _read_facts(silo, path, split, data)
    except BaseException:
        silo.close()
        raise


def _read_facts(silo: Silo, path: Path, split: str, data: DataConfig) -> Split:
    facts = silo.reader().facts
    shape, dtype, matlab = tuple(facts["shape"]), np.dtype(facts["dtype"]), facts["matlab"]
    names = ("images", "labels") if split == "train" else (f"{split}_images", f"{split}_labels")
    seen = shape[::-1] if matlab else shape  # MATLAB counts axes from the other end
    found = _check_labels(path, names[1], facts["labels"], seen)
    axes = data.axes
    if axes:
        _check_axes(path, names[0], seen, axes)
    else:
        axes = _infer_axes(path, names[0], seen, found, matlab, data.channels)
    check_type(f"{path}: {names[0]}", dtype, seen, data)
    n = seen[axes.index("N")]
    pixels, free = seen[axes.index("H")] * seen[axes.index("W")], free_memory(torch.device("cpu"))
    if pixels > data.max_pixels or 16 * n > free:
        raise UserError(
            f"{path}: {names[0]} are {seen}, by {axes} {n} images of {pixels} pixels; these are more than "
            + (f"data.max_pixels = {data.max_pixels}" if pixels > data.max_pixels else "the free memory has room for")
        )
    labels = None
    if facts["labels"]:
        labels = _labels(path, names[1], silo.reader().labels((found,), facts["labels"]["dtype"]), n)
    stored = axes[::-1] if matlab else axes
    images = Hdf5Images(silo, f"{path}: {names[0]}", stored, shape, dtype, np.arange(n))
    return Split(f"{path}, {split} split", images, labels)


# --- axes ----------------------------------------------------------------------------------------------------------


def _check_axes(path: Path, name: str, shape: Sequence[int], axes: str) -> None:
    if len(axes) != len(shape) or ("C" in axes and not 1 <= shape[axes.index("C")] <= CHANNELS):
        raise UserError(
            f"data.axes: {axes} does not fit {path}, whose {name} are {tuple(shape)}; C must be 1 to {CHANNELS}"
        )
    if _aspect(axes, shape) > ASPECT:
        raise UserError(f"{path}: {name} are {tuple(shape)}, by {axes} over {ASPECT} times as long as wide; cut them")


def _infer_axes(
    path: Path, name: str, shape: Sequence[int], labels: int | None, matlab: bool, channels: int | None
) -> str:
    """The axes that alone make sense, N first, or in MATLAB also last; UserError where there is none, or another.

    C is 1, 3 or `channels`, and only where no axis can be such, and nothing is given, any other number of channels.
    """
    says = f"{path}: {name} are {tuple(shape)}"
    usual = ("NHW", "NHWC", "HWN", "HWCN") if matlab else ("NHW", "NHWC", "NCHW")

    def possible_with(numbers: Container[int]) -> list[str]:
        return [a for a in usual if len(a) == len(shape) and ("C" not in a or shape[a.index("C")] in numbers)]

    possible = possible_with((1, 3, channels)) or (possible_with(range(1, CHANNELS + 1)) if channels is None else [])
    if not possible:
        raise UserError(f"{says}; {WHATEVER}")
    likely = [a for a in possible if labels in (None, shape[a.index("N")]) and _aspect(a, shape) <= UNUSUAL_ASPECT]
    if len(likely) != 1:
        example = likely[0] if likely else "HWN" if len(shape) == 3 else "HWCN"
        why = "of which it is not clear what they are" if labels is None else f"and there are {labels} labels"
        raise UserError(f"{says}, {why}; say which axis is which with --data.axes, e.g. {example}")
    return likely[0]


def _aspect(axes: str, shape: Sequence[int]) -> float:
    height, width = shape[axes.index("H")], shape[axes.index("W")]
    return max(height, width) / min(height, width)


# --- labels --------------------------------------------------------------------------------------------------------


def _check_labels(path: Path, name: str, facts: dict[str, Any] | None, images: Sequence[int]) -> int | None:
    """How many labels there are, None if there is no such dataset."""
    if facts is None:
        return None
    shape = tuple(facts["shape"])
    count = math.prod(shape)
    if not facts["sent"] or max(shape, default=0) != count or count not in images:
        raise UserError(
            f"{path}: {name} is {np.dtype(facts['dtype'])} {shape}; it must be of whole numbers, ({images[0]},), one "
            f"for each of the images {tuple(images)}"
        )
    return count


def _labels(path: Path, name: str, found: np.ndarray, n: int) -> np.ndarray:
    """int64 (n,)."""
    if len(found) != n:
        raise UserError(f"{path}: {name} are {len(found)}, and there are {n} images; they must be ({n},)")
    if found.dtype.kind == "f" and not (np.isfinite(found).all() and (found == np.floor(found)).all()):
        raise UserError(f"{path}: {name} is {found.dtype} with fractions; it must be of whole numbers, ({n},)")
    if not 0 <= int(found.min()) <= int(found.max()) < 2**63:
        raise UserError(f"{path}: {name} go from {found.min()} to {found.max()}; they must be 0 or above")
    return found.astype(np.int64)
