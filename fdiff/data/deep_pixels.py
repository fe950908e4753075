"""The pixels of PNG and TIFF images of 16 bits a channel, which Pillow reads at full depth only where they are grey.

Of colour it keeps the higher byte of each value. Told that the bytes come in the other order, it keeps the lower one:
so colour is decoded twice.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from PIL import Image, ImageOps

PHOTOMETRIC, EXTRA_SAMPLES = 262, 338  # TIFF 6.0
WHITE_IS_0, ASSOCIATED = 0, 1
WHITE = 65535
SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # orders of bytes; N is this machine's


def read_16_bits(image: Image.Image, ground: list[int]) -> np.ndarray:
    """uint16 (C, H, W), C 1 or 3, of an opened PNG or TIFF, upright; what is transparent lies on `ground` (R, G, B).

    Whatever Pillow raises at a damaged file is raised.
    """
    white_is_0 = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_0
    associated = image.format == "TIFF" and image.tag_v2.get(EXTRA_SAMPLES) == (ASSOCIATED,)
    if image.mode.startswith("I;16"):
        pixels = np.array(ImageOps.exif_transpose(image)).astype(np.uint16)[None]
        return WHITE - pixels if white_is_0 else pixels
    pixels = _colour(image).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels) if len(pixels) == 3 else _over(pixels, ground, associated)


def _colour(image: Image.Image) -> np.ndarray:
    """uint16 (H, W, C), C 2 or 4 with alpha, or 3."""
    name, _, order = _raw_mode(image.tile[0].args).partition(";16")
    if name == "LA":  # its two times two bytes are taken for four values
        pairs = _decoded(image, "RGBA").astype(np.uint16)
        return pairs[..., 0::2] << 8 | pairs[..., 1::2]
    name = name.upper()  # RGBa, where alpha is in the colours: Pillow would take it out of each byte by itself
    high, low = (_decoded(image, f"{name};16{o}").astype(np.uint16) for o in (order, SWAPPED[order]))
    return high << 8 | low


def _raw_mode(args: Any) -> str:
    return args if isinstance(args, str) else args[0]


def _decoded(image: Image.Image, raw_mode: str) -> np.ndarray:
    """uint8 (H, W, C) as Pillow decodes the file again, its bytes being laid out so, upright."""
    file = image.fp
    file.seek(0)
    with Image.open(file, formats=(image.format,)) as again:
        again.tile = [
            tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
            for tile in again.tile
        ]
        return np.array(ImageOps.exif_transpose(again))


def _over(pixels: np.ndarray, ground: list[int], associated: bool) -> np.ndarray:
    """Grey or colour with alpha (2 or 4, H, W) on the ground, as (3, H, W); colours `associated` with alpha hold it."""
    alpha = pixels[-1:].astype(np.float64) / WHITE
    colour = pixels[:-1] * (1 if associated else alpha)
    mixed = colour + (1 - alpha) * np.array(ground, np.float64)[:, None, None]
    return mixed.round().clip(0, WHITE).astype(np.uint16)
