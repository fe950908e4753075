"""The pixels of PNG and TIFF images of 16 bits a channel, which Pillow reads at full depth only where they are grey.

PNG colour goes through torchvision, after Pillow has found the file sound. A TIFF of colour is described anew as one of
grey with three or four times its width: the same bytes, which Pillow then hands on as they are.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image

ORIENTATION = 0x0112
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS = (
    256, 257, 258, 259, 262, 273, 277, 278, 279
)  # fmt: skip
EXTRA, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 338, 317, 322, 323, 324, 325
SHORT, LONG = 3, 4
HORIZONTAL, ASSOCIATED = 2, 1
PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, deflate twice, LZMA, Zstandard: others ignore a predictor
WHITE = 65535
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def be_ready() -> None:
    """Load what takes seconds to load, in this process and not anew in each that it forks."""
    import torchvision.io  # noqa: F401


def read_16_bits(image: Image.Image, ground: list[int]) -> np.ndarray:
    """uint16 (C, H, W), C 1 or 3, of an opened PNG or TIFF; what is transparent lies on `ground` (R, G, B).

    Whatever the libraries raise at a damaged file is raised.
    """
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint16)[None]
        return WHITE - pixels if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0 else pixels
    pixels = _png(image) if image.format == "PNG" else _tiff(image)
    if len(pixels) in (1, 3):
        return pixels
    associated = image.format == "TIFF" and image.tag_v2.get(EXTRA) == (ASSOCIATED,)
    return _over(pixels, ground, associated)


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """(C, H, W) turned as the image's orientation (EXIF, TIFF) says."""
    turn = image.getexif().get(ORIENTATION, 1)
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def _png(image: Image.Image) -> np.ndarray:
    """(C, H, W), C 2, 3 or 4."""
    from torchvision.io import ImageReadMode, decode_png  # slow to import, and only wanted here

    file = image.fp
    image.load()  # libpng prints what is wrong with a file, Pillow raises it
    file.seek(len(SIGNATURE))
    kept = [SIGNATURE]
    while len(head := file.read(8)) == 8:  # of other chunks libpng would print warnings
        chunk = head + file.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(chunk)
    pixels = decode_png(torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.numpy()


def _over(pixels: np.ndarray, ground: list[int], associated: bool) -> np.ndarray:
    """Grey or colour with alpha (2 or 4, H, W) on the ground, as (3, H, W); colours `associated` with alpha hold it."""
    alpha = pixels[-1:].astype(np.float64) / WHITE
    colour = pixels[:-1] * (1 if associated else alpha)
    mixed = colour + (1 - alpha) * np.array(ground, np.float64)[:, None, None]
    return mixed.round().clip(0, WHITE).astype(np.uint16)


def _tiff(image: Image.Image) -> np.ndarray:
    """(C, H, W), C 3 or 4."""
    tags, file = image.tag_v2, image.fp
    channels, width, height = tags[SAMPLES], tags[WIDTH], tags[HEIGHT]  # as stored: the image may lie on its side
    predictor = tags.get(PREDICTOR, 1) if tags.get(COMPRESSION, 1) in PREDICTED else 1
    if predictor not in (1, HORIZONTAL):
        raise ValueError(f"predictor {predictor}")
    tiled = TILE_OFFSETS in tags
    offsets, counts = tags[TILE_OFFSETS if tiled else OFFSETS], tags[TILE_COUNTS if tiled else COUNTS]
    blocks = []
    for offset, count in zip(offsets, counts, strict=True):
        file.seek(offset)
        blocks.append(file.read(count))
    fields = {WIDTH: width * channels, HEIGHT: height, COMPRESSION: tags.get(COMPRESSION, 1)}
    if tiled:
        fields |= {TILE_WIDTH: tags[TILE_WIDTH] * channels, TILE_HEIGHT: tags[TILE_HEIGHT]}
    else:
        fields |= {ROWS: min(tags.get(ROWS, height), height)}
    order = ">" if tags.prefix == b"MM" else "<"
    with Image.open(io.BytesIO(_grey_tiff(fields, blocks, tiled, order)), formats=("TIFF",)) as grey:
        values = np.asarray(grey).astype(np.uint16).reshape(height, width, channels)
    if predictor == HORIZONTAL:  # each value is the difference from its left neighbour, in each tile anew
        step = tags[TILE_WIDTH] if tiled else width
        for left in range(0, width, step):
            values[:, left : left + step] = values[:, left : left + step].cumsum(1, dtype=np.uint16)
    return values.transpose(2, 0, 1)


def _grey_tiff(fields: dict[int, int], blocks: list[bytes], tiled: bool, order: str) -> bytes:
    """A TIFF of 16-bit grey with these fields and these strips or tiles, as they are."""
    starts = np.cumsum([8, *map(len, blocks)])[:-1]
    names = (TILE_OFFSETS, TILE_COUNTS) if tiled else (OFFSETS, COUNTS)
    lists = dict(zip(names, (starts.tolist(), [len(block) for block in blocks]), strict=True))
    at = 8 + sum(map(len, blocks))
    more, entries = b"", []
    for tag, values in lists.items():
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            more, packed = more + packed, struct.pack(f"{order}I", at + len(more))
        entries.append((tag, LONG, len(values), packed))
    for tag, value in {**fields, BITS: 16, PHOTOMETRIC: 1, SAMPLES: 1}.items():
        entries.append((tag, LONG, 1, struct.pack(f"{order}I", value)))
    table = b"".join(struct.pack(f"{order}HHI", tag, kind, n) + packed for tag, kind, n, packed in sorted(entries))
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, at + len(more))
    return head + b"".join(blocks) + more + struct.pack(f"{order}H", len(entries)) + table + bytes(4)
