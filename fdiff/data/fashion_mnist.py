"""Fashion-MNIST: its IDX files (Debian's, torchvision's layout, a download) and the embedded excerpt."""

from __future__ import annotations

import gzip
import math
import os
import tempfile
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

from fdiff.data.sources import Split
from fdiff.errors import UserError, first_line

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION_ROOT = Path("data")  # torchvision's own examples keep their data sets there
TORCHVISION_RAW = Path("FashionMNIST/raw")
EXCERPT = "fashion_mnist_excerpt.npz"
FILES = {  # split: images, labels
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = 10


def read_fashion_mnist(root: str | None, split: str, download: bool) -> Split:
    """The split from the first folder that has it: `root`, torchvision's layout in it, or the usual places.

    UserError says where was looked and how to get the files, or which file is damaged. With `download`
    missing files are fetched into `root` (or ./data); ranks may do so at once, each file appears whole.
    """
    if root is None:
        folders = [DEBIAN_ROOT, TORCHVISION_ROOT / TORCHVISION_RAW]
    else:
        folders = [Path(root), Path(root) / TORCHVISION_RAW]
    found = next((f for f in map(lambda folder: _find(folder, split), folders) if f), None)
    if found is None and download:
        raw = Path(root or TORCHVISION_ROOT) / TORCHVISION_RAW
        _download(raw, split)
        found = _find(raw, split)
    if found is None:
        raise UserError(
            f"data.root: no Fashion-MNIST {split} split ({' and '.join(FILES[split])}, plain or .gz) in "
            f"{' or '.join(map(str, folders))}; apt install dataset-fashion-mnist, name the files' folder by "
            "--data.root, or use --data.download true"
        )
    images, labels = read_idx(found[0], dims=3), read_idx(found[1], dims=1)
    _check(found, images, labels)
    return Split(f"fashion-mnist, {split} split, {found[0].parent}", images[:, None], labels, by_area=True)


def read_embedded(split: str) -> Split:
    """The excerpt in the package: the first 200 training and 50 test images of each class."""
    with (resources.files("fdiff") / "assets" / EXCERPT).open("rb") as file:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return Split(f"embedded Fashion-MNIST excerpt, {split} split", images[:, None], labels, by_area=True)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an IDX file, gzipped or not; UserError names a damaged file."""
    raw = _read_bytes(path)
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims  # zeros, type uint8; the sizes follow
    if raw[:4] != magic or len(raw) < header:
        raise UserError(
            f"{path}: begins with 0x{raw[:4].hex()}, IDX data of {dims} dimensions with "
            f"0x{magic.hex()}; fetch the file again"
        )
    shape = tuple(np.frombuffer(raw, ">u4", dims, offset=4).tolist())
    if len(raw) - header != math.prod(shape):
        sizes = "x".join(map(str, shape))
        raise UserError(f"{path}: says {sizes} bytes but holds {len(raw) - header}; fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()  # views of bytes are read-only


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); fetch the file again") from None


def _check(files: tuple[Path, Path], images: np.ndarray, labels: np.ndarray) -> None:
    if not len(images) or not math.prod(images.shape[1:]):
        raise UserError(f"{files[0]}: holds no images; fetch the file again")
    if len(images) != len(labels):
        raise UserError(
            f"{files[1]}: has {len(labels)} labels for {len(images)} images of {files[0].name}; fetch both again"
        )
    if labels.max() >= CLASSES:
        raise UserError(f"{files[1]}: has a label {labels.max()}, not 0 to 9; fetch the file again")


def _find(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files of images and of labels in that folder, plain before gzipped; None unless both are there."""
    candidates = [[folder / name, folder / f"{name}.gz"] for name in FILES[split]]
    images, labels = (next((p for p in paths if p.is_file()), None) for paths in candidates)
    return (images, labels) if images and labels else None


def _download(raw: Path, split: str) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    checksums = dict(FashionMNIST.resources)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw) as arriving:
            for name in (f"{n}.gz" for n in FILES[split]):
                download_url(FashionMNIST.mirrors[0] + name, arriving, name, checksums[name])
                os.replace(Path(arriving) / name, raw / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: a wrong checksum
        raise UserError(
            f"data.download: Fashion-MNIST could not be fetched into {raw} ({first_line(error)}); "
            "apt install dataset-fashion-mnist, or name the files' folder by --data.root"
        ) from None
