"""A data set of the user's own: what a registered opener returns for a split.

`opener(root, split)` is called with `data.root` (None if not given) and `train` or `test`. What it returns has a
length, images by index, uint8 arrays (H, W) or (H, W, 3), and an attribute `labels`: whole numbers from 0, one of each
image, or None. It is forked into loader processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fdiff import registry
from fdiff.errors import UserError, first_line


class OwnImages:
    """The images of such a set, or some of them in another order; those that are none are refused by their index."""

    def __init__(self, name: str, images: Any, rows: np.ndarray) -> None:
        self.name, self._images, self._rows = name, images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> OwnImages:
        """Those at `rows` (m,), in that order."""
        return OwnImages(self.name, self._images, self._rows[rows])

    def image(self, row: int) -> np.ndarray:
        """The image at a row: uint8 (C, H, W), C 1 or 3. UserError if it cannot be had, or is something else."""
        index = int(self._rows[row])
        try:
            image = np.asarray(self._images[index])
        except (Exception, SystemExit) as error:  # of somebody's class
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"data.dataset: {self.name}, image {index} cannot be read ({reason})") from None
        if image.ndim == 2:
            image = image[..., None]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
            raise UserError(
                f"data.dataset: {self.name}, image {index} is {image.dtype} {image.shape}; it must be uint8 (H, W) or "
                "(H, W, 3)"
            )
        return np.array(image.transpose(2, 0, 1), order="C")  # of its own: the set's may be read-only


def open_own(dataset: str, root: str | None, split: str) -> tuple[str, OwnImages, np.ndarray | None]:
    """Name, images and labels (n,) of a split; UserError if there are none, or they are not as above."""
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
    return name, OwnImages(name, found, np.arange(count)), labels
