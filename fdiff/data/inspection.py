"""Images looked at before they are used: what sizes and colours there are, which files are unfit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiff.config import DataConfig
from fdiff.data.decoding import decode, read_header
from fdiff.data.loaders import load
from fdiff.data.own_images import OwnImages
from fdiff.data.sources import Split
from fdiff.errors import UserError

BATCH = 256  # files looked at by a loader process at once
FEW = 1024  # files that are no work for processes


@dataclass(frozen=True)
class Findings:
    """What is known of some images, as JSON keeps it with `vars`.

    Their number; the `smallest` and the `largest` (H, W), by the shorter side; how many have colour, transparency, more
    frames than the first; why some are unfit, by their row.
    """

    images: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    colour: int = 0
    transparent: int = 0
    frames: int = 0
    unfit: dict[int, str] = field(default_factory=dict)

    @property
    def sizes(self) -> str:
        """E.g. "28x28", or "48x64 to 512x512"; height first."""
        ends = ["x".join(map(str, size)) for size in (self.smallest, self.largest) if size]
        return " to ".join(dict.fromkeys(ends))


def inspect(split: Split, rows: Sequence[int], data: DataConfig) -> Findings:
    """What is found in the images at `rows`. UserError names a file that is unfit by its header.

    With `data.on_bad_image` skip each file is decoded, and what is unfit is told in the findings.
    """
    if isinstance(split.images, np.ndarray):
        _, channels, *size = split.images.shape
        return Findings(len(rows), tuple(size), tuple(size), len(rows) * (channels == 3)) if len(rows) else Findings()
    own, asked = isinstance(split.images, OwnImages), len(rows)
    if own and None not in (data.image_side, data.channels) and data.on_bad_image == "stop":
        rows = rows[:1]  # a set of the user's own has no headers, and what it gives is checked when it is read
    cuts = [np.asarray(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    workers = data.workers if len(rows) > FEW else 0
    table = np.concatenate([*(b.numpy() for b in load(_reader(split, data), split.name, cuts, workers)), _NOTHING])
    fit = table[table[:, 0] > 0]
    unfit = {int(row): _why(split, int(row), data) for row in np.asarray(rows)[table[:, 0] == 0]}
    if not len(fit):
        return Findings(unfit=unfit)
    by_side = fit[np.lexsort((fit[:, :2].max(1), fit[:, :2].min(1)))]
    counts = fit[:, 2:].sum(0).tolist()
    ends = tuple(by_side[0, :2].tolist()), tuple(by_side[-1, :2].tolist())
    return Findings(asked - len(unfit), *ends, *counts, unfit)


def merge(found: Sequence[Findings | dict[str, Any]]) -> Findings:
    """All findings in one, whose `unfit` are those of one split."""
    all_of = [one if isinstance(one, Findings) else Findings(**one) for one in found]
    sizes = [tuple(size) for one in all_of for size in (one.smallest, one.largest) if size]
    sizes.sort(key=lambda size: (min(size), max(size)))
    unfit = {int(row): why for one in all_of for row, why in one.unfit.items()}
    counts = {name: sum(getattr(one, name) for one in all_of) for name in ("images", "colour", "transparent", "frames")}
    return Findings(smallest=sizes[0] if sizes else None, largest=sizes[-1] if sizes else None, unfit=unfit, **counts)


def infer_shape(data: DataConfig, found: Findings, stages: int) -> DataConfig:
    """With side and channels as found, where they are not given; UserError where no side suits all images.

    A model of so many stages halves the side between them.
    """
    channels = data.channels or (3 if found.colour else 1)
    if data.image_side is not None:
        return replace(data, channels=channels)
    side, factor = min(found.smallest or (0,)), 2 ** (stages - 1)
    reason = None
    if side != min(found.largest or (0,)):
        reason = "have no side in common"
    elif side % factor:
        reason = f"cannot be halved evenly by the {stages} stages of model.dim_mults"
    if reason:
        example = max(factor, min(side, 64) // factor * factor)
        raise UserError(
            f"data.image_side: the images are {found.sizes}, which {reason}; give --data.image_side {example}"
        )
    return replace(data, image_side=side, channels=channels)


_NOTHING = np.empty((0, 5), np.int64)


def _reader(split: Split, data: DataConfig) -> Any:
    """A function from rows (b,) to int64 (b, 5): height, width, colour, transparent, frames; zeros for a bad file."""
    skip = data.on_bad_image == "skip"

    def read(rows: np.ndarray) -> Tensor:
        table = torch.zeros(len(rows), 5, dtype=torch.int64)
        for line, row in zip(table, rows, strict=True):
            try:
                line.copy_(torch.tensor(_look(split, int(row), data, skip)))
            except UserError:
                if not skip:
                    raise
        return table

    return read


def _look(split: Split, row: int, data: DataConfig, decoding: bool) -> tuple[int, ...]:
    if isinstance(split.images, OwnImages):
        channels, height, width = split.images.image(row).shape
        return height, width, channels == 3, 0, 0
    header = read_header(split.images[row], data.max_pixels)
    if decoding:
        decode(split.images[row], data.max_pixels, data.background)
    return header.height, header.width, header.colour, header.transparent, header.frames


def _why(split: Split, row: int, data: DataConfig) -> str:
    try:
        _look(split, row, data, True)
    except UserError as error:
        return str(error)
    where = split.name if isinstance(split.images, OwnImages) else split.images[row]
    return f"{where}: cannot always be read"
