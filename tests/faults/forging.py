"""Checkpoint files changed by somebody who knows their format, and renews the checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from blake3 import blake3


def names(path: Path) -> list[str]:
    """The datasets of a file, but for its manifest."""
    found: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(set(found) - {"manifest"})


def replace(path: Path, name: str, array: np.ndarray, manifest: bool) -> None:
    """Put an array in a dataset's place with a checksum that is right; with `manifest` that agrees as well."""
    with h5py.File(path, "r+") as file:
        listed = json.loads(file["manifest"][()].tobytes())
        listed[name] = _put(file, name, array)
        if manifest:
            _put(file, "manifest", as_array(listed))


def as_array(value: Any) -> np.ndarray:
    """A JSON value as a file holds it."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _put(file: h5py.File, name: str, array: np.ndarray) -> dict[str, Any]:
    digest = blake3(array.tobytes()).hexdigest()
    del file[name]
    file.create_dataset(name, data=array).attrs["blake3"] = np.bytes_(digest)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "blake3": digest}
