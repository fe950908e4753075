"""What a source consists of, in lines that ranks can compare: they split one data set only if all see the same one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from blake3 import blake3

from fdiff.data.images import BLOCK
from fdiff.data.sources import FileSource, Source
from fdiff.errors import UserError


def list_source(source: Source, root: str | None) -> list[str]:
    """A line for each image file, its name under `root` and its size in bytes; of images in memory one with a checksum.

    The last line is the checksum of the labels. UserError if a file is gone.
    """
    labels = f"labels, BLAKE3 {blake3(np.ascontiguousarray(source.labels).tobytes()).hexdigest()}"
    if not isinstance(source, FileSource):
        digest = blake3()
        for start in range(0, len(source), BLOCK):
            digest.update(source.images(np.arange(start, min(start + BLOCK, len(source)))).numpy().tobytes())
        return [f"{len(source)} images, BLAKE3 {digest.hexdigest()}", labels]
    return [f"{_name(path, root)}, {_size(path)} bytes" for path in source.paths] + [labels]


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


def _name(path: Path, root: str | None) -> str:
    return os.path.relpath(path, root) if root else str(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
