"""One HDF5 file of finite arrays and a JSON header, which is either exactly what was written or not read at all.

Every dataset carries the BLAKE3 of its bytes, every file a manifest of its datasets, whose own BLAKE3 is the file's
digest. No pickle, no compression, no object types: plain numbers and bytes that any HDF5 tool opens. The format is
that of HDF5 1.8, whose structures have checksums, so that the library itself notices when they are damaged.
A file may come from anywhere: what it claims is held against its size before memory is taken for it.

Checksums are made from memory, before the file is: what a disk loses without a word is found when it is read.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from blake3 import blake3

from fdiff.errors import UserError

VERSION = 2
_TYPES = frozenset(np.dtype(name) for name in ("float32", "float64", "int64", "uint8"))
_FORMAT = ("v108", "v108")
_MAX_JSON_BYTES = 64 * 2**20
_ADVICE = "use another checkpoint"
WRITERS = 2  # files written at a time: more were not faster

Arrays = Mapping[str, np.ndarray]
Header = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class Damaged(UserError):
    """A file that is incomplete or not what it says; the message names the file and the dataset."""


@dataclass(frozen=True)
class Examined:
    """What `examine` found: (shape, dtype) of each sound dataset, the header, a line for each problem."""

    datasets: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


# --- writing -------------------------------------------------------------------------------------------------------


def write_file(path: Path, arrays: Arrays, header: Header) -> str:
    """Write arrays and a JSON header to a new file, readable by its owner alone, and sync it; then it is renamed.

    Returns its digest: the BLAKE3 of the manifest, which holds the BLAKE3 of every dataset. A header that is a function
    is called when the arrays are written. OSError if the disk is full or read-only.
    """
    with Unsynced(path) as file:
        digest = file.write(arrays, header)
        file.sync()
    return digest


def write_files(files: Mapping[Path, tuple[Arrays, Header]]) -> None:
    """Write several files as `write_file` writes one: some at a time, and none is synced before all are written.

    A file system that syncs one file has those wait that write another. OSError names the file.
    """
    with ExitStack() as stack:
        opened = [(stack.enter_context(Unsynced(path)), *content) for path, content in files.items()]
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint") as threads:
            list(threads.map(lambda job: job[0].write(*job[1:]), opened))
        with ThreadPoolExecutor(len(opened), thread_name_prefix="checkpoint") as threads:
            list(threads.map(lambda job: job[0].sync(), opened))


class Unsynced:
    """A new file under a temporary name, which `sync` makes permanent; without that it goes when the block ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(path.name + ".part")

    def __enter__(self) -> Unsynced:
        with self._naming():
            self._file = _Sink(self._temporary, "x+", opener=lambda path, flags: os.open(path, flags, 0o600))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with suppress(OSError):  # it has its name, or the disk is not to be written to
            self._temporary.unlink()

    def write(self, arrays: Arrays, header: Header) -> str:
        """Write all that the file is to hold; returns its digest."""
        with h5py.File(self._file, "w", libver=_FORMAT) as file:
            manifest = {name: _put(file, name, array) for name, array in arrays.items()}
            said = header() if callable(header) else header
            manifest["header"] = _put(file, "header", _json_bytes({**said, "version": VERSION}))
            digest = str(_put(file, "manifest", _json_bytes(manifest))["blake3"])
        with self._naming():
            self._file.check()
        return digest

    def sync(self) -> None:
        """Have it on the disk, then give it its name."""
        with self._naming():
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._path)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class _Sink(io.FileIO):
    """What HDF5 writes to: keeps the first error for `check`.

    HDF5 holds much back until an object or the file is closed. There h5py drops an error, so that a file without its
    last bytes looked whole; or the library crashes over it.
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        with self._keeping_errors():
            left = memoryview(data).cast("B")
            while left:
                left = left[super().write(left) :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        with self._keeping_errors():
            super().truncate(size)
        return size or 0

    def readinto(self, buffer: Any) -> int:
        found = super().readinto(buffer)
        return len(buffer) if self._error else found  # of what could not be written, anything will do

    def check(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error


def _put(file: h5py.File, name: str, array: np.ndarray) -> dict[str, Any]:
    """Add a dataset; what the manifest says of it."""
    digest = checksum(array)
    file.create_dataset(name, data=array).attrs["blake3"] = np.bytes_(digest)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "blake3": digest}


# --- reading -------------------------------------------------------------------------------------------------------


def read_file(path: Path, digest: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the header of a file, every checksum verified; Damaged names what does not fit or is not finite.

    With `digest` the file must be that very one.
    """
    with _reading(path) as file:
        manifest = _manifest(file, digest)
        header = _header(file, manifest)
        arrays = {name: _dataset(file, name, manifest[name]) for name in manifest if name != "header"}
    return arrays, header


def examine(path: Path, digest: str | None = None) -> Examined:
    """Read all of a file and keep nothing of it; never raises Damaged, but says what is sound and what is not."""
    found = Examined()
    try:
        with _reading(path) as file:
            manifest = _manifest(file, digest)
            found.header.update(_header(file, manifest))
            for name, expected in manifest.items():
                try:
                    with _reporting(path):
                        array = _dataset(file, name, expected)
                    found.datasets[name] = (array.shape, array.dtype.name)
                except Damaged as error:
                    found.problems.append(str(error))
    except Damaged as error:
        found.problems.append(str(error))
    return found


