"""A plain folder of image files: with or without train/ and test/, with or without subfolders as classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiff.data.sources import Split
from fdiff.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SPLITS = ("train", "test")


def read_folder(root: Path, split: str) -> Split:
    """The images of `root`/`split`; where `root` has neither train/ nor test/, all are training images.

    A class is the place of a subfolder's name among the sorted ones of both splits; 0 without subfolders. Subfolders
    without images count, so that silos which lack a class can number theirs alike.
    Hidden files are left out; the order is by class, then by path. UserError says what is missing.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder; name a folder of images")
    folder = _folder_of(root, split)
    # of both splits, so that a class has the same number in each
    names = sorted({name for either in _split_folders(root) or [root] for name in _class_names(either)})
    classes = [_images(folder / name, "**/*") for name in names]
    if direct := _images(folder, "*"):
        if any(classes):
            raise UserError(f"{folder}: has images both in it ({direct[0].name}) and in subfolders; use one way")
        classes = [direct]
    paths = [path for of_class in classes for path in of_class]
    if not paths:
        raise UserError(f"{folder}: holds no images ({', '.join(EXTENSIONS)})")
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in classes])
    return Split(f"folder, {split} split, {folder}", paths, labels)


def _folder_of(root: Path, split: str) -> Path:
    if (root / split).is_dir():
        return root / split
    if split == "test" or _split_folders(root):
        raise UserError(f"data.root: {root} has no {split} split; put its images in {root / split}")
    return root


def _split_folders(root: Path) -> list[Path]:
    return [root / split for split in SPLITS if (root / split).is_dir()]


def _class_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]


def _images(folder: Path, pattern: str) -> list[Path]:
    """The image files that match, sorted by path; none where there is no such folder."""
    found = (p for p in folder.glob(pattern) if p.suffix.lower() in EXTENSIONS)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
