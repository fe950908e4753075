"""Bytes past the page cache: every size and offset, with and without a file system that takes it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from array_files import HEADER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdiff.checkpoint import directio
from fdiff.checkpoint.directio import BLOCK_BYTES, PIECE_BYTES, Disk, enclosing_blocks, opened, whole_blocks
from fdiff.checkpoint.file import read_file, write_file

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
SIZES = (0, 1, 4095, 4096, 4097, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 4097)


def some_bytes(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)


def written(path: Path, data: np.ndarray, offset: int) -> bytes:
    """Write to a new file, and what `heed` was given."""
    seen: list[bytes] = []
    with opened(path, CREATE) as disk:
        disk.write(data, offset, lambda piece: seen.append(piece.tobytes()))
        disk.sync()
    return b"".join(seen)


def read_back(path: Path, offset: int, n: int) -> bytes:
    with opened(path, os.O_RDONLY) as disk:
        return b"".join(piece.tobytes() for piece in disk.read(offset, n))


@pytest.fixture(params=["as it comes", "refused to open", "refused to transfer", "unknown to the system"])
def way(request, monkeypatch):
    """Where the way past the cache ends."""
    if request.param == "unknown to the system":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif request.param == "refused to open":
        real_open = os.open

        def refusing(path, flags, *mode, **more):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "refused")
            return real_open(path, flags, *mode, **more)

        monkeypatch.setattr(os, "open", refusing)
    elif request.param == "refused to transfer":
        fail_direct(monkeypatch, errno.EINVAL)
    return request.param


def fail_direct(monkeypatch, number: int) -> None:
    """Every direct transfer fails so; `os.pwrite` and `os.preadv` know a descriptor by its flags."""

    def failing(real):
        def transfer(descriptor, *rest):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(number, os.strerror(number))
            return real(descriptor, *rest)

        return transfer

    for name in ("pwrite", "preadv"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("offset", [0, 8, 4096])
@pytest.mark.parametrize("n", SIZES)
def test_what_is_written_is_in_the_file_and_comes_back(tmp_path, way, n, offset):
    data, path = some_bytes(n), tmp_path / "f"
    assert written(path, data, offset) == data.tobytes()
    assert path.read_bytes()[offset:] == data.tobytes()
    assert read_back(path, offset, n) == data.tobytes()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(length=st.integers(0, 20_000), offset=st.integers(0, 25_000), n=st.integers(0, 25_000))
def test_any_part_of_a_file_is_read_as_far_as_it_goes(tmp_path, length, offset, n):
    path, data = tmp_path / "f", some_bytes(length).tobytes()
    path.write_bytes(data)
    assert read_back(path, offset, n) == data[offset : offset + n]


@given(start=st.integers(0, 2**40), n=st.integers(1, 2**30))
def test_blocks_enclose_and_fit(start, n):
    first, length = enclosing_blocks(start, start + n)
    assert first % BLOCK_BYTES == length % BLOCK_BYTES == 0
    assert first <= start < first + BLOCK_BYTES and 0 <= first + length - (start + n) < BLOCK_BYTES
    whole = whole_blocks(start, n)
    assert whole % BLOCK_BYTES == 0 and (n - whole < BLOCK_BYTES if start % BLOCK_BYTES == 0 else whole == 0)


def test_short_writes_go_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:1000], offset))
    data = some_bytes(3 * BLOCK_BYTES + 5)
    written(tmp_path / "f", data, 0)
    assert (tmp_path / "f").read_bytes() == data.tobytes()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no way past the cache")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_not_taken_for_one_that_refuses(tmp_path, monkeypatch, number):
    fail_direct(monkeypatch, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        written(tmp_path / "f", some_bytes(BLOCK_BYTES), 0)
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*global.h5'"):
        write_file(tmp_path / "global.h5", {"parts/encoder": np.zeros(2**20, np.float32)}, HEADER)
    assert not (tmp_path / "global.h5").exists() and not (tmp_path / "global.h5.part").exists()


def test_large_datasets_begin_at_blocks_and_go_past_the_cache(tmp_path, monkeypatch):
    arrays = {"parts/encoder": np.arange(2**20 + 1, dtype=np.float32), "step": np.array(7), "none": np.zeros((0, 3))}
    direct: list[int] = []
    real = Disk._write_blocks
    monkeypatch.setattr(
        Disk, "_write_blocks", lambda self, blocks, offset: direct.append(len(blocks)) or real(self, blocks, offset)
    )
    write_file(tmp_path / "global.h5", arrays, HEADER)
    with h5py.File(tmp_path / "global.h5") as file:
        assert file["parts/encoder"].id.get_offset() % BLOCK_BYTES == 0
    assert sum(direct) == 2**22
    back = read_file(tmp_path / "global.h5")[0]
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())


def test_files_from_before_are_read_though_nothing_in_them_is_aligned(tmp_path, monkeypatch, way):
    monkeypatch.setattr("fdiff.checkpoint.file._ALIGNED", {})
    arrays = {"step": np.array(7), "parts/encoder": np.arange(2**20 + 1, dtype=np.float32)}
    write_file(tmp_path / "global.h5", arrays, HEADER)
    with h5py.File(tmp_path / "global.h5") as file:
        assert file["parts/encoder"].id.get_offset() % BLOCK_BYTES != 0
    assert np.array_equal(read_file(tmp_path / "global.h5")[0]["parts/encoder"], arrays["parts/encoder"])


def test_a_bit_that_changed_on_the_disk_is_found(tmp_path, monkeypatch):
    """In a large dataset, past the cache both ways: between the sync and the reading back."""
    real = directio.Disk.sync

    def flipping(self: Disk) -> None:
        real(self)
        with next(tmp_path.glob("*.part")).open("r+b") as file:
            file.seek(2**20)
            byte = file.read(1)[0]
            file.seek(2**20)
            file.write(bytes([byte ^ 4]))

    monkeypatch.setattr(directio.Disk, "sync", flipping)
    with pytest.raises(OSError, match="read back is not what was written.*checksum of parts/encoder"):
        write_file(tmp_path / "global.h5", {"parts/encoder": np.zeros(2**20, np.float32)}, HEADER)
    assert not list(tmp_path.iterdir())
