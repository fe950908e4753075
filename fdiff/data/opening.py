"""From the configuration to an opened source: which reader, which root, how many images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fdiff.config import DataConfig
from fdiff.data.celeba import read_celeba
from fdiff.data.cifar10 import read_cifar10
from fdiff.data.fashion_mnist import read_embedded, read_fashion_mnist
from fdiff.data.folder import read_folder
from fdiff.data.hdf5 import read_hdf5
from fdiff.data.sources import ArraySource, FileSource, Source, Split
from fdiff.errors import UserError

READERS: dict[str, Callable[[DataConfig, str], Split]] = {
    "embedded": lambda data, split: read_embedded(split),
    "fashion-mnist": lambda data, split: read_fashion_mnist(data.root, split, data.download),
    "celeba": lambda data, split: read_celeba(data.root, split),
    "cifar10": lambda data, split: read_cifar10(data.root, split),
    "folder": lambda data, split: read_folder(_folder_root(data), split),
}


def open_source(data: DataConfig, split: str) -> Source:
    """The data set's `train` or `test` split: its first `limit` or `test_limit` images, as `data` wants them.

    UserError where files are missing or damaged, or the partition is private: then no whole data set exists.
    """
    if data.partition == "private":
        raise UserError("data.partition: private images have no whole data set; each client opens its own")
    return _source(READERS[data.dataset](data, split), data, split)


def open_client_source(data: DataConfig, client: int, split: str) -> Source:
    """A client's own images with partition `private`: the folder or HDF5 file at `data.root`, cut as above.

    UserError where it is missing or damaged, or has no such split.
    """
    root = Path((data.root or "").replace("{client}", str(client)))
    if root.is_dir():
        found = read_folder(root, split)
    elif root.is_file():
        found = read_hdf5(root, split)
    else:
        raise UserError(f"data.root: client {client} has no folder of images or HDF5 file at {root}")
    return _source(found, data, split)


def _folder_root(data: DataConfig) -> Path:
    if data.root is None:
        raise UserError("data.root: data set folder needs a folder of images; name it by --data.root")
    return Path(data.root)


def _source(found: Split, data: DataConfig, split: str) -> Source:
    limit = data.limit if split == "train" else data.test_limit
    first = Split(found.name, found.images[:limit], found.labels[:limit])
    kind = ArraySource if isinstance(first.images, np.ndarray) else FileSource
    return kind(first, data.image_side, data.channels)
