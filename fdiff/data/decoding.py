"""One image file to upright 8-bit pixels, L or RGB: what is read at less than its full meaning is refused instead.

A file is asked what it is before memory is taken for its pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from fdiff.errors import UserError, first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # a file may have another's suffix, but be one of them
GREY, COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")
ASPECT = 20  # of an image that is cut to its centred square, most would be thrown away
BITS_PER_SAMPLE, SAMPLE_FORMAT, EXTRA_SAMPLES = 258, 339, 338  # TIFF 6.0
UNSIGNED, ALPHA = 1, (1, 2)


@dataclass(frozen=True)
class Header:
    """What an image file says of itself. Height and width are in pixels, and swapped where the image is to be turned.

    `colour`, `transparent` and `frames`: whether it has colours, may have transparent pixels, has several frames or
    pages.
    """

    height: int
    width: int
    colour: bool
    transparent: bool
    frames: bool


def read_header(path: Path, max_pixels: int) -> Header:
    """What the file says, without decoding its pixels; UserError names a file that is unfit."""
    with _opened(path, max_pixels) as image:
        width, height = image.size
        colour = image.mode in COLOUR and not (image.mode == "P" and _is_grey(image.getpalette()))
        return Header(height, width, colour, image.has_transparency_data, bool(getattr(image, "is_animated", False)))


def decode(path: Path, max_pixels: int, background: str) -> Image.Image:
    """The first frame, upright, mode L or RGB; transparent pixels lie on `background`. UserError as `read_header`."""
    with _opened(path, max_pixels) as image:
        grey = image.mode in GREY
        if not image.has_transparency_data:
            return ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
        over = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.new("RGBA", over.size, background)
        image.alpha_composite(over)
        return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The image, opened and found fit by its header; whatever is raised inside is that file's error.

    Damaged files make decoders raise almost any exception, and warn without the file's name.
    """
    try:
        _check_is_file(path)
        _silence()
        # Given a name, the library would map a TIFF into memory, and scramble one that lies on its side (Pillow 13).
        with path.open("rb") as file, warnings.catch_warnings(), _own_bound():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, image, max_pixels)
                _check_depth(path, image)
                yield image
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


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
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


def _check_depth(path: Path, image: Image.Image) -> None:
    """UserError for what would lose bits, signs or channels: the library reads it as if it were 8-bit grey or RGB."""
    found = f"mode {image.mode}" if image.mode not in GREY + COLOUR else None
    for tile in image.tile:
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(a, str) and ";16" in a and not a.startswith("BGR") for a in args):  # BMP packs three in 16
            found = "16 bits a channel"
        if tile.codec_name.startswith("ppm") and args[-1] > 255:
            found = f"values up to {args[-1]}"
    if image.format == "TIFF":
        tags = image.tag_v2
        if max(tags.get(BITS_PER_SAMPLE, (1,))) > 8:
            found = f"{max(tags[BITS_PER_SAMPLE])} bits a channel"
        elif set(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) != {UNSIGNED}:
            found = "signed or floating-point values"
        elif len(extra := tags.get(EXTRA_SAMPLES, ())) > 1 or not set(extra) <= set(ALPHA):
            found = f"{len(extra)} extra channels"
    if found:
        raise UserError(f"{path}: has {found}; convert it to 8 bits a channel, grey or RGB, with or without alpha")


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
