"""Folders of Parquet files in Hugging Face's layout, `train-*.parquet` and `test-*.parquet`, read by row groups.

A column `image` (or `img`) holds image files, as {bytes, path} or as bytes, a column `label` whole numbers. Labels are
read at once, images when they are asked for: a row group's at a time, and nothing else of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fdiff.data.decoding import Encoded
from fdiff.data.sources import Split
from fdiff.data.stored import Stored
from fdiff.errors import UserError, first_line
from fdiff.runtime import free_memory

COLUMNS = ("image", "img")
KEPT = 2**28  # bytes of the row groups read last that a process keeps: batches come back to them
_OF = re.compile(r"-of-(\d+)\.parquet$")


class ParquetImages(Stored):
    """The image files of a split: `images[row]` has the bytes of one. UserError if it cannot be had."""

    def __init__(self, tables: list[_Table], rows: np.ndarray) -> None:
        self._tables, self._rows = tables, rows
        groups = [(table, group, n) for table in tables for group, n in enumerate(table.group_rows)]
        self._groups = [(table, group) for table, group, _ in groups]
        self._ends = np.cumsum([n for _, _, n in groups])
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def paths(self) -> list[Path]:
        """The Parquet files."""
        return [table.path for table in self._tables]

    def take(self, rows: np.ndarray) -> Self:
        return type(self)(self._tables, self._rows[rows])

    def __getitem__(self, row: int) -> Encoded:
        number = int(self._rows[row])
        group = int(np.searchsorted(self._ends, number, side="right"))
        table, _ = self._groups[group]
        data = self._read(group)[number - (self._ends[group - 1] if group else 0)]
        name = f"{table.path}, row {number - table.first}"
        if data is None:
            raise UserError(f"{name}: has no bytes of an image; write it with the image in it, not beside it")
        return Encoded(name, data)

    def contents(self, most: int, tell_unfit: bool) -> Iterator[bytes]:
        """Of a fixed sample of the row groups that these rows lie in; damage is found when they are read."""
        groups = np.unique(np.searchsorted(self._ends, self._rows, side="right"))
        yield self._rows.astype(np.int64).tobytes()
        for group in np.random.RandomState(0).permutation(groups):
            if most <= 0:
                return
            for data in self._read(int(group)):
                yield b"" if data is None else data
                most -= len(data or b"")

    def identity(self) -> Iterator[bytes]:
        """Which rows of which files, with their sizes and times."""
        yield self._rows.astype(np.int64).tobytes()
        for path in self.paths:
            state = path.stat()
            yield f"{path} {state.st_size} {state.st_mtime_ns}\n".encode()

    def _read(self, group: int) -> list[bytes | None]:
        """The image files of a row group; the last ones stay in this process's memory."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        table, number = self._groups[group]
        self._kept[group] = table.read_images(number)
        while len(self._kept) > 1 and sum(map(_bytes_of, self._kept.values())) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[group]


def _bytes_of(files: list[bytes | None]) -> int:
    return sum(len(file or b"") for file in files)


