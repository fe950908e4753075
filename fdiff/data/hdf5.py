"""A client's own HDF5 file: `images` uint8 (n, H, W), (n, H, W, C) or in other axes, and optional `labels` (n,).

To be evaluated it holds `test_images` and, if need be, `test_labels` of the same kind.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdiff.data import hdf5_reader
from fdiff.data.decoding import ASPECT
from fdiff.data.loaders import PATIENCE_S, TICK_S, leaving_signals_to_rank
from fdiff.data.sources import Split
from fdiff.errors import RunError, UserError
from fdiff.runtime import free_memory, heed_stop

UNUSUAL_ASPECT = 4  # of images: more likely the axes are others than they seem
WHATEVER = "it must be uint8 (n, H, W) or (n, H, W, C) with C 1 or 3, or say what its axes are with --data.axes"


def read_hdf5(path: Path, split: str, axes: str | None = None) -> Split:
    """All images of the file's `train` or `test` split. UserError says what is wrong.

    `axes` are those of the images, N, H, W and C in their order, as the program that wrote them has them; if it is
    None they are inferred. What a damaged file does to the HDF5 library happens to another process.
    """
    with _Reader(path, split) as reader:
        facts = reader.facts()
        shape = tuple(facts["shape"])
        names = ("images", "labels") if split == "train" else (f"{split}_images", f"{split}_labels")
        seen = shape[::-1] if facts["matlab"] else shape  # MATLAB counts axes from the other end
        found = _check_labels(path, names[1], facts["labels"], seen)
        if axes:
            _check_axes(path, names[0], seen, axes)
        else:
            axes = _infer_axes(path, names[0], seen, found, facts["matlab"])
        labels = None
        if facts["labels"]:
            n = seen[axes.index("N")]
            labels = _labels(path, names[1], reader.array((found,), facts["labels"]["dtype"]), n)
        images = reader.array(shape, "u1")
    images = images.T if facts["matlab"] else images
    order = [axes.index(axis) for axis in "NCHW" if axis in axes]
    images = np.ascontiguousarray(images.transpose(order))
    return Split(f"{path}, {split} split", images if "C" in axes else images[:, None], labels)


# --- axes ----------------------------------------------------------------------------------------------------------


def _check_axes(path: Path, name: str, shape: Sequence[int], axes: str) -> None:
    if len(axes) != len(shape) or ("C" in axes and shape[axes.index("C")] not in (1, 3)):
        raise UserError(f"data.axes: {axes} does not fit {path}, whose {name} are {tuple(shape)}; C must be 1 or 3")
    if _aspect(axes, shape) > ASPECT:
        raise UserError(f"{path}: {name} are {tuple(shape)}, by {axes} over {ASPECT} times as long as wide; cut them")


def _infer_axes(path: Path, name: str, shape: Sequence[int], labels: int | None, matlab: bool) -> str:
    """The axes that alone make sense, N first, or in MATLAB also last; UserError where there is none, or another."""
    says = f"{path}: {name} are {tuple(shape)}"
    usual = ("NHW", "NHWC", "HWN", "HWCN") if matlab else ("NHW", "NHWC", "NCHW")
    possible = [a for a in usual if len(a) == len(shape) and ("C" not in a or shape[a.index("C")] in (1, 3))]
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


# --- the process that reads ----------------------------------------------------------------------------------------


class _Reader:
    """`hdf5_reader` at work on a file: started, not forked, as neither MPI nor CUDA outlives a fork."""

    def __init__(self, path: Path, split: str) -> None:
        self._path = path
        free = free_memory(torch.device("cpu"))
        command = [sys.executable, "-P", hdf5_reader.__file__, str(path), split, str(free)]
        with leaving_signals_to_rank():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()

    def facts(self) -> dict[str, Any]:
        """The line that it begins with."""
        line = bytearray()
        byte = memoryview(bytearray(1))
        while not line.endswith(b"\n"):
            self._fill(byte)
            line += byte
        return json.loads(line)

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """What it sends next."""
        array = np.empty(shape, dtype)
        self._fill(memoryview(array.reshape(-1).view(np.uint8)))
        return array

    def _fill(self, target: memoryview) -> None:
        """Read until the target is full; UserError names the file if the process is gone before that."""
        pipe, began = self._process.stdout.fileno(), time.monotonic()
        while target:
            if not select.select([pipe], [], [], TICK_S)[0]:
                heed_stop()
                if time.monotonic() - began > PATIENCE_S:
                    raise RunError(f"{self._path}: has given nothing for {PATIENCE_S:g} s; look at its file system")
                continue
            if not (count := os.readv(pipe, [target])):
                raise self._died()
            target, began = target[count:], time.monotonic()

    def _died(self) -> UserError:
        reason, status = self._process.stderr.read().decode(errors="replace").strip(), self._process.wait()
        if status == 1 and reason:
            return UserError(f"{self._path}: {reason}")
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return UserError(f"{self._path}: is damaged: reading it ended the HDF5 library {how}; replace it")
