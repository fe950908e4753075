"""CelebA in torchvision's layout, with the 16 classes of the paper: sex, age and hair colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiff.data.sources import Split
from fdiff.errors import UserError

IMAGES = "img_align_celeba"
ATTRIBUTES = "list_attr_celeba.txt"
PARTITION = "list_eval_partition.txt"
HAIR = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")  # the first that is set counts
HELP = "get it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack img_align_celeba.zip"
SPLITS = {"train": "0", "test": "2"}  # 1 is the validation split


def read_celeba(root: str | None, split: str) -> Split:
    """The split's image files in the order of the attribute list; those with no hair colour set are left out.

    `root` is the folder of the three, or holds it as `celeba`. A class is 8·female + 4·old + hair colour
    (black, brown, blond, grey). UserError says what is missing, or which line is wrong.
    """
    folder = _find(root)
    chosen = _names_of_split(folder / PARTITION, SPLITS[split])
    classes = {n: c for n, c in _classes(folder / ATTRIBUTES).items() if n in chosen and c is not None}
    if not classes:
        raise UserError(f"{folder}: its lists leave no image with a hair colour in the {split} split")
    _check_files(folder / IMAGES, classes)
    paths = [folder / IMAGES / name for name in classes]
    return Split(f"celeba, {split} split, {folder}", paths, np.array(list(classes.values())))


def _find(root: str | None) -> Path:
    if root is None:
        raise UserError(f"data.root: data set celeba needs the folder that holds celeba/{IMAGES}; {HELP}")
    folders = [Path(root), Path(root) / "celeba"]
    wanted = (IMAGES, ATTRIBUTES, PARTITION)
    missing = {f: [w for w in wanted if not (f / w).exists()] for f in folders}
    best = min(folders, key=lambda f: len(missing[f]))
    if missing[best]:
        places = " or ".join(map(str, folders)) if len(missing[best]) == len(wanted) else best
        raise UserError(f"data.root: {places} lacks {', '.join(missing[best])} of CelebA; {HELP}")
    return best


def _names_of_split(path: Path, code: str) -> set[str]:
    names = set()
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise UserError(f"{path}: line {number} is not a name and 0, 1 or 2; fetch the file again")
        if fields[1] == code:
            names.add(fields[0])
    return names


def _classes(path: Path) -> dict[str, int | None]:
    """The class of each image in the list's order, None without a hair colour."""
    lines = _lines(path)
    header = lines[1].split() if len(lines) > 1 else []
    if missing := [a for a in ("Male", "Young", *HAIR) if a not in header]:
        raise UserError(f"{path}: line 2 names no attribute {missing[0]}; fetch the file again")
    columns = {attribute: column for column, attribute in enumerate(header, 1)}
    classes = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != len(header) + 1 or not {"1", "-1"}.issuperset(fields[1:]):
            raise UserError(
                f"{path}: line {number} is not a name and {len(header)} times 1 or -1; fetch the file again"
            )
        classes[fields[0]] = _class({a: fields[columns[a]] == "1" for a in ("Male", "Young", *HAIR)})
    return classes


def _class(has: dict[str, bool]) -> int | None:
    hair = next((number for number, colour in enumerate(HAIR) if has[colour]), None)
    return None if hair is None else 8 * (not has["Male"]) + 4 * (not has["Young"]) + hair


def _check_files(folder: Path, names: dict[str, int]) -> None:
    """One listing instead of a look at each of 200,000 files, which a parallel file system would resent."""
    absent = names.keys() - {entry.name for entry in folder.iterdir()}
    if absent:
        raise UserError(
            f"{folder}: lacks {min(absent)} ({len(absent)} of {len(names)} files are missing); unpack "
            "img_align_celeba.zip again"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the file again") from None
