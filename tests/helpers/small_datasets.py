"""Small data sets that tests make, and what they ask of those that open them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdiff.config import DataConfig
from fdiff.data import Source
from fdiff.data.fashion_mnist import DEBIAN_ROOT, FILES
from fdiff.errors import UserError

REPO = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_debian = pytest.mark.skipif(
    not DEBIAN_ROOT.is_dir(), reason="needs Debian's dataset-fashion-mnist: apt install dataset-fashion-mnist"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_idx(folder: Path, split: str, n: int, compress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A split of n images 28x28 with labels 0…9 in turn; returns both."""
    arrays = pixels(n, 28, 28, seed=n), (np.arange(n) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES[split], arrays, strict=True):
        raw = idx_bytes(array)
        (folder / f"{name}{'.gz' * compress}").write_bytes(gzip.compress(raw) if compress else raw)
    return arrays


def save(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def refusal(call, *words: str) -> str:
    """The one-line UserError of the call, which holds the words."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


def all_images(source: Source) -> np.ndarray:
    return source.images(range(len(source))).numpy()


def folder(root: Path, **fields: object) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **{"image_side": 8, **fields})
