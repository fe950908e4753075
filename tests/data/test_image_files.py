"""Image files as users have them: turned, transparent, of any depth, damaged, or no files at all."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from small_datasets import REPO, all_images, folder, pixels, refusal, save

from fdiff.data import open_source, read_split
from fdiff.data.decoding import EXTENSIONS, decode, read_header
from fdiff.data.inspection import Findings, infer_shape, inspect, merge
from fdiff.errors import UserError

MANY = 10**6
ORIENTATION = 0x0112  # EXIF


def read(path: Path, background: str = "white") -> np.ndarray:
    return np.asarray(decode(path, MANY, background))


# --- upright


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".tif lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_read_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    marked = Image.new("L", (24, 16), 255)
    ImageDraw.Draw(marked).rectangle((0, 0, 7, 7), 0)  # top left
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    suffix, _, compression = suffix.partition(" ")
    options = {"compression": f"tiff_{compression}"} if compression else {}
    options |= {".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(suffix, {})
    marked.save(tmp_path / f"a{suffix}", exif=exif, **options)
    found = read(tmp_path / f"a{suffix}")
    array = np.asarray(marked)
    upright = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.T, 6: np.rot90(array, -1),
        7: np.rot90(array, 2).T, 8: np.rot90(array),
    }[orientation]  # fmt: skip
    found = found if found.ndim == 2 else found[..., 0]
    assert found.shape == upright.shape and abs(found.astype(int) - upright).max() <= 8  # JPEG


# --- transparent


@pytest.mark.parametrize("background", ["white", "black", "#8000ff"])
@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "L with tRNS.png", "RGB with tRNS.png", "RGBA.webp",
                                  "P.gif", "RGBA.tif"])  # fmt: skip
def test_what_is_transparent_shows_the_background(tmp_path: Path, kind: str, background: str) -> None:
    """A symbol of level 40 on transparent ground, stored as black."""
    mode, _, suffix = kind.partition(".")
    symbol = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ImageDraw.Draw(symbol).rectangle((4, 4, 11, 11), (40, 40, 40, 255))
    options: dict[str, object] = {"lossless": True} if suffix == "webp" else {}
    if mode in ("P", "L with tRNS", "RGB with tRNS"):
        options["transparency"] = (0, 0, 0) if mode.startswith("RGB") else 0
        symbol = symbol.convert("RGB").convert("L") if mode[0] in "PL" else symbol.convert("RGB")
        if mode == "P":
            symbol.putpalette([v for v in range(256) for _ in range(3)])
    else:
        symbol = symbol.convert(mode)
    symbol.save(tmp_path / f"a.{suffix}", **options)
    assert read_header(tmp_path / f"a.{suffix}", MANY).transparent
    found = np.asarray(decode(tmp_path / f"a.{suffix}", MANY, background).convert("RGB"))
    ground = {"white": (255,) * 3, "black": (0,) * 3, "#8000ff": (128, 0, 255)}[background]
    assert tuple(found[0, 0]) == ground and tuple(found[8, 8]) == (40, 40, 40)


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 4, 4), (0, 0, 0, 51), np.uint8))
    assert read(tmp_path / "a.png", "white")[0, 0].tolist() == [204] * 3


# --- what is refused


@pytest.mark.parametrize("name", [f"{kind}.png" for kind in ("avif", "blp", "dds", "spider")])
def test_a_file_of_a_format_that_is_not_ours_is_not_tried(tmp_path: Path, name: str, monkeypatch) -> None:
    """The library knows 43 formats; some of their decoders start programs or raise anything."""
    Image.init()
    beginnings = {"avif.png": b"\0\0\0\x20ftypavif", "blp.png": b"BLP2", "dds.png": b"DDS ", "spider.png": b"\0" * 100}
    (tmp_path / name).write_bytes(beginnings[name] + bytes(200))
    (tmp_path / "9.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for path in (tmp_path / name, tmp_path / "9.png"):
        refusal(lambda path=path: decode(path, MANY, "white"), str(path), "it is none of PNG, JPEG")


def test_a_file_with_another_ones_suffix_is_read(tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8)).save(tmp_path / "a.png", format="JPEG")
    assert read(tmp_path / "a.png").shape == (8, 8)


@pytest.mark.parametrize("kind", ["fifo", "socket", "link to nothing"])
def test_what_has_an_images_name_and_is_no_file_is_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "1.png", pixels(8, 8))
    path = tmp_path / "5.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.symlink_to(tmp_path / "gone")
    refusal(lambda: open_source(folder(tmp_path), "train"), str(path), "no regular file")


def test_a_folder_with_an_images_name_is_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "x.jpg" / "1.png", pixels(8, 8))
    assert len(open_source(folder(tmp_path), "train")) == 1


def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(30, 20))
    refusal(lambda: decode(tmp_path / "a.png", 599, "white"), "20x30", "data.max_pixels = 599", "--data.max_pixels 600")
    assert read(tmp_path / "a.png").shape == (30, 20)
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", 0)
    (tmp_path / "a.png").write_bytes(bomb + bytes(100))
    with pytest.raises(UserError):  # long before 1.2 GB are taken
        decode(tmp_path / "a.png", 64_000_000, "white")


def test_a_strip_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(21, 1))
    refusal(lambda: decode(tmp_path / "a.png", MANY, "white"), "1x21", "more than 20 times")


def raw_tiff(bits: int, samples: int, sample_format: int, extra: tuple[int, ...] = (), photometric: int = 1) -> bytes:
    """A little-endian TIFF of 2x2 pixels, zeros, with these tags."""
    tags = [(256, 3, (2,)), (257, 3, (2,)), (258, 3, (bits,) * samples), (259, 3, (1,)), (262, 3, (photometric,)),
            (273, 4, (0,)), (277, 3, (samples,)), (278, 3, (2,)), (279, 4, (4 * samples * bits // 8,)),
            (339, 3, (sample_format,) * samples)]  # fmt: skip
    tags = sorted(tags + ([(338, 3, extra)] if extra else []))
    place, more, table = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if tag == 273:
            packed = struct.pack("<I", place + 200)
        if len(packed) > 4:
            more, packed = more + packed, struct.pack("<I", place + len(more))
        table += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + more.ljust(200, b"\0") + bytes(100)


UNREADABLE = {
    "rgb.ppm": (b"P6 2 2 65535\n" + bytes(24), "values up to 65535"),
    "plain.ppm": (b"P3 2 2 1000\n" + b"999 " * 12, "values up to 1000"),
    "grey.pgm": (b"P5 2 2 65535\n" + bytes(8), "16 bits"),
    "grey12.pgm": (b"P5 2 2 4095\n" + bytes(8), "values up to 4095"),
    "cmyk.tif": (raw_tiff(16, 4, 1, photometric=5), "16 bits"),
    "signed16.tif": (raw_tiff(16, 1, 2), "signed"),
    "signed.tif": (raw_tiff(8, 1, 2), "signed"),
    "float.tif": (raw_tiff(32, 1, 3), "32 bits"),
    "extra.tif": (raw_tiff(8, 4, 1, (0,), photometric=2), "1 extra channels"),
    "extras.tif": (raw_tiff(8, 5, 1, (0, 0), photometric=2), "2 extra channels"),
    "lab.tif": (raw_tiff(8, 3, 1, photometric=8), "mode LAB"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_would_lose_depth_or_meaning_is_refused(tmp_path: Path, name: str) -> None:
    raw, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(raw)
    for read_it in (lambda: read_header(tmp_path / name, MANY), lambda: decode(tmp_path / name, MANY, "white")):
        refusal(read_it, str(tmp_path / name), reason, "convert it to 8 bits")


@pytest.mark.parametrize("raw", [b"P5 2 2 100\n" + bytes([0, 50, 100, 25]), b"P2 2 2 100\n0 50 100 25\n"])
def test_fewer_levels_than_255_are_spread(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pgm").write_bytes(raw)
    assert abs(read(tmp_path / "a.pgm").astype(int) - [[0, 127], [255, 64]]).max() <= 1


# --- a folder looked at before it is used


def animated(path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (30, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", ".webp"])
def test_of_several_frames_the_first_is_taken_and_counted(tmp_path: Path, suffix: str) -> None:
    animated(tmp_path / f"a{suffix}")
    save(tmp_path / "b.png", pixels(8, 8))
    found = inspect(read_split(folder(tmp_path), "train"), range(2), folder(tmp_path))
    assert found.frames == 1 and abs(int(read(tmp_path / f"a{suffix}").flat[0]) - 30) <= 2


def test_findings_of_ranks_are_those_of_all(tmp_path: Path) -> None:
    for i, (height, width, *channels) in enumerate([(8, 12), (30, 20, 3), (9, 9), (40, 64, 4)]):
        save(tmp_path / f"{i}.png", pixels(height, width, *channels))
    split, data = read_split(folder(tmp_path), "train"), folder(tmp_path)
    whole = inspect(split, range(4), data)
    assert whole == Findings(4, (8, 12), (40, 64), colour=2, transparent=1)
    assert whole.sizes == "8x12 to 40x64"
    assert merge([vars(inspect(split, rows, data)) for rows in ([0, 2], [1, 3], [])]) == whole


def test_side_and_channels_are_inferred_only_where_they_are_clear(tmp_path: Path) -> None:
    data = folder(tmp_path, image_side=None)
    square = Findings(3, (16, 16), (16, 16), colour=1)
    found = infer_shape(data, square, stages=3)
    assert (found.image_side, found.channels) == (16, 3)
    assert infer_shape(data, replace(square, colour=0), stages=3).channels == 1
    assert infer_shape(replace(data, channels=1, image_side=8), square, stages=3) == replace(
        data, channels=1, image_side=8
    )
    refusal(lambda: infer_shape(data, replace(square, largest=(20, 18)), stages=3), "16x16 to 20x18", "in common")
    refusal(lambda: infer_shape(data, replace(square, smallest=(6, 6), largest=(6, 6)), 3), "6x6", "halved evenly")


@pytest.mark.parametrize("workers", [0, 2])
def test_unfit_images_are_left_out_or_stop(tmp_path: Path, workers: int, monkeypatch) -> None:
    monkeypatch.setattr("fdiff.data.inspection.FEW", 0)
    for i in range(6):
        save(tmp_path / f"{i}.png", np.full((8, 8), 40 * i, np.uint8))
    cut = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(cut[:-20])
    (tmp_path / "2.png").write_bytes(b"")
    data = folder(tmp_path, workers=workers)
    refusal(lambda: open_source(data, "train"), str(tmp_path / "2.png"))
    skipping = replace(data, on_bad_image="skip")
    assert all_images(open_source(skipping, "train"))[:, 0, 0, 0].tolist() == [0, 40, 120, 200]
    found = inspect(read_split(skipping, "train"), range(6), skipping)
    assert sorted(found.unfit) == [2, 4] and str(tmp_path / "4.png") in found.unfit[4]
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    refusal(lambda: open_source(skipping, "train"), "no image that is fit")


# --- damaged files of all formats


SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".gif": "GIF", ".ppm": "PPM"}
FUZZ = """
import random, sys
from pathlib import Path
from fdiff.data.decoding import decode, read_header
from fdiff.errors import UserError
count, *sources = sys.argv[1:]
chance = random.Random(1)
for source in map(Path, sources):
    whole, bad, refused = source.read_bytes(), source.with_name("bad" + source.suffix), 0
    for _ in range(int(count)):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        bad.write_bytes(raw[: chance.randrange(1, len(raw))] if chance.random() < 0.2 else raw)
        for look in (lambda: read_header(bad, 10**6), lambda: decode(bad, 10**6, "white")):
            try:
                look()
            except UserError as error:
                assert str(bad) in str(error) and len(str(error).splitlines()) == 1, error
                refused += 1
    print(refused)
