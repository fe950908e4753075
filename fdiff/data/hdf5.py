"""A client's own HDF5 file: `images` uint8 (n, H, W) or (n, H, W, C), and optional integer `labels` (n,), to train on.

To be evaluated it holds `test_images` and, if need be, `test_labels` of the same kind.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from fdiff.data.sources import Split
from fdiff.errors import UserError, first_line


def read_hdf5(path: Path, split: str) -> Split:
    """All images of the file's `train` or `test` split; without labels all are 0. UserError says what is wrong."""
    prefix = "" if split == "train" else f"{split}_"
    try:
        with h5py.File(path, "r", locking=False) as file:
            if prefix and f"{prefix}images" not in file:
                raise UserError(f"{path}: has no {split} split; put its images into a dataset {prefix}images")
            images = _images(path, file, f"{prefix}images")
            return Split(f"{path}, {split} split", images, _labels(path, file, f"{prefix}labels", len(images)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as HDF5 ({first_line(error)})") from None


def _images(path: Path, file: h5py.File, name: str) -> np.ndarray:
    """uint8 (n, C, H, W), contiguous."""
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path}: has no dataset {name}; it must be uint8 (n, H, W) or (n, H, W, C)")
    fits = found.ndim == 3 or (found.ndim == 4 and found.shape[3] in (1, 3))
    if found.dtype != np.uint8 or not fits or not found.size:
        raise UserError(
            f"{path}: {name} is {found.dtype} {found.shape}; it must be uint8 (n, H, W) or (n, H, W, C) "
            "with C 1 or 3, and not empty"
        )
    images = found[()]
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _labels(path: Path, file: h5py.File, name: str, n: int) -> np.ndarray:
    """int64 (n,)."""
    found = file.get(name)
    if found is None:
        return np.zeros(n, dtype=np.int64)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "iu" or found.shape != (n,):
        what = f"{found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else "a group"
        raise UserError(f"{path}: {name} is {what}; it must be of whole numbers, ({n},) as there are {n} images")
    labels = found[()]
    if not 0 <= int(labels.min()) <= int(labels.max()) < 2**63:
        raise UserError(f"{path}: {name} go from {labels.min()} to {labels.max()}; they must be 0 or above")
    return labels.astype(np.int64)
