"""Damage of every kind to a checkpoint's files: named in one line, and never loaded."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
from array_files import ARRAYS, HEADER, write_one
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdiff.checkpoint import file as file_module
from fdiff.checkpoint.file import Damaged, examine, read_file


@pytest.fixture
def file(tmp_path) -> Path:
    return write_one(tmp_path)


def checksum(array: np.ndarray) -> str:
    return blake3(array.tobytes()).hexdigest()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def _offset_of(path: Path, name: str) -> int:
    with h5py.File(path) as file:
        return int(file[name].id.get_offset())


def edit(change):
    """Damage done with h5py itself, by somebody who does not know of the manifest."""

    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def replace_dataset(name: str, **of_new):
    def change(file: h5py.File) -> None:
        checksum = file[name].attrs["blake3"]
        del file[name]
        file.create_dataset(name, **of_new).attrs["blake3"] = checksum

    return edit(change)


def forge(change):
    """Damage done by somebody who also renews every checksum."""

    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            manifest = json.loads(file["manifest"][()].tobytes())
            change(file, manifest)
            put_json(file, "manifest", manifest)

    return damage


def put_json(file: h5py.File, name: str, value) -> str:
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    del file[name]
    file.create_dataset(name, data=data).attrs["blake3"] = np.bytes_(checksum(data))
    return checksum(data)


def version(number):
    def change(file: h5py.File, manifest: dict) -> None:
        header = {**HEADER, "version": number}
        digest = put_json(file, "header", header)
        manifest["header"] |= {"blake3": digest, "shape": [len(json.dumps(header).encode())]}

    return change


def not_finite(name: str, value: float):
    def change(file: h5py.File, manifest: dict) -> None:
        array = file[name][()]
        array[-1] = value
        file[name][...] = array
        file[name].attrs["blake3"] = np.bytes_(checksum(array))
        manifest[name]["blake3"] = checksum(array)

    return change


def external_link(file: h5py.File) -> None:
    target = Path(file.filename).with_name("elsewhere.h5")
    with h5py.File(target, "w") as other:
        file.copy(file["parts/encoder"], other, "stolen")
    del file["parts/encoder"]
    file["parts/encoder"] = h5py.ExternalLink(str(target), "stolen")


def soft_link(file: h5py.File) -> None:
    file["parts"].move("encoder", "other")
    file["parts/encoder"] = h5py.SoftLink("/parts/other")


def external_storage(file: h5py.File) -> None:
    raw = Path(file.filename).with_name("secret")
    raw.write_bytes(file["parts/encoder"][()].tobytes())
    checksum = file["parts/encoder"].attrs["blake3"]
    del file["parts/encoder"]
    new = file.create_dataset("parts/encoder", (300,), "f4", external=[(str(raw), 0, 1200)])
    new.attrs["blake3"] = checksum


def virtual(file: h5py.File) -> None:
    checksum = file["parts/encoder"].attrs["blake3"]
    layout = h5py.VirtualLayout((300,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (300,))
    del file["parts/encoder"]
    file.create_virtual_dataset("parts/encoder", layout).attrs["blake3"] = checksum


def loop(file: h5py.File) -> None:
    file["parts/again"] = file["/"]


def vast_checksum(file: h5py.File) -> None:
    del file["step"].attrs["blake3"]
    file["step"].attrs["blake3"] = np.zeros(1000, "S64")


def claim(file: h5py.File, manifest: dict) -> None:
    """A dataset of 4 TiB of which nothing is stored; the manifest agrees."""
    del file["parts/encoder"]
    file.create_dataset("parts/encoder", (2**40,), "f4").attrs["blake3"] = np.bytes_("0" * 64)
    manifest["parts/encoder"]["shape"] = [2**40]


def vast_manifest(file: h5py.File) -> None:
    del file["manifest"]
    file.create_dataset("manifest", (2**36,), "u1").attrs["blake3"] = np.bytes_("0" * 64)


def claim_compressed(file: h5py.File, manifest: dict) -> None:
    """1 GiB of zeros in a few kilobytes: a decompression bomb."""
    del file["parts/encoder"]
    dataset = file.create_dataset("parts/encoder", (2**28,), "f4", chunks=(2**26,), compression="gzip")
    dataset.attrs["blake3"] = np.bytes_("0" * 64)
    manifest["parts/encoder"]["shape"] = [2**28]


def wrong_table(value):
    return lambda file: put_json(file, "manifest", value)


STR = h5py.string_dtype()
DAMAGE = {
    "zero length": (lambda p: os.truncate(p, 0), "cannot be read"),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "cannot be read"),
    "one byte short": (lambda p: os.truncate(p, p.stat().st_size - 1), "cannot be read"),
    "other content": (lambda p: p.write_bytes(b"\x80\x04cos\nsystem\n"), "cannot be read"),
    "missing": (lambda p: p.unlink(), "is missing"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is not a regular file"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a regular file"),
    "a link": (lambda p: (p.rename(p.with_name("x")), p.symlink_to("x")), "is not a regular file"),
    "flip in data": (lambda p: flip(p, _offset_of(p, "parts/encoder") + 40), "checksum of parts/encoder"),
    "flip in header": (lambda p: flip(p, _offset_of(p, "header") + 4), "checksum of header"),
    "flip in manifest": (lambda p: flip(p, _offset_of(p, "manifest") + 4), "checksum of manifest"),
    "dataset missing": (edit(lambda f: f.__delitem__("parts/decoder")), "parts/decoder is only in"),
    "dataset added": (edit(lambda f: f.create_dataset("more", data=[1.0])), "more is only in"),
    "group missing": (edit(lambda f: f.__delitem__("parts")), "parts/decoder is only in"),
    "manifest missing": (edit(lambda f: f.__delitem__("manifest")), "no manifest"),
    "checksum missing": (edit(lambda f: f["step"].attrs.__delitem__("blake3")), "cannot be read"),
    "checksum wrong": (edit(lambda f: f["step"].attrs.modify("blake3", np.bytes_("0" * 64))), "checksum of step"),
    "checksum vast": (edit(vast_checksum), "no checksum"),
    "other shape": (replace_dataset("samples", data=np.zeros((96,), np.uint8)), r"samples is uint8 \(96,\)"),
    "other dtype": (replace_dataset("parts/decoder", data=np.zeros(200, np.float32)), "parts/decoder is float32"),
    "big-endian": (replace_dataset("parts/decoder", data=np.zeros(200, ">f8")), "not a dataset of plain numbers"),
    "objects": (replace_dataset("step", data=["x"], dtype=STR), "not a dataset of plain numbers"),
    "references": (replace_dataset("step", shape=(1,), dtype=h5py.ref_dtype), "not a dataset of plain numbers"),
    "compound": (replace_dataset("step", shape=(1,), dtype=[("a", "f4")]), "not a dataset of plain numbers"),
    "group for dataset": (edit(lambda f: (f.__delitem__("step"), f.create_group("step/x"))), "only in"),
    "other version": (forge(version(99)), "has layout version 99, this fdiff reads version 2; use the fdiff that"),
    "no whole version": (forge(version(2.0)), "has layout version 2.0, this fdiff reads version 2"),
    "NaN": (forge(not_finite("parts/encoder", np.nan)), "parts/encoder holds values that are not finite"),
    "infinity": (forge(not_finite("parts/encoder", np.inf)), "parts/encoder holds values that are not finite"),
    "minus infinity": (forge(not_finite("parts/decoder", -np.inf)), "parts/decoder holds values that are not finite"),
    "external link": (edit(external_link), "encoder is a link to another place"),
    "soft link": (edit(soft_link), "encoder is a link to another place"),
    "external storage": (edit(external_storage), "not stored in one piece"),
    "virtual dataset": (edit(virtual), "not stored in one piece"),
    "a loop": (edit(loop), "parts/again is only in"),
    "vast claim": (forge(claim), "claim"),
    "vast manifest": (edit(vast_manifest), "manifest claims 68719476736 bytes"),
    "bomb": (forge(claim_compressed), "claim"),
    "manifest a list": (edit(wrong_table([])), "not a table"),
    "manifest of lists": (edit(wrong_table({n: [] for n in (*ARRAYS, "header")})), "describes nothing"),
    "manifest of nulls": (edit(wrong_table({n: None for n in (*ARRAYS, "header")})), "describes nothing"),
    "manifest deep": (edit(lambda f: deep(f)), "cannot be read"),
}


def deep(file: h5py.File) -> None:
    data = np.frombuffer(b"[" * 100_000, np.uint8)
    del file["manifest"]
    file.create_dataset("manifest", data=data).attrs["blake3"] = np.bytes_(checksum(data))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line_and_never_loaded(file, name):
    damage, what = DAMAGE[name]
    damage(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged, match=what) as raised:
        read_file(file)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)
    assert examine(file).problems == [str(raised.value)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "kilobytes"


def test_examine_goes_on_after_a_damaged_dataset(file):
    flip(file, _offset_of(file, "parts/encoder"))
    flip(file, _offset_of(file, "samples"))
    found = examine(file)
    assert len(found.problems) == 2 and set(found.datasets) == {"header", "parts/decoder", "step"}


def same(path: Path) -> bool:
    """Whether a file reads as it was written; Damaged if it does not read."""
    arrays, header = read_file(path)
    equal = all(np.array_equal(arrays[n], a) and arrays[n].dtype == a.dtype for n, a in ARRAYS.items())
    return equal and arrays.keys() == ARRAYS.keys() and header == {**HEADER, "version": file_module.VERSION}


def test_no_flipped_bit_changes_what_is_loaded(file, tmp_path):
    """At every 7th byte of the file, one bit: it is noticed, or it is where no data is."""
    whole, detected = file.read_bytes(), 0
    damaged = tmp_path / "damaged.h5"
    offsets = range(0, len(whole), 7)
    for offset in offsets:
        damaged.write_bytes(whole)
        flip(damaged, offset, offset % 8)
        try:
            assert same(damaged), f"a flip at {offset} was loaded"
        except Damaged as error:
            assert "\n" not in str(error)
            detected += 1
    assert detected > 0.6 * len(offsets)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_mangled_file_is_loaded(file, data):
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.binary(max_size=32))
        whole[start : start + data.draw(st.integers(0, 32))] = junk
    mangled = file.with_name("mangled.h5")
    mangled.write_bytes(whole)
    try:
        assert same(mangled)
    except Damaged as error:
        assert "\n" not in str(error)


def test_a_file_cut_off_anywhere_is_damaged(file):
    whole = file.stat().st_size
    for size in range(whole - 1, 0, -97):
        os.truncate(file, size)
        assert examine(file).problems, f"cut off at {size} of {whole} bytes"
