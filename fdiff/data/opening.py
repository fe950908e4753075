"""From the configuration to an opened source: which reader, which root, how many images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fdiff.config import DATASETS, DataConfig
from fdiff.data.celeba import read_celeba
from fdiff.data.cifar10 import read_cifar10
from fdiff.data.fashion_mnist import read_embedded, read_fashion_mnist
from fdiff.data.folder import read_folder
from fdiff.data.hdf5 import Hdf5Images, read_hdf5
from fdiff.data.inspection import infer_shape, inspect
from fdiff.data.npz import find_npz, read_npz
from fdiff.data.own_images import open_own
from fdiff.data.parquet import is_parquet_folder, read_parquet
from fdiff.data.partition import partition_indices
from fdiff.data.sources import ArraySource, FileSource, Source, Split, StoredSource
from fdiff.data.stored import StoredArrays
from fdiff.errors import UserError
from fdiff.runtime import free_memory

log = logging.getLogger(__name__)

READERS: dict[str, Callable[[DataConfig, str], Split]] = {
    "embedded": lambda data, split: read_embedded(split),
    "fashion-mnist": lambda data, split: read_fashion_mnist(data.root, split, data.download),
    "celeba": lambda data, split: read_celeba(data.root, split),
    "cifar10": lambda data, split: read_cifar10(data.root, split),
    "folder": lambda data, split: read_folder(_folder_root(data), split),
    "npz": lambda data, split: read_npz(find_npz(data.root), split, data),
    "parquet": lambda data, split: read_parquet(data.root, split),
}
NPZ, PARQUET = b"PK", b"PAR1"  # how such files begin


def read_split(data: DataConfig, split: str) -> Split:
    """The data set's `train` or `test` split as it is found: `limit` or `test_limit` images of it.

    UserError where files are missing or damaged, or the partition is private: then no whole data set exists.
    """
    if data.partition == "private":
        raise UserError("data.partition: private images have no whole data set; each client opens its own")
    found = READERS[data.dataset](data, split) if data.dataset in READERS else _own(data, data.root, split)
    return _limited(found, data, split)


def read_client_split(data: DataConfig, client: int, split: str) -> Split:
    """A client's own images with partition `private`: the folder of images or of Parquet, the HDF5 or npz file at
    `data.root`, or what a set of the user's own has for it, limited as above.

    UserError where it is missing or damaged, or has no such split.
    """
    root = Path((data.root or "").replace("{client}", str(client)))
    if data.dataset not in DATASETS:
        return _limited(_own(data, str(root), split), data, split)
    if data.dataset in ("npz", "parquet"):  # said, and not found out
        return _limited(READERS[data.dataset](replace(data, root=str(root)), split), data, split)
    try:
        is_folder, begins = root.is_dir(), _begins(root)
    except OSError as error:
        raise UserError(f"data.root: {root} cannot be read ({error.strerror}); let this user read it") from None
    if is_folder:
        found = read_parquet(str(root), split) if is_parquet_folder(root) else read_folder(root, split)
    elif begins is None:
        raise UserError(f"data.root: client {client} has no folder of images or HDF5 file at {root}")
    elif begins.startswith(NPZ):
        found = read_npz(root, split, data)
    elif begins == PARQUET:
        raise UserError(f"{root}: is a Parquet file; a silo of Parquet is a folder with {split}-*.parquet")
    else:
        found = read_hdf5(root, split, data)
    return _in_memory(_limited(found, data, split), data)


def as_source(split: Split, data: DataConfig) -> Source:
    """The images of the split in the shape that `data` gives them."""
    if isinstance(split.images, StoredArrays):
        return StoredSource(split, data)
    return (ArraySource if isinstance(split.images, np.ndarray) else FileSource)(split, data)


def _open(split: Split, data: DataConfig) -> Source:
    """The split as a source: in the shape that its images have, where none is given, without those to be skipped."""
    if None in (data.image_side, data.channels) or data.on_bad_image == "skip":
        found = inspect(split, range(len(split)), data)
        split, data = without_unfit(split, found.unfit), infer_shape(data, found, stages=1)
    return as_source(split, data)


def open_source(data: DataConfig, split: str) -> Source:
    """`read_split`, opened."""
    return _open(read_split(data, split), data)


def open_client_source(data: DataConfig, client: int, split: str) -> Source:
    """`read_client_split`, opened."""
    return _open(read_client_split(data, client, split), data)


def split_source(source: Source, data: DataConfig, clients: int) -> list[np.ndarray]:
    """The indices (n_k,) of each client's images, as `data` splits them; UserError where that is not possible."""
    if data.partition in ("label-skew", "label-count") and not source.labelled:
        raise UserError(
            f"data.partition: {data.partition} needs labels, and {source.name} {source.no_labels}; give each class a "
            "subfolder, or use quantity-skew"
        )
    return partition_indices(
        source.labels, data.partition, clients, data.beta, data.seed, labels_per_client=data.labels_per_client
    )


def without_unfit(split: Split, unfit: dict[int, str]) -> Split:
    """The split without the images at these rows; UserError if none is left."""
    if not unfit:
        return split
    if len(unfit) == len(split):
        raise UserError(f"{split.name}: holds no image that is fit: {next(iter(unfit.values()))}")
    return split.take(np.setdiff1d(np.arange(len(split)), list(unfit)))


def _own(data: DataConfig, root: str | None, split: str) -> Split:
    return Split(*open_own(data, root, split))


def _begins(root: Path) -> bytes | None:
    """The first bytes of a file, None if there is none."""
    if not root.is_file():
        return None
    with root.open("rb") as file:
        begins = file.read(4)
    return begins[:2] if begins.startswith(NPZ) else begins


def _in_memory(split: Split, data: DataConfig) -> Split:
    """A silo's HDF5 images all read, if they are to be held in memory: by default if half of what is free will do."""
    if not isinstance(images := split.images, Hdf5Images) or data.in_memory == "never":
        return split
    if images.bytes * 2 > (free := free_memory(torch.device("cpu"))):
        if data.in_memory == "always":
            raise UserError(
                f"data.in_memory: {split.name} takes {images.bytes / 2**30:.3g} GiB, more than half of the "
                f"{free / 2**30:.3g} that are free; use auto or never"
            )
        log.info("%s: %d images are read from the file as they are needed", split.name, len(images))
        return split
    return replace(split, images=images.load(), rows=images.rows)


def _folder_root(data: DataConfig) -> Path:
    if data.root is None:
        raise UserError("data.root: data set folder needs a folder of images; name it by --data.root")
    return Path(data.root)


def _limited(found: Split, data: DataConfig, split: str) -> Split:
    """A sample of the split, in its order, the same wherever it is drawn: the first ones may all be of one class."""
    limit = data.limit if split == "train" else data.test_limit
    if limit is None or limit >= len(found):
        return found
    return found.take(np.sort(np.random.RandomState(data.seed).permutation(len(found))[:limit]))