def read_digest(path: Path) -> str:
    """The digest of a file that `write_file` has written, without reading its arrays."""
    with _reading(path) as file:
        return checksum(_dataset(file, "manifest", None))


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    with _reporting(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):  # opening a pipe would wait for ever
            raise Damaged(f"{path}: is not a regular file; {_ADVICE}")
        with h5py.File(path, "r", locking=False) as file:
            yield file


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Whatever a file's content makes the reading code raise means one thing: it cannot be read. PermissionError."""
    try:
        yield
    except Damaged:
        raise
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing; {_ADVICE}") from None
    except PermissionError as error:  # it may be sound; HDF5 does not name it
        raise PermissionError(error.errno, os.strerror(error.errno), str(path)) from None
    except Exception as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__}: {_one_line(error)}); {_ADVICE}") from error


def _manifest(file: h5py.File, digest: str | None) -> dict[str, Any]:
    """The manifest, held against the digest and against the names and sizes of all datasets."""
    names = _names(file)
    if "manifest" not in names:
        raise Damaged(f"{file.filename}: has no manifest; {_ADVICE}")
    array = _dataset(file, "manifest", None)
    if digest is not None and checksum(array) != digest:
        raise Damaged(f"{file.filename}: is not the file that its checkpoint lists; {_ADVICE}")
    manifest = _parse(file, array)
    if different := sorted((names - {"manifest"}) ^ set(manifest)):
        raise Damaged(f"{file.filename}: {different[0]} is only in the file or only in its manifest; {_ADVICE}")
    if not all(isinstance(entry, dict) for entry in manifest.values()):
        raise Damaged(f"{file.filename}: its manifest describes nothing; {_ADVICE}")
    claimed = sum(file[name].nbytes for name in manifest)
    if claimed > os.path.getsize(file.filename):
        raise Damaged(f"{file.filename}: its datasets claim {claimed} bytes, more than the file has; {_ADVICE}")
    return manifest


def _names(file: h5py.File) -> set[str]:
    """All datasets, at most one group deep. Damaged at a link that may lead elsewhere, before it is followed."""
    found: set[str] = set()
    for key in _plain_links(file):
        if isinstance(file[key], h5py.Group):
            found |= {f"{key}/{inner}" for inner in _plain_links(file[key])}
        else:
            found.add(key)
    return found


def _plain_links(group: h5py.Group) -> list[str]:
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise Damaged(f"{group.file.filename}: {key} is a link to another place; {_ADVICE}")
    return list(group)


def _header(file: h5py.File, manifest: Mapping[str, Any]) -> dict[str, Any]:
    header = _parse(file, _dataset(file, "header", manifest["header"]))
    version = header.get("version")
    if type(version) is not int or version != VERSION:  # JSON's 2.0 would be equal
        raise Damaged(
            f"{file.filename}: has layout version {version!r}, this fdiff reads version {VERSION}; use the fdiff that "
            "made it"
        )
    return header


def _dataset(file: h5py.File, name: str, expected: Mapping[str, Any] | None) -> np.ndarray:
    """A dataset that both checksums fit; it is not read before all that it claims has been checked."""
    dataset = _claimed(file, name, expected)
    recorded, array = _recorded(dataset), np.asarray(dataset[()])
    if checksum(array) != recorded or (expected is not None and expected["blake3"] != recorded):
        raise Damaged(f"{file.filename}: the checksum of {name} does not match its bytes; {_ADVICE}")
    if not _is_finite(array):
        raise Damaged(f"{file.filename}: {name} holds values that are not finite (NaN or infinity); {_ADVICE}")
    return array


def _is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: both ends tell, and take no memory."""
    return array.size == 0 or bool(np.isfinite([array.min(), array.max()]).all())


def _claimed(file: h5py.File, name: str, expected: Mapping[str, Any] | None) -> h5py.Dataset:
    """A dataset that is what the manifest says, as far as it can be known without its values."""
    dataset = file[name]
    if problem := _claim_problem(file, dataset):
        raise Damaged(f"{file.filename}: {name} {problem}; {_ADVICE}")
    if expected is not None and [list(dataset.shape), dataset.dtype.name] != [expected["shape"], expected["dtype"]]:
        raise Damaged(
            f"{file.filename}: {name} is {dataset.dtype.name} {dataset.shape}, its manifest says "
            f"{expected['dtype']} {expected['shape']}; {_ADVICE}"
        )
    return dataset


def _claim_problem(file: h5py.File, dataset: Any) -> str | None:
    """What is wrong with a dataset by what it says of itself, or None."""
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype not in _TYPES:
        return "is not a dataset of plain numbers"
    if dataset.external or dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        return "is not stored in one piece in its file"
    offset, held = dataset.id.get_offset() or 0, dataset.id.get_storage_size()
    if dataset.nbytes != held or offset + held > os.path.getsize(file.filename):
        return f"claims {dataset.nbytes} bytes, more than its file has"
    return None


def _recorded(dataset: h5py.Dataset) -> str:
    attribute = dataset.attrs.get_id("blake3")
    if attribute.shape != () or attribute.dtype != np.dtype("S64"):
        raise Damaged(f"{dataset.file.filename}: {dataset.name} has no checksum of 64 letters; {_ADVICE}")
    return bytes(dataset.attrs["blake3"]).decode("ascii")


# --- bytes ---------------------------------------------------------------------------------------------------------


def _parse(file: h5py.File, array: np.ndarray) -> dict[str, Any]:
    if array.nbytes > _MAX_JSON_BYTES:
        raise Damaged(f"{file.filename}: has a table of {array.nbytes} bytes; {_ADVICE}")
    value = json.loads(array.tobytes())
    if not isinstance(value, dict):
        raise Damaged(f"{file.filename}: its header or manifest is not a table; {_ADVICE}")
    return value


def _json_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def checksum(array: np.ndarray) -> str:
    """The BLAKE3 of an array's bytes, in hex: as cryptographic as SHA-256, and several times as fast."""
    return blake3(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
