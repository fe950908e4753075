"""One image file to upright pixels, L or RGB, of 8 or 16 bits: what is read at less than its full meaning is refused.

A file is asked what it is before memory is taken for its pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, _imaging

from fdiff.data.deep_pixels import read_16_bits
from fdiff.errors import UserError, first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # a file may have another's suffix, but be one of them
GREY, COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")
ASPECT = 20  # of an image that is cut to its centred square, most would be thrown away
BITS_PER_SAMPLE, SAMPLE_FORMAT, EXTRA_SAMPLES = 258, 339, 338  # TIFF 6.0
PHOTOMETRIC, PLANES = 262, 284
UNSIGNED, ALPHA = 1, (1, 2)
WHITE_IS_0, BLACK_IS_0, RGB = range(3)
DEEP = "I;16"  # how the modes of grey images of 16 bits begin


@dataclass(frozen=True)
class Encoded:
    """An image file that lies in another file; `name` says where, for errors."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


File = Path | Encoded


@dataclass(frozen=True)
class Header:
    """What an image file says of itself. Height and width are in pixels, and swapped where the image is to be turned.

    `colour`, `transparent`, `frames` and `deep`: whether it has colours, may have transparent pixels, has several
    frames or pages, has 16 bits a channel.
    """

    height: int
    width: int
    colour: bool
    transparent: bool
    frames: bool
    deep: bool = False


def read_header(path: File, max_pixels: int) -> Header:
    """What the file says, without decoding its pixels; UserError names a file that is unfit."""
    with _opened(path, max_pixels) as (image, deep):
        width, height = image.size
        colour = image.mode in COLOUR and not (image.mode == "P" and _is_grey(image.getpalette()))
        colour = colour and not (deep and image.tile[0].args == "LA;16B")
        frames = bool(getattr(image, "is_animated", False))
        return Header(height, width, colour, image.has_transparency_data, frames, deep)


def decode(path: File, max_pixels: int, background: str) -> Image.Image:
    """The first frame, upright, mode L or RGB; transparent pixels lie on `background`.

    UserError as `read_header`, and for an image of 16 bits a channel.
    """
    with _opened(path, max_pixels) as (image, deep):
        if deep:
            raise UserError(
                f"{path}: has 16 bits a channel, and the images are taken for such of 8; give --data.range [0,65535], "
                "or convert it"
            )
        grey = image.mode in GREY
        if not image.has_transparency_data:
            return ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
        over = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.new("RGBA", over.size, background)
        image.alpha_composite(over)
        return image.convert("RGB")


def decode_values(path: File, max_pixels: int, background: str) -> np.ndarray:
    """As `decode`, but uint8 or, of an image of 16 bits a channel, uint16: (C, H, W), C 1 or 3. UserError."""
    with _opened(path, max_pixels) as (image, deep):
        if deep:
            ground = [257 * level for level in ImageColor.getrgb(background)]
            return read_16_bits(image, ground)
    pixels = np.array(decode(path, max_pixels, background))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextlib.contextmanager
def _opened(path: File, max_pixels: int) -> Iterator[tuple[Image.Image, bool]]:
    """The image, opened and found fit by its header, and whether it has 16 bits a channel.

    Whatever is raised inside is that file's error: damaged files make decoders raise almost any exception, and warn
    without the file's name.
    """
    try:
        if isinstance(path, Path):
            _check_is_file(path)
        _silence()
        # Given a name, the library would map a TIFF into memory, and scramble one that lies on its side (Pillow 13).
        opened = path.open("rb") if isinstance(path, Path) else io.BytesIO(path.data)
        with opened as file, warnings.catch_warnings(), _own_bound():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, image, max_pixels)
                yield image, _is_deep(path, image)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); replace or remove it") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _check_is_file(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe or a device may take for ever
        raise not_a_file(path)


def not_a_file(path: str | Path) -> UserError:
    """What to say of a pipe, a device or a link to nothing."""
    return UserError(f"{path}: has an image's name and is no regular file; remove it, or give it another name")


def _check_size(path: File, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(
            f"{path}: has {width}x{height} pixels, more than data.max_pixels = {max_pixels}; remove or shrink it, or "
            f"use --data.max_pixels {width * height}"
        )
    if max(width, height) > ASPECT * min(width, height):
        raise UserError(
            f"{path}: is {width}x{height}, of which only the centred square is used; cut it so that no side is more "
            f"than {ASPECT} times the other, or remove it"
        )


def _is_deep(path: File, image: Image.Image) -> bool:
    """Whether it has 16 bits a channel, of a kind that is read at its full depth.

    UserError for what would lose bits, signs or channels: the library reads it as if it were 8-bit grey or RGB.
    """
    kinds = GREY + COLOUR
    deep = _says_16_bits(image)
    found = f"mode {image.mode}" if image.mode not in kinds and not (deep and image.mode.startswith(DEEP)) else None
    for tile in image.tile:
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        packed = any(isinstance(a, str) and ";16" in a and not a.startswith("BGR") for a in args)  # BMP: three in 16
        if packed and not deep:
            found = "16 bits a channel"
        if tile.codec_name.startswith("ppm") and args[-1] > 255:
            found = f"values up to {args[-1]}"
    if image.format == "TIFF":
        tags = image.tag_v2
        bits = tags.get(BITS_PER_SAMPLE, (1,))
        if max(bits) > 8 and not deep:
            found = f"{max(bits)} bits a channel"
        elif set(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) != {UNSIGNED}:
            found = "signed or floating-point values"
        elif len(extra := tags.get(EXTRA_SAMPLES, ())) > 1 or not set(extra) <= set(ALPHA):
            found = f"{len(extra)} extra channels"
        elif deep and tags.get(PLANES, 1) != 1:
            found = "its channels in planes apart"
    elif deep and "transparency" in image.info:
        found = "16 bits a channel and a colour that is transparent"
    if found:
        raise UserError(
            f"{path}: has {found}; convert it to 8 bits a channel, or in PNG or TIFF 16, grey or RGB, with or without "
            "alpha"
        )
    return deep


def _says_16_bits(image: Image.Image) -> bool:
    """Whether it is a PNG, or a TIFF of unsigned grey or RGB, of 16 bits a channel."""
    if image.format == "PNG":
        return any(isinstance(tile.args, str) and tile.args.endswith(";16B") for tile in image.tile)
    if image.format != "TIFF" or image.tag_v2.get(PHOTOMETRIC) not in (WHITE_IS_0, BLACK_IS_0, RGB):
        return False
    return set(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) == {16}


def _is_grey(palette: list[int] | None) -> bool:
    return palette is not None and palette[0::3] == palette[1::3] == palette[2::3]


@contextlib.contextmanager
def _own_bound() -> Iterator[None]:
    """Inside, `_check_size` is the only bound on pixels, not the library's."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@functools.cache
def _silence() -> None:
    """Have the library and libtiff, which print without a file's name, print nothing."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    library = ctypes.CDLL(_imaging.__file__)  # finds the symbols of what it is linked with, if that includes libtiff
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):
            getattr(library, handler)(None)