"""


def variants(folder: Path, suffix: str) -> list[Path]:
    """Small files in the ways in which the library writes the format."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    colour = Image.fromarray(pixels(24, 16, 3))
    options: list[dict] = {
        ".tif": [{}, *({"compression": c} for c in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"))],
        ".webp": [{}, {"lossless": True}],
        ".jpg": [{}, {"progressive": True}],
    }.get(suffix, [{}])
    paths = []
    for i, mode in enumerate(("L", "RGB", "RGBA", "P", "1", "LA", "CMYK")):
        for j, chosen in enumerate(options):
            path, written = folder / f"{i}-{j}{suffix}", io.BytesIO()
            try:
                with_exif = {"exif": exif} if suffix in (".png", ".jpg", ".webp", ".tif") else {}
                colour.convert(mode).save(written, SUFFIXES[suffix], **chosen, **with_exif)
            except (OSError, KeyError, ValueError):  # the format has no such mode
                continue
            path.write_bytes(written.getvalue())
            paths.append(path)
    return paths


def fuzz(paths: list[Path], count: int) -> list[int]:
    """How many looks at so many damaged copies of each file were refused; nothing else may happen, or be printed."""
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, str(count), *map(str, paths)], capture_output=True, text=True, cwd=REPO
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-2000:]
    return [int(line) for line in result.stdout.splitlines()]


