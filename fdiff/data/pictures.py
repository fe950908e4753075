"""Images to files: a PNG grid, a folder of PNGs, or an HDF5 dataset. Each appears under its name only when complete.

Images of 2 channels, of more than 4, or with a range of their own (`data.range`) are no PNG: they are written as an
array in a .npy file, and beside it as a grid in false colour.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdiff.errors import UserError

GRID_SIDE = 56  # pixels, the least side of an image in a grid
GRIDS, ARRAYS = (".png",), (".h5", ".hdf5")


def needs_array(channels: int, limits: tuple[float, float] | None) -> bool:
    """Whether a PNG could not hold such images."""
    return limits is not None or channels == 2 or channels > 4


def as_pictures(images: Tensor, limits: tuple[float, float] | None) -> Tensor:
    """uint8 (n, 1, 3 or 4, S, S) of images (n, C, S, S), in false colour where a PNG could not hold them.

    Then the range is spread over 0 to 255, and the first three channels, or both of two, are red, green and blue.
    """
    if not needs_array(images.shape[1], limits):
        return images
    if limits is not None:
        low, high = limits
        images = ((images.double() - low) * (255 / (high - low))).round().clamp(0, 255).byte()
    if images.shape[1] == 2:
        return functional.pad(images, (0, 0, 0, 0, 0, 1))
    return images[:, :3] if images.shape[1] > 3 else images


def check_target(path: Path, array: bool = False) -> None:
    """UserError if `save_images` could not write there, as far as that shows before there are images.

    `array`: it will also write an array beside a grid.
    """
    if array and path.suffix.lower() in GRIDS and path.with_suffix(".npy").exists():
        raise UserError(f"--out: {path.with_suffix('.npy')} exists already; name another FILE.png")
    is_file = path.suffix.lower() in GRIDS + ARRAYS
    if path.suffix and not is_file and not path.is_dir():
        right = "FILE.png for a grid, FILE.h5 for an array, or a folder by a name without a suffix"
        raise UserError(f"--out: {path} is not valid: nothing is written as {path.suffix}; name {right}")
    if path.is_dir() if is_file else path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out: {path} exists already; name a new folder, FILE.png or FILE.h5")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out: {path} cannot be written ({nearest} is no folder to write in); give another path")


def save_images(images: Tensor, path: Path, limits: tuple[float, float] | None = None, first: int = 0) -> None:
    """Write images (n, C, S, S), uint8 or float32 in these limits.

    FILE.png is one grid, FILE.h5 a dataset `images`, else a folder of PNGs, numbered from `first`. Where these could
    not hold the images, FILE.npy is beside the grid, or in the folder there are images.npy and grid.png. UserError if
    the path cannot be written, or is a folder that has something in it already.
    """
    array = needs_array(images.shape[1], limits)
    check_target(path, array)
    columns = math.ceil(math.sqrt(len(images)))
    try:
        if path.suffix.lower() in GRIDS:
            if array:
                save_array(path.with_suffix(".npy"), images)
            save_grid(path, as_pictures(images, limits), columns)
        elif path.suffix.lower() not in ARRAYS and array:
            with _new_folder(path) as folder:
                save_array(folder / "images.npy", images)
                save_grid(folder / "grid.png", as_pictures(images, limits), columns)
        elif path.suffix.lower() in ARRAYS:
            save_hdf5(path, images)
        else:
            save_folder(path, images, first)
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
    """A dataset `images`, (n, S, S, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with h5py.File(temporary, "w", locking=False) as file:
        file.create_dataset("images", data=images.permute(0, 2, 3, 1).numpy())
    os.replace(temporary, path)


def save_array(path: Path, images: Tensor) -> None:
    """A .npy file, (n, S, S, C): uint8, or float32 in the images' range."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)  # as for a grid
    with temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()), allow_pickle=False)
    os.replace(temporary, path)


def save_folder(path: Path, images: Tensor, first: int = 0) -> None:
    """000000.png, 000001.png, …, or from another number on; a fourth channel is transparency."""
    from torchvision.io import write_png

    with _new_folder(path) as folder:
        for i, image in enumerate(images, first):
            file = folder / f"{i:06d}.png"
            if len(image) == 4:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
            else:
                write_png(image, str(file))


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, that has its name afterwards."""
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, path)
