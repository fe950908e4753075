"""Checkpoint files as anybody's h5py sees them, damage of every kind, and a commit that is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdiff import arrayfile, checkpoint
from fdiff.arrayfile import Damaged, examine, read_digest, read_file, write_file
from fdiff.commit import Committer, Contents
from fdiff.errors import RunError

ARRAYS = {
    "parts/encoder": np.linspace(-1, 1, 300, dtype=np.float32),
    "parts/decoder": np.arange(200, dtype=np.float64),
    "samples": np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4),
    "step": np.array(7, np.int64),
}
HEADER = {"round": 3, "note": "päper", "clients": {}}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "global.h5"
    write_file(path, ARRAYS, HEADER)
    return path


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


# --- the format ----------------------------------------------------------------------------------------------------


def test_plain_h5py_reads_all_of_it(file):
    with h5py.File(file) as opened:
        names: list[str] = []
        opened.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert set(names) == {*ARRAYS, "header", "manifest"}
        manifest = json.loads(opened["manifest"][()].tobytes())
        for name, array in ARRAYS.items():
            dataset = opened[name]
            assert dataset.dtype == array.dtype and dataset.shape == array.shape and dataset.chunks is None
            assert np.array_equal(dataset[()], array)
            assert manifest[name] == {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": sha256(array)}
        assert all(opened[name].attrs["sha256"].decode() == sha256(opened[name][()]) for name in names)
        assert json.loads(opened["header"][()].tobytes()) == {**HEADER, "version": arrayfile.VERSION}


def test_the_format_is_one_whose_structures_have_checksums(file):
    """Version 2 of the superblock and no other: HDF5 1.8 reads it, and notices damage before it follows a pointer."""
    assert file.read_bytes()[:9] == b"\x89HDF\r\n\x1a\n\x02"


def test_what_is_written_comes_back(file):
    arrays, header = read_file(file)
    assert header == {**HEADER, "version": arrayfile.VERSION} and arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[n], a) and arrays[n].dtype == a.dtype for n, a in ARRAYS.items())
    assert arrays["step"].shape == ()


def test_only_the_owner_may_read_it(file):
    before = os.umask(0)
    try:
        write_file(file.with_name("client-0000.h5"), ARRAYS, {})
    finally:
        os.umask(before)
    for path in (file, file.with_name("client-0000.h5")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_digest_tells_files_apart(file, tmp_path):
    other = tmp_path / "other.h5"
    digest = write_file(other, {**ARRAYS, "step": np.array(8, np.int64)}, HEADER)
    assert read_digest(other) == digest != read_digest(file)
    read_file(other, digest)
    with pytest.raises(Damaged, match=r"other\.h5: is not the file that its checkpoint lists"):
        read_file(other, read_digest(file))


def test_what_reads_back_otherwise_is_not_given_its_name(tmp_path, monkeypatch):
    """A disk that returns something else than was written, put there between the write and the reading back."""
    real = arrayfile._write

    def lying(path: Path, arrays: arrayfile.Arrays) -> None:
        real(path, arrays)
        flip(path, _offset_of(path, "parts/encoder") + 17)

    monkeypatch.setattr(arrayfile, "_write", lying)
    with pytest.raises(OSError, match="read back is not what was written.*checksum of parts/encoder"):
        write_file(tmp_path / "global.h5", ARRAYS, HEADER)
    assert not list(tmp_path.iterdir())


def test_layout_table_is_the_canonical_order():
    from fdiff.soundness import layout_for

    table = checkpoint.layout_table(layout_for(small_config()))
    assert table == json.loads(json.dumps(table))
    ends: dict[str, int] = {}
    for name, part, offset, shape in table:
        assert name.startswith(part + ".") and offset == ends.get(part, 0)
        ends[part] = offset + int(np.prod(shape))
    assert list(ends) == ["encoder", "bottleneck", "decoder"]


def small_config():
    from fdiff import config as cfg

    return cfg.Config(data=cfg.DataConfig(image_side=8), model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8))


# --- damage --------------------------------------------------------------------------------------------------------


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
        checksum = file[name].attrs["sha256"]
        del file[name]
        file.create_dataset(name, **of_new).attrs["sha256"] = checksum

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
    file.create_dataset(name, data=data).attrs["sha256"] = np.bytes_(sha256(data))
    return sha256(data)


def other_version(file: h5py.File, manifest: dict) -> None:
    header = {**HEADER, "version": 99}
    digest = put_json(file, "header", header)
    manifest["header"] |= {"sha256": digest, "shape": [len(json.dumps(header).encode())]}


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
    checksum = file["parts/encoder"].attrs["sha256"]
    del file["parts/encoder"]
    new = file.create_dataset("parts/encoder", (300,), "f4", external=[(str(raw), 0, 1200)])
    new.attrs["sha256"] = checksum


def virtual(file: h5py.File) -> None:
    checksum = file["parts/encoder"].attrs["sha256"]
    layout = h5py.VirtualLayout((300,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (300,))
    del file["parts/encoder"]
    file.create_virtual_dataset("parts/encoder", layout).attrs["sha256"] = checksum


def loop(file: h5py.File) -> None:
    file["parts/again"] = file["/"]


def vast_checksum(file: h5py.File) -> None:
    del file["step"].attrs["sha256"]
    file["step"].attrs["sha256"] = np.zeros(1000, "S64")


def claim(file: h5py.File, manifest: dict) -> None:
    """A dataset of 4 TiB of which nothing is stored; the manifest agrees."""
    del file["parts/encoder"]
    file.create_dataset("parts/encoder", (2**40,), "f4").attrs["sha256"] = np.bytes_("0" * 64)
    manifest["parts/encoder"]["shape"] = [2**40]


def vast_manifest(file: h5py.File) -> None:
    del file["manifest"]
    file.create_dataset("manifest", (2**36,), "u1").attrs["sha256"] = np.bytes_("0" * 64)


def claim_compressed(file: h5py.File, manifest: dict) -> None:
    """1 GiB of zeros in a few kilobytes: a decompression bomb."""
    del file["parts/encoder"]
    dataset = file.create_dataset("parts/encoder", (2**28,), "f4", chunks=(2**26,), compression="gzip")
    dataset.attrs["sha256"] = np.bytes_("0" * 64)
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
    "checksum missing": (edit(lambda f: f["step"].attrs.__delitem__("sha256")), "cannot be read"),
    "checksum wrong": (edit(lambda f: f["step"].attrs.modify("sha256", np.bytes_("0" * 64))), "checksum of step"),
    "checksum vast": (edit(vast_checksum), "no checksum"),
    "other shape": (replace_dataset("samples", data=np.zeros((96,), np.uint8)), r"samples is uint8 \(96,\)"),
    "other dtype": (replace_dataset("parts/decoder", data=np.zeros(200, np.float32)), "parts/decoder is float32"),
    "big-endian": (replace_dataset("parts/decoder", data=np.zeros(200, ">f8")), "not a dataset of plain numbers"),
    "objects": (replace_dataset("step", data=["x"], dtype=STR), "not a dataset of plain numbers"),
    "references": (replace_dataset("step", shape=(1,), dtype=h5py.ref_dtype), "not a dataset of plain numbers"),
    "compound": (replace_dataset("step", shape=(1,), dtype=[("a", "f4")]), "not a dataset of plain numbers"),
    "group for dataset": (edit(lambda f: (f.__delitem__("step"), f.create_group("step/x"))), "only in"),
    "other version": (forge(other_version), "has layout version 99; this fdiff reads version 1"),
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
    file.create_dataset("manifest", data=data).attrs["sha256"] = np.bytes_(sha256(data))


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
    return equal and arrays.keys() == ARRAYS.keys() and header == {**HEADER, "version": arrayfile.VERSION}


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# --- a checkpoint --------------------------------------------------------------------------------------------------


def make_generation(run: Path, round: int, keep: int = 2, clients: int = 2) -> Path:
    """A committed checkpoint as the committer makes it, all clients on one rank."""
    committer = Committer(run, f"attempt{round}", keep, range(clients), leads=True)
    own = {c: {"private/encoder": np.full(5, c + round, np.float32)} for c in range(clients)}
    committer.start(Contents(round, own, (ARRAYS, {"round": round})))
    committer.wait()
    committer.wait_committed()
    committer.close()
    return checkpoint.folder(run) / checkpoint.generation_name(round)


def test_a_checkpoint_lists_its_files(tmp_path):
    path = make_generation(tmp_path, 3)
    assert sorted(f.name for f in path.iterdir()) == ["client-0000.h5", "client-0001.h5", "global.h5"]
    arrays, header, (second,) = checkpoint.read_generation(path, [1])
    assert header["clients"] == {f"client-000{c}.h5": read_digest(path / f"client-000{c}.h5") for c in (0, 1)}
    assert np.array_equal(second["private/encoder"], np.full(5, 4, np.float32)) and arrays.keys() == ARRAYS.keys()
    assert checkpoint.verify(path) == []


def test_a_file_of_another_round_is_not_this_checkpoints(tmp_path):
    old, new = make_generation(tmp_path, 1), make_generation(tmp_path, 2)
    shutil.copy(old / "client-0001.h5", new / "client-0001.h5")
    assert len(checkpoint.verify(new)) == 1 and "not the file that its checkpoint lists" in checkpoint.verify(new)[0]
    with pytest.raises(Damaged):
        checkpoint.read_generation(new, [1])


def test_a_stranger_and_a_missing_file_are_problems(tmp_path):
    path = make_generation(tmp_path, 1)
    (path / "client-0001.h5").rename(path / "client-0007.h5")
    problems = checkpoint.verify(path)
    assert len(problems) == 2 and "client-0001.h5: is missing" in problems[0] and "client-0007.h5" in problems[1]
    with pytest.raises(Damaged, match="does not list client-0007.h5"):
        checkpoint.read_generation(path, [7])


@pytest.mark.parametrize(
    "listed", [{"../../other/client-0000.h5": "0"}, {"/etc/passwd": "0"}, ["x"], {"client-0000.h5": 1}]
)
def test_no_listed_name_leads_out_of_the_folder(tmp_path, listed):
    path = tmp_path / "round-000001"
    path.mkdir()
    write_file(path / "global.h5", ARRAYS, {"round": 1, "clients": listed})
    assert "lists files that are not those of clients" in checkpoint.verify(path)[0]
    with pytest.raises(Damaged, match="lists files"):
        checkpoint.read_generation(path)


# --- committing ----------------------------------------------------------------------------------------------------


def rounds(run: Path) -> list[int]:
    return [g.round for g in checkpoint.generations(run)]


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_ones_are_kept(tmp_path, keep):
    for round in range(1, 6):
        make_generation(tmp_path, round, keep)
        assert rounds(tmp_path) == list(range(max(1, round - keep + 1), round + 1))
    assert all(not checkpoint.verify(g.path) for g in checkpoint.generations(tmp_path))
    assert not [f for f in checkpoint.folder(tmp_path).iterdir() if not f.name.startswith("round-")]


def test_what_interrupted_commits_leave_is_never_read_and_goes(tmp_path):
    make_generation(tmp_path, 1)
    left = checkpoint.temporary_folder(tmp_path, 2, "killed")
    shutil.copytree(checkpoint.folder(tmp_path) / "round-000001", left)
    shutil.copytree(left, checkpoint.folder(tmp_path) / ".old-round-000000")
    for odd in ("round-1", "round-0000001", "round-000002.bak", "damaged-round-000009-00"):
        (checkpoint.folder(tmp_path) / odd).mkdir()
    (checkpoint.folder(tmp_path) / "round-000007").write_text("a file")
    assert rounds(tmp_path) == [1]
    assert checkpoint.clean(tmp_path, 1) == []
    assert not list(checkpoint.folder(tmp_path).glob(".*")) and rounds(tmp_path) == [1]


def test_damaged_newer_ones_do_not_push_out_sound_old_ones(tmp_path):
    """Were they left in place, the two of them would be the newest two and both sound ones would be pruned."""
    for round in (1, 2, 5, 6):
        path = make_generation(tmp_path, round, keep=9)
    for round in (5, 6):
        os.truncate(path.with_name(f"round-{round:06d}") / "global.h5", 100)
    aside = checkpoint.clean(tmp_path, 2)
    assert rounds(tmp_path) == [1, 2] and len(aside) == 2 and all(a.is_dir() for a in aside)
    make_generation(tmp_path, 3, keep=2)
    assert rounds(tmp_path) == [2, 3]
    assert all(not checkpoint.verify(g.path) for g in checkpoint.generations(tmp_path))


def test_a_committed_round_is_never_overwritten(tmp_path):
    path = make_generation(tmp_path, 1)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(RunError, match="could not be written"):
        make_generation(tmp_path, 1)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_the_leading_rank_waits_for_the_others_files(tmp_path):
    lead = Committer(tmp_path, "a", 2, range(2), leads=True)
    other = Committer(tmp_path, "a", 2, range(2), leads=False)
    own = {"private/encoder": np.zeros(3, np.float32)}
    lead.start(Contents(1, {0: own}, (ARRAYS, {"round": 1})))
    lead.wait()
    time.sleep(0.2)
    assert rounds(tmp_path) == []
    other.start(Contents(1, {1: own}, None))
    other.wait()
    lead.wait_committed()
    assert rounds(tmp_path) == [1] and checkpoint.verify(checkpoint.generations(tmp_path)[0].path) == []
    lead.close()
    other.close()


def test_a_commit_that_never_completes_stays_invisible(tmp_path, monkeypatch):
    monkeypatch.setattr("fdiff.commit.GRACE_S", 0.1)
    lead = Committer(tmp_path, "a", 2, range(2), leads=True)
    lead.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, (ARRAYS, {"round": 1})))
    lead.close()
    assert rounds(tmp_path) == []
    with pytest.raises(RunError, match="given up; client-0001.h5 never came"):
        lead.check()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_writer_that_fails_is_heard_at_the_next_safe_point(tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise OSError(error, "HDF5 tells a long story")

    monkeypatch.setattr(arrayfile, "_write", fail)
    committer = Committer(tmp_path, "a", 2, range(1), leads=False)
    committer.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, None))
    with pytest.raises(RunError, match=f"checkpoint could not be written: .*{os.strerror(error)}.*client-0000.h5"):
        committer.wait()
    committer.close()
