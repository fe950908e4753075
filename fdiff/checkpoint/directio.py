"""A file's bytes to the disk and back past the page cache, where the file system takes that.

It spares the kernel a copy of every byte, and what is read back comes from the disk and not from memory. Such a
transfer begins and ends at whole blocks, in memory as in the file: it goes through a buffer of its own, one a file.
What makes no whole block, and everything where the way past the cache is refused, goes through an ordinary descriptor.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4096  # what disks and file systems ask for, or a multiple of it
PIECE_BYTES = 2**21  # as much as a core keeps near: a piece is copied, hashed and fetched by the disk in turn
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class Disk:
    """Reads and writes a file by pieces, through its `direct` descriptor as long as that is not refused, or `plain`."""

    def __init__(self, plain: int, direct: int | None = None) -> None:
        self._plain, self._direct = plain, direct
        self._buffer = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), np.uint8)

    def write(self, data: np.ndarray, offset: int, heed: Callable[[np.ndarray], object]) -> None:
        """Write bytes (n,) at an offset; `heed` is called with all of them in turn, while the processor has them."""
        for start in range(0, len(data), PIECE_BYTES):
            piece, at = data[start : start + PIECE_BYTES], offset + start
            blocks = self._buffer[: whole_blocks(at, len(piece))]
            blocks[:] = piece[: len(blocks)]
            heed(blocks)
            heed(piece[len(blocks) :])
            self._write_blocks(blocks, at)
            _write(self._plain, piece[len(blocks) :], at + len(blocks))

    def _write_blocks(self, blocks: np.ndarray, offset: int) -> None:
        if self._direct is not None:
            try:
                _write(self._direct, blocks, offset)
                return
            except OSError as error:
                self._give_up(error)
        _write(self._plain, blocks, offset)

    def read(self, offset: int, n: int) -> Iterator[np.ndarray]:
        """The n bytes at an offset, as far as the file has them, by pieces that last until the next one."""
        end = offset + n
        while offset < end:
            first, length = enclosing_blocks(offset, end)
            memory = self._buffer[: min(length, PIECE_BYTES)]
            piece = memory[offset - first : min(self._read_blocks(memory, first), end - first)]
            if not len(piece):
                return
            yield piece
            offset += len(piece)

    def _read_blocks(self, memory: np.ndarray, offset: int) -> int:
        if self._direct is not None:
            try:
                return os.preadv(self._direct, [memory], offset)
            except OSError as error:
                self._give_up(error)
        return os.preadv(self._plain, [memory], offset)

    def _give_up(self, error: OSError) -> None:
        """From now on through the cache, if that is what the error is about."""
        if error.errno not in _REFUSED:
            raise error
        self._direct = None

    def sync(self) -> None:
        """Have all that was written on the disk, and whatever passed through the cache out of it."""
        os.fsync(self._plain)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[Disk]:
    """A file by its flags of `os.open`; one that these create is its owner's alone."""
    with _descriptor(path, flags) as plain:
        try:
            direct = os.open(path, flags & os.O_ACCMODE | os.O_DIRECT)
        except (AttributeError, OSError):  # not every system has it, nor every file system
            yield Disk(plain)
            return
        try:
            yield Disk(plain, direct)
        finally:
            os.close(direct)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def whole_blocks(offset: int, n: int) -> int:
    """Of n bytes at an offset, how many from the first on fill whole blocks."""
    return 0 if offset % BLOCK_BYTES else n - n % BLOCK_BYTES


def enclosing_blocks(start: int, end: int) -> tuple[int, int]:
    """Offset and length of the blocks in which bytes from `start` to before `end` lie."""
    first = start - start % BLOCK_BYTES
    return first, -((first - end) // BLOCK_BYTES) * BLOCK_BYTES


def _write(descriptor: int, data: np.ndarray, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