def test_suffixes_are_those_that_are_fuzzed() -> None:
    assert {s for s in EXTENSIONS if s not in (".jpeg", ".tiff", ".pgm")} == set(SUFFIXES)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths = [path for suffix in SUFFIXES for path in variants(tmp_path, suffix)[1::4]]
    assert {path.suffix for path in paths} == set(SUFFIXES)
    assert all(fuzz(paths, 50))


def of_other_formats(folder: Path) -> list[Path]:
    """A file of each other format that the library writes, with the name of one of ours."""
    Image.init()
    paths = []
    for name in sorted(set(Image.SAVE) - set(SUFFIXES.values())):
        for mode in ("RGB", "L", "P", "1", "F"):
            written = io.BytesIO()
            try:
                Image.fromarray(pixels(24, 16, 3)).convert(mode).save(written, name)
            except Exception:  # not in this mode, or not at all by itself
                continue
            paths.append(folder / f"{name}-{mode}.png")
            paths[-1].write_bytes(written.getvalue())
            break
    return paths


@pytest.mark.rare
def test_thousands_of_damaged_files_of_other_formats_are_refused(tmp_path: Path) -> None:
    paths = of_other_formats(tmp_path)
    assert len(paths) > 12
    assert all(fuzz(paths, 3000))


@pytest.mark.rare
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_thousands_of_damaged_files_are_errors_that_name_them(tmp_path: Path, suffix: str) -> None:
    paths = variants(tmp_path, suffix)
    assert all(fuzz(paths, 3000 // len(paths)))
