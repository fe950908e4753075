"""Checkpoint files as anybody's h5py sees them, damage of every kind, and a commit that is whole or not there."""

from __future__ import annotations

import contextlib
import errno
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
from array_files import ARRAYS, HEADER, write_one
from blake3 import blake3

from fdiff import checkpoint
from fdiff.checkpoint import file as file_module
from fdiff.checkpoint.commit import Committer, Contents
from fdiff.checkpoint.file import Damaged, read_digest, read_file, write_file
from fdiff.errors import RunError, UserError


@pytest.fixture
def file(tmp_path) -> Path:
    return write_one(tmp_path)


def checksum(array: np.ndarray) -> str:
    return blake3(array.tobytes()).hexdigest()


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
            assert manifest[name] == {"shape": list(array.shape), "dtype": array.dtype.name, "blake3": checksum(array)}
        assert all(opened[name].attrs["blake3"].decode() == checksum(opened[name][()]) for name in names)
        assert json.loads(opened["header"][()].tobytes()) == {**HEADER, "version": file_module.VERSION}


def test_the_format_is_one_whose_structures_have_checksums(file):
    """Version 2 of the superblock and no other: HDF5 1.8 reads it, and notices damage before it follows a pointer."""
    assert file.read_bytes()[:9] == b"\x89HDF\r\n\x1a\n\x02"


def test_what_is_written_comes_back(file):
    arrays, header = read_file(file)
    assert header == {**HEADER, "version": file_module.VERSION} and arrays.keys() == ARRAYS.keys()
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


def test_files_written_before_h5py_did_all_are_read(tmp_path):
    """Layout version 2 as up to commit 6d1e45c: large datasets allocated early, at multiples of 4096 bytes."""
    path, arrays = tmp_path / "global.h5", {**ARRAYS, "parts/bottleneck": np.arange(20_001, dtype=np.float32)}
    with h5py.File(path, "w", libver=("v108", "v108"), alignment_threshold=2**16, alignment_interval=4096) as before:
        manifest = {name: put_as_before(before, name, array) for name, array in arrays.items()}
        manifest["header"] = put_as_before(before, "header", as_json({**HEADER, "version": 2}))
        put_as_before(before, "manifest", as_json(manifest))
        assert before["parts/bottleneck"].id.get_offset() % 4096 == 0
    back, header = read_file(path)
    assert header == {**HEADER, "version": 2} and back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())


def as_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def put_as_before(file: h5py.File, name: str, array: np.ndarray) -> dict:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dataset = file.create_dataset(name, array.shape, array.dtype, dcpl=plist)
    dataset[()] = array
    dataset.attrs["blake3"] = np.bytes_(checksum(array))
    return {"shape": list(array.shape), "dtype": array.dtype.name, "blake3": checksum(array)}


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.array(7), np.arange(2**20 + 1, dtype=np.float32)[::2]])
def test_empty_scalar_and_strided_arrays_come_back(tmp_path, array):
    write_file(tmp_path / "global.h5", {"x": array}, HEADER)
    back = read_file(tmp_path / "global.h5")[0]["x"]
    assert np.array_equal(back, array) and (back.shape, back.dtype) == (array.shape, array.dtype)


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match=f"{os.strerror(errno.EFBIG)}.*global.h5'"):
            write_file(tmp_path / "global.h5", {"parts/encoder": np.zeros(2**20, np.float32)}, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_wherever_the_room_ends_a_file_is_whole_or_not_there(tmp_path):
    """Also in the last bytes of a dataset, of the header and of the manifest, which HDF5 holds back for a while."""
    arrays = {"parts/encoder": np.arange(5000, dtype=np.float32), "step": np.zeros((), np.float32)}
    header, path = {"rows": list(range(3000))}, tmp_path / "global.h5"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_file(path, arrays, header)
    size = path.stat().st_size
    path.unlink()
    for limit in range(200, size + 200, 197):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="global.h5") if limit < size else contextlib.nullcontext():
                write_file(path, arrays, header)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.exists() == (limit >= size)
    assert read_file(path)[1]["rows"] == header["rows"]


