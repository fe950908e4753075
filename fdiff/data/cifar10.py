"""CIFAR-10 from its binary version, whose records are a label byte and three 32x32 planes.

The version for Python, which torchvision keeps, is pickled, and fdiff opens no pickle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiff.data.sources import Split
from fdiff.errors import UserError

FOLDER = "cifar-10-batches-bin"
PICKLED = "cifar-10-batches-py"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
HELP = f"get the binary version from {CIFAR10_URL}"
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
CLASSES = 10


def read_cifar10(root: str | None, split: str) -> Split:
    """The split from the files in `root` or in cifar-10-batches-bin in it.

    UserError says where was looked and where to get the files, or which file is damaged.
    """
    folder = _find(root, split)
    records = np.concatenate([_read(folder / name) for name in FILES[split]])
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIDE, SIDE)
    return Split(f"cifar10, {split} split, {folder}", images, records[:, 0])


def _find(root: str | None, split: str) -> Path:
    if root is None:
        raise UserError(f"data.root: data set cifar10 needs the folder that holds {FOLDER}; {HELP}")
    folders = [Path(root), Path(root) / FOLDER]
    missing = {f: [n for n in FILES[split] if not (f / n).is_file()] for f in folders}
    best = min(folders, key=lambda f: len(missing[f]))
    if not missing[best]:
        return best
    if (Path(root) / PICKLED).is_dir() or (Path(root) / "batches.meta").is_file():
        raise UserError(f"data.root: {root} has CIFAR-10 as pickles, which fdiff does not open; {HELP}")
    places = " or ".join(map(str, folders))
    raise UserError(f"data.root: no {missing[best][0]} of CIFAR-10 in {places}; {HELP}")


def _read(path: Path) -> np.ndarray:
    """The file's records, uint8 (n, 3073)."""
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); {HELP}") from None
    if not len(raw) or len(raw) % RECORD:
        raise UserError(f"{path}: {len(raw)} bytes are not records of {RECORD} bytes each; {HELP}")
    records = raw.reshape(-1, RECORD)
    if records[:, 0].max() >= CLASSES:
        raise UserError(f"{path}: has a label {records[:, 0].max()}, not 0 to 9; {HELP}")
    return records
