"""Images looked at before they are used: what sizes and colours there are, which files are unfit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiff.config import DataConfig
from fdiff.data.decoding import decode_values, read_header
from fdiff.data.loaders import load
from fdiff.data.sources import Split, scale_file
from fdiff.data.stored import Stored, StoredArrays
from fdiff.data.values import FULL, complaint, outside
from fdiff.errors import UserError

BATCH = 256  # files looked at by a loader process at once
FEW = 1024  # files that are no work for processes


@dataclass(frozen=True)
class Findings:
    """What is known of some images, as JSON keeps it with `vars`.

    Their number; the `smallest` and the `largest` (H, W), by the shorter side; how many have colour, transparency, more
    frames than the first, more than 8 bits a channel; why some are unfit, by their row; which numbers of channels there
    are, if not only 1 and 3.
    """

    images: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    colour: int = 0
    transparent: int = 0
    frames: int = 0
    unfit: dict[int, str] = field(default_factory=dict)
    deep: int = 0
    channels: tuple[int, ...] = ()

    @property
    def numbers(self) -> set[int]:
        """The numbers of channels that there are."""
        usual = {number for number, images in ((1, self.images - self.colour), (3, self.colour)) if images}
        return set(self.channels) or usual

    @property
    def sizes(self) -> str:
        """E.g. "28x28", or "48x64 to 512x512"; height first."""
        ends = ["x".join(map(str, size)) for size in (self.smallest, self.largest) if size]
        return " to ".join(dict.fromkeys(ends))


def colours(channels: int) -> str:
    """What images of so many channels are called."""
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")


def inspect(split: Split, rows: Sequence[int], data: DataConfig) -> Findings:
    """What is found in the images at `rows`. UserError names a file that is unfit by its header.

    With `data.on_bad_image` skip each file is decoded, and what is unfit is told in the findings.
    """
    own, asked, given = isinstance(split.images, Stored), len(rows), None not in (data.image_side, data.channels)
    skip = data.on_bad_image == "skip"
    if split.alike and not (skip and data.range):  # nothing can be unfit by itself
        return _all_alike(split.alike, len(rows), data)
    if own and given and not skip and not split.alike:
        rows = rows[:1]  # to read all takes long; what comes is checked when it is read
    cuts = [np.asarray(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    workers = data.workers if len(rows) > FEW else 0
    table = np.concatenate([*(b.numpy() for b in load(_reader(split, data), split.name, cuts, workers)), _NOTHING])
    fit = table[table[:, 0] > 0]
    unfit = {int(row): _why(split, int(row), data) for row in np.asarray(rows)[table[:, 0] == 0]}
    if not len(fit):
        return Findings(unfit=unfit)
    by_side = fit[np.lexsort((fit[:, :2].max(1), fit[:, :2].min(1)))]
    channels = fit[:, 2]
    transparent, frames, deep = fit[:, 3:].sum(0).tolist()
    ends = tuple(by_side[0, :2].tolist()), tuple(by_side[-1, :2].tolist())
    counts = (int((channels == 3).sum()), transparent, frames)
    if len(rows) < asked:
        deep = asked * bool(deep or data.range)
    return Findings(asked - len(unfit), *ends, *counts, unfit, deep, _unusual(channels.tolist()))


def _all_alike(shape: tuple[int, int, int], images: int, data: DataConfig) -> Findings:
    if not images:
        return Findings()
    channels, *size = shape
    colour, deep = images * (channels == 3), images * (data.range is not None)
    return Findings(images, tuple(size), tuple(size), colour, deep=deep, channels=_unusual([channels]))


def _unusual(channels: Iterable[int]) -> tuple[int, ...]:
    numbers = sorted(set(channels))
    return () if {1, 3}.issuperset(numbers) else tuple(numbers)


def merge(found: Sequence[Findings | dict[str, Any]]) -> Findings:
    """All findings in one, whose `unfit` are those of one split."""
    all_of = [one if isinstance(one, Findings) else Findings(**one) for one in found]
    sizes = [tuple(size) for one in all_of for size in (one.smallest, one.largest) if size]
    sizes.sort(key=lambda size: (min(size), max(size)))
    unfit = {int(row): why for one in all_of for row, why in one.unfit.items()}
    counted = ("images", "colour", "transparent", "frames", "deep")
    counts = {name: sum(getattr(one, name) for one in all_of) for name in counted}
    channels = _unusual(number for one in all_of for number in one.numbers)
    ends = (sizes[0], sizes[-1]) if sizes else (None, None)
    return Findings(smallest=ends[0], largest=ends[1], unfit=unfit, channels=channels, **counts)


def infer_shape(data: DataConfig, found: Findings, stages: int) -> DataConfig:
    """With side, channels and range as found, where they are not given; UserError where no side suits all images.

    A model of so many stages halves the side between them. Only files of 16 bits a channel say their range themselves.
    """
    if found.deep and data.range is None:
        data = replace(data, range=FULL)
    if data.channels is None and found.channels[1:]:
        numbers = " or ".join(map(str, found.channels))
        raise UserError(f"data.channels: the images have {numbers} channels; keep such as have equally many")
    channels = data.channels or max(found.numbers, default=1)
    if data.image_side is not None:
        return replace(data, channels=channels)
    side, factor = min(found.smallest or (0,)), 2 ** (stages - 1)
    reason = None
    if side != min(found.largest or (0,)):
        reason = "have no side in common"
    elif side % factor:
        reason = f"cannot be halved evenly by the {stages} stages of the model"
    if reason:
        example = max(factor, min(side, 64) // factor * factor)
        raise UserError(
            f"data.image_side: the images are {found.sizes}, which {reason}; give --data.image_side {example}"
        )
    return replace(data, image_side=side, channels=channels)


_NOTHING = np.empty((0, 6), np.int64)


def _reader(split: Split, data: DataConfig) -> Any:
    """A function from rows (b,) to int64 (b, 6), as `_look` has them; zeros for a bad file."""
    skip = data.on_bad_image == "skip"

    def read(rows: np.ndarray) -> Tensor:
        table = torch.zeros(len(rows), 6, dtype=torch.int64)
        for line, row in zip(table, rows, strict=True):
            try:
                line.copy_(torch.tensor(_look(split, int(row), data, skip)))
            except UserError:
                if not skip:
                    raise
        return table

    return read


def _look(split: Split, row: int, data: DataConfig, decoding: bool) -> tuple[int, ...]:
    """Height, width, channels, whether transparent, of several frames, of more than 8 bits a channel."""
    if isinstance(split.images, StoredArrays | np.ndarray):
        image = split.images.image(row) if isinstance(split.images, StoredArrays) else split.images[row]
        if decoding and data.range and outside(image[None], data.range)[0]:
            raise UserError(complaint(image, data.range, split.where(row)))
        channels, height, width = image.shape
        return height, width, channels, 0, 0, image.dtype != np.uint8
    file = split.images[row]
    header = read_header(file, data.max_pixels)
    if decoding:
        values = decode_values(file, data.max_pixels, data.background)
        if header.deep or data.range:
            scale_file(values, data.range or FULL, str(file))
    return header.height, header.width, 3 if header.colour else 1, header.transparent, header.frames, header.deep


def _why(split: Split, row: int, data: DataConfig) -> str:
    try:
        _look(split, row, data, True)
    except UserError as error:
        return str(error)
    return f"{split.name if isinstance(split.images, Stored) else split.where(row)}: cannot always be read"
