"""A plain folder of image files: with or without train/ and test/, with or without subfolders as classes."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fdiff.data.decoding import EXTENSIONS, not_a_file
from fdiff.data.sources import Split
from fdiff.errors import UserError

log = logging.getLogger(__name__)

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}  # the first wins
LEFTOVERS = ("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information")  # of other programs
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of a name such as trainA, seg_train or val2017


def read_folder(root: Path, split: str) -> Split:
    """The images of `root`'s split, e.g. root/train or root/TRAINING; where it has none, all are training images.

    A class is the place of a subfolder's name among the sorted ones of both splits, in Unicode's NFC; without
    subfolders there are no labels. Folders without an image below them, hidden ones and known leftovers are no classes.
    Links are followed. The order is by class, then by path. UserError says what is missing, ambiguous or unreadable.
    """
    if not os.path.isdir(root):
        raise UserError(f"data.root: {root} is no folder that can be read; name a folder of images")
    splits = _splits(root)
    folder = splits.get(split) or (root if split == "train" and not splits else None)
    if folder is None:
        raise UserError(f"data.root: {root} has no {split} split; put its images in {root / split}")
    own = _classes(folder)
    names = merge_classes([own, *(_classes(other) for other in splits.values() if other != folder)])
    direct = sorted(Path(entry.path) for entry in _scan(folder) if _is_image(entry))
    if direct and own:
        raise UserError(f"{folder}: has images both in it ({direct[0].name}) and in subfolders; use one way")
    classes = [sorted(path for place in own.get(name, ()) for path in _images_below(place)) for name in names]
    paths = direct or [path for of_class in classes for path in of_class]
    if not paths:
        raise UserError(f"{folder}: holds no images ({', '.join(EXTENSIONS)})")
    labels = None if direct else np.repeat(np.arange(len(names)), [len(of_class) for of_class in classes])
    return Split(f"folder, {split} split, {folder}", paths, labels, () if direct else tuple(names))


def merge_classes(found: Iterable[Iterable[str]]) -> list[str]:
    """The names of classes that were found in several places, sorted; UserError where two differ in case only."""
    names, seen = sorted({name for names in found for name in names}), dict[str, str]()
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise UserError(f"data.root: the classes {other} and {name} differ in case only; spell them alike")
    return names


# --- splits and classes --------------------------------------------------------------------------------------------


def _splits(root: Path) -> dict[str, Path]:
    """The folder of each split that there is; UserError where it cannot be told what is one."""
    folders = [Path(entry.path) for entry in _scan(root) if _is_folder(entry)]
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        alike = [f for f in folders if f.name.casefold() in names]
        best = min((names.index(f.name.casefold()) for f in alike), default=0)
        first = [f for f in alike if names.index(f.name.casefold()) == best]
        if len(first) > 1 or (split == "train" and len(alike) > 1):
            raise UserError(f"data.root: {root} has both {alike[0].name} and {alike[1].name}; keep one {split} split")
        found |= {split: first[0]} if first else {}
    known = {name for names in SPLITS.values() for name in names}
    others = [f for f in folders if f.name.casefold() not in known and any(_images_below(f))]
    if not found:
        _check_no_split(root, others, known)
    elif others and len(found) == 1:
        split, folder = next(iter(found.items()))
        raise UserError(
            f"data.root: {root} has {folder.name}, which is a split, beside {others[0].name}; put classes into "
            f"{root / 'train'}, or take {others[0].name} elsewhere"
        )
    elif others:
        log.warning("%s: only its splits are read; left out: %s", root, ", ".join(f.name for f in others))
    return found


def _check_no_split(root: Path, folders: list[Path], known: set[str]) -> None:
    """UserError for a folder that looks like a split and would be taken for a class."""
    for folder in folders:
        if known & {word.casefold() for word in WORDS.findall(folder.name)}:
            raise UserError(
                f"data.root: {folder} looks like a split; call splits train and test, or, if it is a class, put all "
                f"classes into {root / 'train'}"
            )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The subfolders with images of each class, by its name in NFC: the same name may be there in two spellings."""
    classes: dict[str, list[Path]] = {}
    for entry in _scan(folder):
        if _is_folder(entry) and any(_images_below(Path(entry.path))):
            classes.setdefault(unicodedata.normalize("NFC", entry.name), []).append(Path(entry.path))
    return classes


# --- what lies where -----------------------------------------------------------------------------------------------


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, hidden files and leftovers apart; UserError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".") and e.name.casefold() not in LEFTOVERS]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({error.strerror}); let this user read it, or name another by --data.root"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a loop of links
        raise UserError(f"{entry.path}: cannot be read ({error.strerror}); remove it") from None


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether it is an image file by its name; UserError for what has such a name and is no file."""
    if not entry.name.lower().endswith(EXTENSIONS) or _is_folder(entry):
        return False
    if not entry.is_file():
        raise not_a_file(entry.path)
    return True


def _images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, in any order."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        for entry in _scan(place):
            if _is_folder(entry):
                if entry.is_symlink():
                    _check_no_loop(place, Path(entry.path))
                waiting.append(Path(entry.path))
            elif _is_image(entry):
                yield Path(entry.path)


def _check_no_loop(place: Path, link: Path) -> None:
    target = os.path.realpath(link)
    if os.path.commonpath([target, os.path.realpath(place)]) == target:
        raise UserError(f"{link}: is a link to a folder that it lies in, {target}; remove it")
