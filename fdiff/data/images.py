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
    """Images of any shape to `dtype`: uint8 by x / 127.5 - 1, so that 0 and 255 are exactly -1 and 1.

    Images of more than 8 bits are float32, and were scaled to [-1, 1] when they were read: see `values`.
    """
    if images.dtype != torch.uint8:
        return images.to(dtype)
    return images.to(dtype).div_(127.5).sub_(1)


def prepare(images: Tensor, side: int, channels: int, by_area: bool = False) -> Tensor:
    """uint8 or float32 (n, C, H, W) to the same type (n, channels, side, side); a fit is returned as it is.

    C is `channels`, or one of them is 1 and the other 3. The largest centred square is resized as `fit` does, or with
    `by_area` averaged over areas where it shrinks and antialiased bilinear where it grows, rounded to the nearest
    level. float32 is resized in float32, antialiased bilinear.
    """
    if images.shape[1:] == (channels, side, side):
        return images
    out = torch.empty(len(images), channels, side, side, dtype=images.dtype)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        if channels < block.shape[1]:
            block = _grey(block)
        block = _centre_square(block)
        if images.dtype != torch.uint8:
            out[start : start + BLOCK] = _resize_values(block, side)
            continue
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
    channels = images.shape[1]
    if channels not in (1, 3):  # each channel as one of grey is
        planes = _fit_all(images.reshape(-1, 1, *images.shape[2:]), side)
        return planes.reshape(len(images), channels, side, side)
    rows = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return torch.stack([fit(Image.fromarray(row), side, channels) for row in rows])


def _resize_values(images: Tensor, side: int) -> Tensor:
    """float32 (n, C, S, S) to (n, C, side, side); one by one, so that an image's bits do not depend on the others."""
    if images.shape[-1] == side:
        return images
    size = (side, side)
    resized = [functional.interpolate(one[None], size, mode="bilinear", antialias=True) for one in images]
    return torch.cat(resized).clamp_(-1, 1)


def _grey(images: Tensor) -> Tensor:
    """(n, 3, H, W) to (n, 1, H, W): of uint8 to the bit what Pillow's conversion to L gives."""
    weights = torch.tensor(LUMA, dtype=torch.int32).view(1, 3, 1, 1)
    if images.dtype != torch.uint8:
        return ((images * weights).sum(1, keepdim=True) / 0x10000).clamp_(-1, 1)
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
