"""PNG and TIFF files of 16 bits a channel, written byte by byte: Pillow writes none in colour."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NONE, LZW, DEFLATE = 1, 5, 8


def deep(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth uint16 values with all bits in use, as compression likes them."""
    values = np.random.default_rng(seed).integers(0, 300, shape).cumsum(-1 if len(shape) < 3 else -2)
    return (values * 7 + 40_000 * (np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 2)).astype(np.uint16)


def write_png(path: Path, array: np.ndarray, more: bytes = b"", order: int | None = None) -> None:
    """uint16 (H, W) or (H, W, C), C 2 with alpha, 3, or 4 with alpha; `more` are chunks before the pixels."""
    height, width, channels = (*array.shape, 1)[:3]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    turned = chunk(b"eXIf", _exif(order)) if order else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + turned + more + pixels + chunk(b"IEND", b""))


def chunk(kind: bytes, data: bytes) -> bytes:
    """One of a PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def write_tiff(
    path: Path,
    array: np.ndarray,
    compression: int = NONE,
    predictor: int = 1,
    order: str = "<",
    rows: int = 5,
    tile: int | None = None,
    tags: dict[int, int] | None = None,
) -> None:
    """uint16 (H, W) or (H, W, C) in strips of so many rows, or in square tiles."""
    height, width, channels = (*array.shape, 1)[:3]
    array = array.reshape(height, width, channels)
    blocks = []
    for top in range(0, height, tile or rows):
        for left in range(0, width, tile or width):
            block = array[top : top + (tile or rows), left : left + (tile or width)]
            if tile:
                block = np.pad(block, ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)), "edge")
            if predictor == 2:
                block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
            blocks.append(_packed(block.astype(f"{order}u2"), compression))
    fields = {256: width, 257: height, 259: compression, 262: 2 if channels > 2 else 1, 277: channels, 317: predictor}
    fields |= {322: tile, 323: tile} if tile else {278: rows}
    fields |= {338: 2} if channels == 4 else {}
    starts = np.cumsum([8, *map(len, blocks)])[:-1].tolist()
    lists = {(324 if tile else 273): starts, (325 if tile else 279): list(map(len, blocks)), 258: [16] * channels}
    at, more, entries = 8 + sum(map(len, blocks)), b"", []
    for tag, values in (lists | {tag: [value] for tag, value in (fields | (tags or {})).items()}).items():
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            more, packed = more + packed, struct.pack(f"{order}I", at + len(more))
        entries.append((tag, struct.pack(f"{order}HHI", tag, 4, len(values)) + packed))
    table = b"".join(entry for _, entry in sorted(entries))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at + len(more))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(blocks) + more + struct.pack(f"{order}H", len(entries)) + table + bytes(4))


def _packed(block: np.ndarray, compression: int) -> bytes:
    if compression == NONE:
        return block.tobytes()
    if compression == DEFLATE:
        return zlib.compress(block.tobytes())
    grey, file = np.frombuffer(block.tobytes(), np.uint8).reshape(block.shape[0], -1), io.BytesIO()
    Image.fromarray(grey).save(file, "TIFF", compression="tiff_lzw", tiffinfo={278: len(grey)})
    with Image.open(file) as image:
        (start,), (count,) = image.tag_v2[273], image.tag_v2[279]
    return file.getvalue()[start : start + count]
