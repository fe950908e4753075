"""A data set of the user's own: what a registered opener returns for a split.

`opener(root, split)` is called with `data.root` (None if not given) and `train` or `test`. What it returns has a
length, images by index, arrays (H, W) or (H, W, C) with C 1 to 16, and an attribute `labels`: whole numbers from 0, one
of each image, or None. The arrays are uint8, or where `data.range` is given, uint16 or floating point. It is forked
into loader processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fdiff import registry
from fdiff.config import DataConfig
from fdiff.data.stored import StoredArrays
from fdiff.data.values import CHANNELS, check_type
from fdiff.errors import UserError, first_line


class OwnImages(StoredArrays):
    """The images of such a set, or some of them in another order; those that are none are refused by their index."""

    def __init__(self, name: str, images: Any, rows: np.ndarray, data: DataConfig) -> None:
        self.name, self._images, self._rows, self._data = name, images, rows, data

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> OwnImages:
        """Those at `rows` (m,), in that order."""
        return OwnImages(self.name, self._images, self._rows[rows], self._data)

    def where(self, row: int) -> str:
        return f"data.dataset: {self.name}, image {int(self._rows[row])}"

    def contents(self, most: int, tell_unfit: bool) -> Iterator[bytes | np.ndarray]:
        for row in np.random.RandomState(0).permutation(len(self)):
            if most <= 0:
                return
            try:
                image = self.image(row)
            except UserError:
                if not tell_unfit:
                    raise
                yield f"unfit {row}".encode()
                continue
            yield image
            most -= image.nbytes

    def image(self, row: int) -> np.ndarray:
        index = int(self._rows[row])
        try:
            image = np.asarray(self._images[index])
        except (Exception, SystemExit) as error:  # of somebody's class
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{self.where(row)} cannot be read ({reason})") from None
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or not 1 <= image.shape[-1] <= CHANNELS or 0 in image.shape:
            raise UserError(
                f"{self.where(row)} is {image.dtype} {image.shape}; it must be uint8 (H, W) or (H, W, C), C 1 to "
                f"{CHANNELS}"
            )
        check_type(self.where(row), image.dtype, image.shape, self._data)
        # Of its own, since the set's may be read-only; in this machine's byte order.
        return np.array(image.transpose(2, 0, 1), image.dtype.newbyteorder("="), order="C")


def open_own(data: DataConfig, root: str | None, split: str) -> tuple[str, OwnImages, np.ndarray | None]:
    """Name, images and labels (n,) of a split; UserError if there are none, or they are not as above."""
    dataset = data.dataset
    opener, name = registry.find("data.dataset", dataset), f"{dataset} {split}"
    try:
        found = opener(root, split)
        count, labels = len(found), getattr(found, "labels", None)
        labels = None if labels is None else np.asarray(labels)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"data.dataset: {dataset} cannot be opened for {split} ({reason})") from None
    if not count:
        raise UserError(f"data.dataset: {name} has no images")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise UserError(
            f"data.dataset: {name} has labels {labels.dtype} {labels.shape}; they must be {count} whole numbers "
            "from 0, or None"
        )
    return name, OwnImages(name, found, np.arange(count), data), labels