class _Table:
    """One Parquet file: its footer, read once; `first` is the number of its first row in the split."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first = path, first
        with self._opened() as file:
            self._footer, schema = file.metadata, file.schema_arrow
            self._column = _image_column(path, schema)
            self.has_labels, self.columns = "label" in schema.names, ", ".join(schema.names)
            if self.has_labels and not _pyarrow().types.is_integer(schema.field("label").type):
                raise UserError(f"{path}: label is {schema.field('label').type}; it must be of whole numbers")
            self.classes = _classes(schema.metadata)
            self.group_rows = [self._footer.row_group(i).num_rows for i in range(self._footer.num_row_groups)]
        if min(self.group_rows, default=0) < 0 or sum(self.group_rows) != self._footer.num_rows:
            raise UserError(f"{path}: its row groups have not the {self._footer.num_rows} rows of the file; replace it")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """The file, opened by this process for itself: what is inherited over a fork would share its place in it."""
        pq, footer = _pyarrow().parquet, getattr(self, "_footer", None)
        try:
            with open(self.path, "rb") as raw, pq.ParquetFile(raw, metadata=footer, pre_buffer=False) as file:
                yield file
        except UserError:
            raise
        except Exception as error:  # of a damaged file anything is raised
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise UserError(f"{self.path}: cannot be read as Parquet ({reason}); replace it") from None

    def read_labels(self) -> np.ndarray:
        """(n,), of whole numbers; -1 of all where Hugging Face has none."""
        with self._opened() as file:
            column = file.read(columns=["label"], use_threads=False).column("label")
            if len(column) != sum(self.group_rows) or column.null_count:
                raise UserError(f"{self.path}: {column.null_count} of its {len(column)} labels are null; give all")
            return column.to_numpy()

    def read_images(self, group: int) -> list[bytes | None]:
        """The image files of a row group, None where it has no bytes."""
        size = self._footer.row_group(group).total_byte_size  # to ask a column would end the process if it is damaged
        if 2 * size > free_memory(torch.device("cpu")):
            raise UserError(
                f"{self.path}: row group {group} takes {size / 2**30:.3g} GiB, more than half of the free memory; "
                "write it with smaller row groups"
            )
        with self._opened() as file:
            name, _, field = self._column.partition(".")
            column = file.read_row_group(group, columns=[self._column], use_threads=False).column(name)
            if field:
                column = _pyarrow().compute.struct_field(column, field)
            found = column.to_pylist()
            if len(found) != self.group_rows[group]:
                raise UserError(f"{self.path}: row group {group} has {len(found)} images; replace the file")
            return found


def is_parquet_folder(root: Path) -> bool:
    """Whether a folder holds such files of any split."""
    return any(_files(root, split) for split in ("train", "test"))


def read_parquet(root: str | None, split: str) -> Split:
    """The `train` or `test` split of a folder, without its images. UserError says what is missing, unfit or damaged."""
    if root is None:
        raise UserError("data.root: data set parquet needs a folder with train-*.parquet; name it by --data.root")
    paths = _files(Path(root), split)
    if not paths:
        raise UserError(f"data.root: {root} has no {split} split; it must hold {split}-*.parquet, or data/ in it must")
    _pyarrow()
    _check_all_there(paths)
    tables: list[_Table] = []
    for path in paths:
        tables.append(_Table(path, sum(sum(table.group_rows) for table in tables)))
        if (tables[-1].has_labels, tables[-1].classes) != (tables[0].has_labels, tables[0].classes):
            raise UserError(f"{path}: has other labels or class names than {paths[0]}; write all in one way")
    count = sum(sum(table.group_rows) for table in tables)
    if not count:
        raise UserError(f"{paths[0]}: holds no images; give a {split} split that has some")
    name = f"parquet, {split} split, {root}"
    images = ParquetImages(tables, np.arange(count))
    if not tables[0].has_labels:
        return Split(name, images, None, no_labels=f"has no column label, only {tables[0].columns}")
    labels = np.concatenate([table.read_labels() for table in tables])
    if (labels == -1).all():
        return Split(name, images, None, no_labels="has the label -1 everywhere, which stands for none")
    classes = tables[0].classes
    if not 0 <= int(labels.min()) <= int(labels.max()) < (len(classes) or 2**63):
        right = f"below {len(classes)}, the number of class names" if classes else "0 or above"
        raise UserError(f"{name}: labels go from {labels.min()} to {labels.max()}; they must be from 0, and {right}")
    return Split(name, images, labels.astype(np.int64), classes)


def _files(root: Path, split: str) -> list[Path]:
    """The split's files, in the folder or in data/ in it, by name."""
    for folder in (root, root / "data"):
        try:
            names = sorted(entry for entry in os.listdir(folder)) if folder.is_dir() else []
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror}); let this user read it") from None
        if found := [folder / n for n in names if n.startswith(f"{split}-") and n.endswith(".parquet")]:
            return found
    return []


def _check_all_there(paths: list[Path]) -> None:
    """UserError if names like train-00000-of-00004.parquet tell of files that are not there."""
    told = {int(found[1]) if (found := _OF.search(path.name)) else len(paths) for path in paths}
    if told != {len(paths)}:
        raise UserError(f"{paths[0]}: is one of {max(told)} files by its name, and there are {len(paths)}; bring all")


def _image_column(path: Path, schema: Any) -> str:
    """The column, or the field of it, that has the bytes. UserError."""
    types = _pyarrow().types
    name = next((name for name in COLUMNS if name in schema.names), None)
    if name is None or schema.names.count(name) > 1:
        raise UserError(f"{path}: has the columns {', '.join(schema.names)}; one must be image, of image files")
    kind = schema.field(name).type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    if types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
        inner = kind.field(place).type
        if types.is_binary(inner) or types.is_large_binary(inner):
            return f"{name}.bytes"
    raise UserError(f"{path}: {name} is {kind}; it must be binary, or a struct of bytes and path")


def _classes(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The class names that Hugging Face's library writes beside the schema, if they are there."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        needs = "data.dataset: Parquet needs pyarrow, which is not installed; pip install 'fdiff[parquet]'"
        raise UserError(needs) from None
    return pyarrow
