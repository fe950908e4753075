"""What a split consists of, so that ranks, or a run and its resumption, can tell whether they have the same images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from blake3 import blake3

from fdiff.data.parquet import ParquetImages
from fdiff.data.sources import Split
from fdiff.data.stored import Stored
from fdiff.errors import UserError

WHOLE = 2**28  # bytes of image files that are read to tell whether they are the same; of more a sample
KINDS = ("names", "sizes", "contents", "labels")


def list_split(split: Split, root: str | None) -> list[str]:
    """A line for each file, its name under `root` and its size in bytes; of images in memory one with a checksum.

    The last line is the checksum of the labels. UserError if a file is gone.
    """
    labels = f"labels, BLAKE3 {_labels(split)}"
    if isinstance(split.images, ParquetImages):
        paths = split.images.paths
    elif isinstance(split.images, list):
        paths = split.images
    else:
        return [f"{len(split)} images, BLAKE3 {_digest(_pixels(split.images, unfit=True))}", labels]
    return [f"{_name(path, root)}, {_size(path)} bytes" for path in paths] + [labels]


def first_difference(lists: Sequence[Sequence[str]]) -> str | None:
    """What differs between the lists of ranks, in one phrase; None if nothing does."""
    for rank, other in enumerate(lists):
        for mine, theirs in zip_longest(lists[0], other, fillvalue="nothing more"):
            if mine != theirs:
                return (
                    f"rank 0 has {len(lists[0]) - 1} and rank {rank} has {len(other) - 1}; the first that differs is "
                    f"{mine} on rank 0, {theirs} on rank {rank}"
                )
    return None


def fingerprint(split: Split, root: str | None) -> dict[str, str]:
    """Checksums of a split's names, sizes, contents and labels; neither the place of `root` nor times count.

    Contents are all bytes of images in memory, else of up to WHOLE bytes of files or images, of more a fixed sample.
    UserError if a file is gone.
    """
    if isinstance(split.images, ParquetImages):
        paths = split.images.paths
        names = "\n".join([*(_name(path, root) for path in paths), *split.classes])
        sizes, contents = [_size(path) for path in paths], _digest(_pixels(split.images))
    elif not isinstance(split.images, list):
        shape = (len(split), *(split.alike or ()))
        names, sizes, contents = "", [*shape], _digest(_pixels(split.images))
    else:
        names = "\n".join([*(_name(path, root) for path in split.images), *split.classes])
        sizes = [_size(path) for path in split.images]
        contents = _digest(_bytes(split.images[row]) for row in _sample(sizes))
    return {"names": _digest([names.encode()]), "sizes": _digest([str(sizes).encode()]), "contents": contents,
            "labels": _labels(split)}  # fmt: skip


def _pixels(images: np.ndarray | Stored, unfit: bool = False) -> Iterator[np.ndarray | bytes]:
    """All images in memory, or of those stored elsewhere so many, in a fixed order, as make up WHOLE bytes.

    UserError at one that is unfit, unless the rows of those are to be told instead.
    """
    if isinstance(images, np.ndarray):
        yield images
    else:
        yield from images.contents(WHOLE, tell_unfit=unfit)


def _sample(sizes: Sequence[int]) -> list[int]:
    """Rows of files of WHOLE bytes together, the same ones each time."""
    order = np.random.RandomState(0).permutation(len(sizes))
    within = np.cumsum(np.asarray(sizes)[order]) <= WHOLE
    return sorted(order[within].tolist() or order[:1].tolist())


def _digest(blocks: Iterable[bytes | np.ndarray]) -> str:
    digest = blake3()
    for block in blocks:
        digest.update(block if isinstance(block, bytes) else np.ascontiguousarray(block).data.cast("B"))
    return digest.hexdigest()


def _labels(split: Split) -> str:
    return "" if split.labels is None else _digest([split.labels.astype(np.int64)])


def _name(path: Path, root: str | None) -> str:
    return os.path.relpath(path, root) if root else str(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
