"""Images to files: a PNG grid, a folder of PNGs, or an HDF5 dataset. Each appears under its name only when complete."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import h5py
from torch import Tensor

from fdiff.errors import UserError

GRID_SIDE = 56  # pixels, the least side of an image in a grid
GRIDS, ARRAYS = (".png",), (".h5", ".hdf5")


def check_target(path: Path) -> None:
    """UserError if `save_images` could not write there, as far as that shows before there are images."""
    is_file = path.suffix.lower() in GRIDS + ARRAYS
    if path.suffix and not is_file and not path.is_dir():
        right = "FILE.png for a grid, FILE.h5 for an array, or a folder by a name without a suffix"
        raise UserError(f"--out: {path} is not valid: nothing is written as {path.suffix}; name {right}")
    if path.is_dir() if is_file else path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out: {path} exists already; name a new folder, FILE.png or FILE.h5")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out: {path} cannot be written ({nearest} is no folder to write in); give another path")


def save_images(images: Tensor, path: Path) -> None:
    """Write uint8 images (n, C, S, S): FILE.png is one grid, FILE.h5 a dataset `images`, else a folder of PNGs.

    UserError if the path cannot be written, or is a folder that has something in it already.
    """
    check_target(path)
    try:
        if path.suffix.lower() in GRIDS:
            save_grid(path, images, math.ceil(math.sqrt(len(images))))
        elif path.suffix.lower() in ARRAYS:
            save_hdf5(path, images)
        else:
            save_folder(path, images)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); give another path") from None


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """One PNG, row by row; each image is enlarged to at least 56 pixels without smoothing."""
    from torchvision.utils import make_grid, save_image  # slow to import, and only wanted here

    factor = max(1, -(-GRID_SIDE // images.shape[-1]))
    large = images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)  # what a killed run left, or a link that leads elsewhere
    save_image(make_grid(large.float() / 255, nrow=columns, padding=2), temporary, format="png")
    os.replace(temporary, path)


def save_hdf5(path: Path, images: Tensor) -> None:
    """A dataset `images`, uint8 (n, S, S, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with h5py.File(temporary, "w", locking=False) as file:
        file.create_dataset("images", data=images.permute(0, 2, 3, 1).numpy())
    os.replace(temporary, path)


def save_folder(path: Path, images: Tensor) -> None:
    """000000.png, 000001.png, …"""
    from torchvision.io import write_png

    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for i, image in enumerate(images):
        write_png(image, str(temporary / f"{i:06d}.png"))
    os.replace(temporary, path)
