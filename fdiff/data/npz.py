"""NumPy archives in MedMNIST's layout: `train_images`, `train_labels`, `test_images`, `test_labels` in one .npz file.

What an archive declares is checked before memory is taken, and nothing in it is ever unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from fdiff.config import DataConfig
from fdiff.data.decoding import ASPECT
from fdiff.data.sources import Split
from fdiff.data.values import CHANNELS, check_type
from fdiff.errors import UserError, first_line
from fdiff.runtime import free_memory

LAYOUT = "(n, H, W) or (n, H, W, C)"
HEADER = 2**14  # bytes, of which NumPy reads at most 10,000 as the header of an array
DEFLATED = 1032  # deflate makes at most so many bytes of one
BLOCK = 2**24  # bytes read at once


def find_npz(root: str | None) -> Path:
    """The archive at `data.root`: a file, or the only .npz file of a folder. UserError."""
    if root is None:
        raise UserError("data.root: data set npz needs a file; name it, or its folder, by --data.root")
    path = Path(root)
    try:
        found = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.is_file() else []
    except OSError as error:
        raise UserError(f"data.root: {root} cannot be read ({error.strerror}); let this user read it") from None
    if len(found) != 1:
        what = f"holds {len(found)} .npz files" if path.is_dir() else "is no file"
        raise UserError(f"data.root: {root} {what}; name one .npz file")
    return found[0]


def read_npz(path: Path, split: str, data: DataConfig) -> Split:
    """The `train` or `test` split, all of it in memory. UserError says what is missing, unfit or damaged.

    Labels are (n,) or (n, 1). Several of an image are no classes: then there are none, and the reason is kept.
    """
    if data.in_memory == "never":
        raise UserError(f"data.in_memory: never is not valid with {path}: an npz file is held in memory; use auto")
    try:
        with zipfile.ZipFile(path) as archive:
            images = _Member(path, archive, f"{split}_images")
            labels = _Member(path, archive, f"{split}_labels")
            if images.missing:
                held = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())[:8]) or "nothing"
                raise UserError(
                    f"{path}: has no array {split}_images; it must be {LAYOUT} of the {split} split, and the file has "
                    f"{held}"
                )
            _check_images(path, images, data)
            problem = None if labels.missing else _check_labels(path, labels, len(images))
            numbers = None if labels.missing or problem else _whole_numbers(path, labels)
            pixels = images.read()
    except UserError:
        raise
    except Exception as error:  # of a damaged archive anything is raised
        raise UserError(f"{path}: cannot be read as npz ({_reason(error)}); replace it") from None
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return Split(f"{path}, {split} split", pixels, numbers, no_labels=problem or f"has no {split}_labels")


class _Member:
    """An array of the archive: what it declares, and then what it holds."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self.name, self._path, self._archive = name, path, archive
        self.missing = f"{name}.npy" not in archive.namelist()
        if self.missing:
            return
        self._info = archive.getinfo(f"{name}.npy")
        with archive.open(self._info) as stream:
            head = io.BytesIO(stream.read(HEADER))
        version = np.lib.format.read_magic(head)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise UserError(f"{path}: {name} is an array of format {version}; write it by numpy.savez_compressed")
        self.shape, self._fortran, self.dtype = readers[version](head)
        self._skip = head.tell()
        if self.dtype.hasobject:
            raise UserError(f"{path}: {name} holds Python objects, which are never unpickled; save it as numbers")
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        held = self._info.file_size - self._skip
        if min(self.shape, default=0) < 0 or self.bytes != held or held > DEFLATED * (self._info.compress_size + 1):
            raise UserError(f"{path}: {name} is to be {self.dtype} {self.shape}, and its file is not; replace it")

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def read(self) -> np.ndarray:
        """All of it, in this machine's byte order."""
        array = np.empty(self.shape[::-1] if self._fortran else self.shape, self.dtype)
        target = memoryview(array.reshape(-1).view(np.uint8))
        with self._archive.open(self._info) as stream:
            stream.read(self._skip)
            while target:
                if not (block := stream.read(min(BLOCK, len(target)))):
                    raise EOFError(f"{self.name} ends early")
                target[: len(block)] = block
                target = target[len(block) :]
            stream.read(1)  # at its end the checksum is compared
        array = array.T if self._fortran else array
        return array.astype(self.dtype.newbyteorder("="), copy=False)


def _check_images(path: Path, images: _Member, data: DataConfig) -> None:
    name, shape = f"{path}: {images.name}", images.shape
    _, height, width, channels = (*shape, 1)[:4] if len(shape) in (3, 4) else (0, 0, 0, 0)
    if not 1 <= channels <= CHANNELS or 0 in shape:
        raise UserError(f"{name} is {images.dtype} {shape}; it must be {LAYOUT}, C 1 to {CHANNELS}, and not empty")
    check_type(name, images.dtype, shape, data)
    if height in (1, 3) and width == channels:  # H is C, then, and what is taken for colour a row
        raise UserError(f"{name} is {shape}, which looks like (n, C, H, W); write it as (n, H, W, C)")
    if max(height, width) > ASPECT * min(height, width):
        raise UserError(f"{name} is {shape}, over {ASPECT} times as long as wide; cut the images")
    if height * width > data.max_pixels:
        raise UserError(f"{name} is {shape}; an image has more pixels than data.max_pixels = {data.max_pixels}")
    # As they are read, in fdiff's order of axes, and as float32 if they are to be scaled.
    needed = images.bytes * (2 if channels > 1 else 1) + (images.dtype != np.uint8) * 4 * math.prod(shape)
    if needed > (free := free_memory(torch.device("cpu"))):
        raise UserError(
            f"{name} is {images.dtype} {shape} and takes {needed / 2**30:.3g} GiB of memory, of which "
            f"{free / 2**30:.3g} are free; use HDF5 or Parquet, which is read by parts"
        )


def _check_labels(path: Path, labels: _Member, images: int) -> str | None:
    """Why they are no classes of the images, if that is no fault. UserError if it is one."""
    shape = labels.shape
    if labels.dtype.kind not in "iu" or len(shape) not in (1, 2) or shape[0] != images or 0 in shape:
        raise UserError(
            f"{path}: {labels.name} is {labels.dtype} {shape}; it must be of whole numbers, ({images},) or ({images}, "
            "1), one for each image"
        )
    if len(shape) == 2 and shape[1] > 1:
        return f"has {shape[1]} labels for each image ({labels.name} is {shape}), which are no classes"
    return None


def _whole_numbers(path: Path, labels: _Member) -> np.ndarray:
    numbers = labels.read().reshape(-1)
    if not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**63:
        raise UserError(f"{path}: {labels.name} go from {numbers.min()} to {numbers.max()}; they must be 0 or above")
    return numbers.astype(np.int64)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
