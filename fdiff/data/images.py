"""What happens to pixels between a file and the model: decode, crop, resize, grey or RGB, scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdiff.errors import UserError, first_line

BLOCK = 1024  # images resized at once: bounds the float32 copy of a large set
LUMA = (19595, 38470, 7471)  # ITU-R 601-2 weights of R, G, B in 1/65536, as Pillow rounds them


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images of any shape to `dtype`: x / 127.5 - 1, so that 0 and 255 are exactly -1 and 1."""
    return images.to(dtype).div_(127.5).sub_(1)


def prepare(images: Tensor, side: int, channels: int) -> Tensor:
    """uint8 (n, C, H, W) to uint8 (n, channels, side, side); C is 1 or 3, and a fit is returned as it is.

    The largest centred square is resized: averaged over areas where it shrinks, antialiased bilinear where it
    grows, rounded to the nearest level.
    """
    if images.shape[1:] == (channels, side, side):
        return images
    out = torch.empty(len(images), channels, side, side, dtype=torch.uint8)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        if channels < block.shape[1]:
            block = _grey(block)
        out[start : start + BLOCK] = _resize(_centre_square(block), side)  # grey is repeated to RGB
    return out


def read_image(path: Path, side: int, channels: int) -> Tensor:
    """The image file as uint8 (channels, side, side), as `prepare` makes it; UserError names a bad file."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)}); replace or remove it") from None
    if mode.startswith(("I", "F")):  # Pillow would clip its 16 or 32 bits to 8
        raise UserError(f"{path}: has more than 8 bits a channel (mode {mode}); convert it to 8 bits")
    planes = torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
    return prepare(planes[None], side, channels)[0].contiguous()


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
