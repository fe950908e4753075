"""What happens to pixels between a file and the model: crop, resize, grey or RGB, scale."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

BLOCK = 1024  # images resized at once: bounds the float32 copy of a large set
LUMA = (19595, 38470, 7471)  # ITU-R 601-2 weights of R, G, B in 1/65536, as Pillow rounds them


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images of any shape to `dtype`: x / 127.5 - 1, so that 0 and 255 are exactly -1 and 1."""
    return images.to(dtype).div_(127.5).sub_(1)


def prepare(images: Tensor, side: int, channels: int, by_area: bool = False) -> Tensor:
    """uint8 (n, C, H, W) to uint8 (n, channels, side, side); C is 1 or 3, and a fit is returned as it is.

    The largest centred square is resized as `fit` does, or with `by_area` averaged over areas where it shrinks and
    antialiased bilinear where it grows, rounded to the nearest level.
    """
    if images.shape[1:] == (channels, side, side):
        return images
    out = torch.empty(len(images), channels, side, side, dtype=torch.uint8)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        if channels < block.shape[1]:
            block = _grey(block)
        block = _centre_square(block)
        out[start : start + BLOCK] = _resize(block, side) if by_area else _fit_all(block, side)  # grey is repeated
    return out


def fit(image: Image.Image, side: int, channels: int) -> Tensor:
    """The image's largest centred square as uint8 (channels, side, side).

    Resized as torchvision's `Resize` does with 8-bit images: antialiased bilinear, in Pillow's own arithmetic.
    """
    image = image.convert("RGB" if channels == 3 else "L")
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    square = image.crop((left, top, left + edge, top + edge))
    pixels = np.array(square if edge == side else square.resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).reshape(side, side, channels).permute(2, 0, 1).contiguous()


def _fit_all(images: Tensor, side: int) -> Tensor:
    """uint8 (n, C, S, S) to (n, C, side, side)."""
    if images.shape[-1] == side:
        return images
    channels, rows = images.shape[1], images.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return torch.stack([fit(Image.fromarray(row), side, channels) for row in rows])


def _grey(images: Tensor) -> Tensor:
    """(n, 3, H, W) to (n, 1, H, W), to the bit what Pillow's conversion to L gives."""
    weights = torch.tensor(LUMA, dtype=torch.int32).view(1, 3, 1, 1)
    return ((images.int() * weights).sum(1, keepdim=True, dtype=torch.int32) + 0x8000 >> 16).byte()


def _centre_square(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _resize(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    pixels = images.float()
    if images.shape[-1] > side:
        resized = functional.interpolate(pixels, (side, side), mode="area")
    else:
        resized = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()