def test_layout_table_is_the_canonical_order():
    from fdiff.model import describe_model, layout_of

    table = checkpoint.layout_table(layout_of(describe_model(small_config())))
    assert table == json.loads(json.dumps(table))
    ends: dict[str, int] = {}
    for name, part, offset, shape in table:
        assert name.startswith(part + ".") and offset == ends.get(part, 0)
        ends[part] = offset + int(np.prod(shape))
    assert list(ends) == ["encoder", "bottleneck", "decoder"]


def small_config():
    from fdiff import config as cfg

    return cfg.Config(data=cfg.DataConfig(image_side=8), model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8))


# --- a checkpoint --------------------------------------------------------------------------------------------------


def make_generation(run: Path, round: int, keep: int = 2, clients: int = 2) -> Path:
    """A committed checkpoint as the committer makes it, all clients on one rank."""
    committer = Committer(run, f"attempt{round}", keep, range(clients), leads=True)
    own = {c: {"private/encoder": np.full(5, c + round, np.float32)} for c in range(clients)}
    try:
        committer.start(Contents(round, own, (ARRAYS, {"round": round})))
        committer.wait()
        committer.wait_committed()
    finally:
        committer.close()
    return checkpoint.root(run) / checkpoint.generation_name(round)


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
    assert not [f for f in checkpoint.root(tmp_path).iterdir() if not f.name.startswith("round-")]


def test_what_interrupted_commits_leave_is_never_read_and_goes(tmp_path):
    make_generation(tmp_path, 1)
    left = checkpoint.temporary_folder(tmp_path, 2, "killed")
    shutil.copytree(checkpoint.root(tmp_path) / "round-000001", left)
    shutil.copytree(left, checkpoint.root(tmp_path) / ".old-round-000000")
    for odd in ("round-1", "round-0000001", "round-000002.bak", "damaged-round-000009-00"):
        (checkpoint.root(tmp_path) / odd).mkdir()
    assert rounds(tmp_path) == [1]
    assert checkpoint.clean(tmp_path, 1) == []
    assert not list(checkpoint.root(tmp_path).glob(".*")) and rounds(tmp_path) == [1]


def test_a_file_where_a_checkpoint_is_to_be_is_refused_before_anything_is_trained(tmp_path):
    make_generation(tmp_path, 1)
    (checkpoint.root(tmp_path) / "round-000007").write_text("a file")
    assert rounds(tmp_path) == [1]
    with pytest.raises(UserError, match="round-000007: is no folder, and has the name of a checkpoint; move it"):
        checkpoint.clean(tmp_path, 1)


def test_what_somebody_reads_is_not_pruned(tmp_path):
    make_generation(tmp_path, 1)
    hold = checkpoint.hold(checkpoint.root(tmp_path) / "round-000001")
    for round in (2, 3, 4):
        make_generation(tmp_path, round, keep=2)
    assert rounds(tmp_path) == [1, 3, 4] and hold is not None
    del hold
    make_generation(tmp_path, 5, keep=2)
    assert rounds(tmp_path) == [4, 5]
    assert checkpoint.hold(checkpoint.root(tmp_path) / "round-000001") is None


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
    monkeypatch.setattr("fdiff.checkpoint.commit.GRACE_S", 0.1)
    lead = Committer(tmp_path, "a", 2, range(2), leads=True)
    lead.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, (ARRAYS, {"round": 1})))
    lead.wait()  # its own file is there
    lead.close()
    assert rounds(tmp_path) == []
    with pytest.raises(RunError, match="given up; client-0001.h5 never came"):
        lead.check()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_writer_that_fails_is_heard_at_the_next_safe_point(tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(file_module.os, "fsync", fail)
    committer = Committer(tmp_path, "a", 2, range(1), leads=False)
    committer.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, None))
    with pytest.raises(RunError, match=f"checkpoint could not be written: .*{os.strerror(error)}.*client-0000.h5"):
        committer.wait()
    committer.close()
