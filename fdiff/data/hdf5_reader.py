"""Reads one HDF5 silo in a process of its own: a damaged file can end the HDF5 library, and its process, by a signal.

`hdf5_process.py` runs this file as a script, since the package would take seconds to import. Standard output gets a
line of JSON, {"shape", "dtype", "matlab", "labels"}. Then each line of standard input asks for something: `labels`, or
`AXIS START STOP` for the images at these places of an axis; standard output gets its bytes, in C order and this
machine's byte order. Standard error gets what is wrong, and the status is 1.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any

import h5py
import numpy as np

CHUNKS = 2**26  # bytes of unpacked chunks that are kept: images that lie together are asked for together


class Refused(Exception):
    """What is wrong with the file, without its name."""


def main(path: str, split: str, free: int) -> None:
    """Write what the file's split holds and what is asked of it, or what is wrong with it, to standard output."""
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  # its filters, where the user has installed them
    prefix = "" if split == "train" else f"{split}_"
    try:
        with h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNKS) as file:
            images, labels = find(file, f"{prefix}images"), find(file, f"{prefix}labels")
            if images is None and prefix:
                raise Refused(f"has no {split} split; put its images into a dataset {prefix}images")
            if images is None:
                raise Refused("has no dataset images; it must be uint8 (n, H, W) or (n, H, W, C)")
            if images.dtype.kind not in "uif" or not images.size:
                raise Refused(
                    f"{prefix}images is {images.dtype} {images.shape}; it must be uint8 (n, H, W) or (n, H, W, C) and "
                    "not empty"
                )
            if math.prod(images.chunks or ()) * images.dtype.itemsize > free:
                raise Refused(f"{prefix}images has chunks {images.chunks}, each more than the free memory; write less")
            dtype = images.dtype.newbyteorder("=")
            facts: dict[str, Any] = {"shape": images.shape, "dtype": dtype.str, "labels": describe(labels, images)}
            facts["matlab"] = "MATLAB_class" in images.attrs
            for dataset in filter(None, (labels, images)):
                check_written(dataset)
            send(json.dumps(facts).encode() + b"\n")
            for line in sys.stdin:
                if line == "labels\n":
                    send(labels[()].tobytes())
                    continue
                axis, start, stop = map(int, line.split())
                block = images[(slice(None),) * axis + (slice(start, stop),)]
                send(np.ascontiguousarray(block, dtype).data.cast("B"))
    except Refused as refused:
        sys.exit(str(refused))
    except BrokenPipeError:  # nobody wants it any more
        os._exit(0)
    except Exception as error:  # a damaged file makes the library raise almost anything
        sys.exit(f"cannot be read as HDF5 ({(str(error).splitlines() or [type(error).__name__])[0]})")


def send(data: Any) -> None:
    """Have it on its way."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def find(file: h5py.File, name: str) -> h5py.Dataset | None:
    """The dataset of that name, None if there is no such name."""
    if not file.id.links.exists(name.encode()):
        return None
    try:
        found = file[name]
    except KeyError:
        target = file.get(name, getlink=True) if name in file else None
        raise Refused(f"{name} is a link to what is not there{f' ({target})' if target else ''}; mend it") from None
    if not isinstance(found, h5py.Dataset):
        raise Refused(f"{name} is a group; it must be a dataset")
    return found


def describe(labels: h5py.Dataset | None, images: h5py.Dataset) -> dict[str, Any] | None:
    """Shape and dtype of the labels, and whether they can be labels at all and are sent."""
    if labels is None:
        return None
    sent = labels.dtype.kind in "iufb" and labels.ndim <= 2 and 0 < labels.size <= max(images.shape)
    return {"shape": labels.shape, "dtype": labels.dtype.str, "sent": sent}


def check_written(dataset: h5py.Dataset, depth: int = 0) -> None:
    """Refused if part of the dataset was never written, or lies in files that are gone: it would read as zeros."""
    name, properties = dataset.name, dataset.id.get_create_plist()
    layout = properties.get_layout()
    if depth > 8:
        raise Refused(f"{name} is a virtual dataset of virtual datasets, and so on; copy it into a plain one")
    for number in range(properties.get_nfilters()):
        code, _, _, words = properties.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            called = words.decode(errors="replace").split(";")[0] or "filter"
            raise Refused(f"{name} is compressed by {called} ({code}), which is not installed; pip install hdf5plugin")
    if layout == h5py.h5d.VIRTUAL:
        check_sources(dataset, depth)
    elif layout == h5py.h5d.CHUNKED:
        chunks = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        if (there := dataset.id.get_num_chunks()) < chunks:
            raise Refused(f"{name} has {there} of its {chunks} chunks; the others were never written: write it again")
    elif layout == h5py.h5d.CONTIGUOUS and properties.get_external_count():
        for number in range(properties.get_external_count()):
            file, offset, size = properties.get_external(number)
            place = locate(file.decode(), dataset, beside=False)
            if size != h5py.h5f.UNLIMITED and os.path.getsize(place) < offset + size:
                raise Refused(f"{name} lies in {place}, which is too short; bring the whole file")
    elif layout == h5py.h5d.CONTIGUOUS and not dataset.id.get_storage_size():
        raise Refused(f"{name} was never written; write it again")


def check_sources(dataset: h5py.Dataset, depth: int) -> None:
    """As `check_written` for a virtual dataset: it is covered by its sources, and they are there, and written."""
    covered = 0
    for target, file_name, name, selected in dataset.virtual_sources():
        if "%" in file_name + name:
            raise Refused(f"{dataset.name} is virtual, with sources by the pattern {file_name}; copy it to a plain one")
        covered += target.get_select_npoints()
        place = dataset.file.filename if file_name == "." else locate(file_name, dataset)
        with h5py.File(place, "r", locking=False) as file:
            source = find(file, name.lstrip("/")) if "/" not in name.strip("/") else file.get(name)
            if not isinstance(source, h5py.Dataset):
                raise Refused(f"{dataset.name} is virtual, and its source {place} has no dataset {name}; bring it back")
            last = selected.get_select_bounds()[1] if selected.get_select_type() != h5py.h5s.SEL_ALL else ()
            if any(index >= length for index, length in zip(last, source.shape, strict=False)):
                raise Refused(f"{dataset.name} is virtual, and {name} in {place} is too small for it; write it again")
            check_written(source, depth + 1)
    if covered < dataset.size:
        raise Refused(f"{dataset.name} is virtual, and has sources for {covered} of its {dataset.size} values only")


def locate(file_name: str, dataset: h5py.Dataset, beside: bool = True) -> str:
    """Where the library looks for a file that the dataset lies in: beside the dataset's, or here. Refused if not."""
    folder = os.path.dirname(os.path.abspath(dataset.file.filename)) if beside else os.getcwd()
    for place in (os.path.join(folder, file_name), os.path.abspath(file_name)):
        if os.path.isfile(place):
            return place
    raise Refused(f"{dataset.name} lies in {os.path.join(folder, file_name)}, which is not there; bring the file back")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
