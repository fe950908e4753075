"""What pixels are numbers of: 8-bit levels, or values of a stated range, and their way to [-1, 1] without a loss.

`data.range` is None for 8-bit images, which stay uint8 as far as the model. Of all others it is the range of the
values; they are scaled once, when they are read, to float32, which holds 16 bits and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fdiff.config import DataConfig
from fdiff.errors import UserError

FULL = (0.0, 65535.0)  # of the values in a picture file of 16 bits a channel
TYPES = ("uint8", "uint16", "float16", "float32", "float64")
CHANNELS = 16  # at most
BLOCK = 256  # images scaled at once: bounds their float64 copy


def check_type(what: str, dtype: np.dtype, shape: Sequence[int], data: DataConfig) -> None:
    """UserError unless images of that type can be used with what `data.range` says, or does not say, of them."""
    found, wide = f"{what} is {dtype} {tuple(shape)}", ", ".join(TYPES[1:])
    if dtype.name not in TYPES:
        raise UserError(f"{found}; it must be uint8, or with --data.range [LOW,HIGH] one of {wide}")
    if dtype != np.uint8 and data.range is None:
        example = "[0,65535]" if dtype.kind == "u" else "[0,1]"
        raise UserError(f"{found}; it must be uint8, or its range be given as --data.range [LOW,HIGH], e.g. {example}")
    if dtype == np.uint8 and data.range is not None:
        raise UserError(f"data.range: {found}, with values from 0 to 255, not over {told(data.range)}; leave it out")


def told(limits: tuple[float, float]) -> str:
    """The limits as a flag has them."""
    return f"[{limits[0]:.9g},{limits[1]:.9g}]"


def outside(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Which of the images (n, …) have a value outside the limits, or none that is finite: bool (n,).

    The limits are taken as the values' type has them: of float32 the limit 0.1 lets 0.1 pass.
    """
    flat = values.reshape(len(values), -1)
    with np.errstate(over="ignore"):
        low, high = (values.dtype.type(limit) if values.dtype.kind == "f" else limit for limit in limits)
    return ~((flat >= low) & (flat <= high) & np.isfinite(flat)).all(1)


def complaint(image: np.ndarray, limits: tuple[float, float], where: str) -> str:
    """What to say of an image that is `outside`."""
    value = next(v for v in image.reshape(-1) if outside(np.array([v]), limits)[0])
    return f"{where}: has the value {value:.9g}, outside data.range {told(limits)}; give the range that the values have"


def scale(values: np.ndarray, limits: tuple[float, float], where: Callable[[int], str]) -> Tensor:
    """Images (n, …) of a type in `TYPES` as float32: the limits become exactly -1 and 1.

    UserError names the first image, by `where` of its row, that has a value outside the limits, and the value.
    """
    low, high = limits
    out = torch.empty(values.shape, dtype=torch.float32)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        if len(bad := np.flatnonzero(outside(block, limits))):
            raise UserError(complaint(block[bad[0]], limits, where(start + int(bad[0]))))
        scaled = (block.astype(np.float64) - low) * (2 / (high - low)) - 1
        out[start : start + BLOCK] = torch.from_numpy(scaled.clip(-1, 1))
    return out
