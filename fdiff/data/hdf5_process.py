"""The process that reads an HDF5 silo, `hdf5_reader`, and what is asked of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdiff.data import hdf5_reader
from fdiff.data.loaders import PATIENCE_S, TICK_S, leaving_signals_to_rank
from fdiff.errors import RunError, UserError
from fdiff.runtime import free_memory, heed_stop


class Silo:
    """A file's split, read by a process that is started when it is needed, in each process that needs it."""

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        self._reader: Reader | None = None

    def reader(self) -> Reader:
        """This process's own: what is inherited over a fork answers to others."""
        if self._reader is None or self._reader.owner != os.getpid() or not self._reader.usable:
            self._reader = Reader(self.path, self.split)
            weakref.finalize(self, Reader.close, self._reader)
        return self._reader

    def close(self) -> None:
        """End the process; another is started if need be."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Reader:
    """`hdf5_reader` at work on a file: started, not forked, as neither MPI nor CUDA outlives a fork.

    `facts` are the line that it begins with.
    """

    def __init__(self, path: Path, split: str) -> None:
        self._path, self.owner, self.usable = path, os.getpid(), True
        free = free_memory(torch.device("cpu"))
        command = [sys.executable, "-P", hdf5_reader.__file__, str(path), split, str(free)]
        with leaving_signals_to_rank():
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        try:
            self.facts: dict[str, Any] = json.loads(self._line())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it, in the process that started it."""
        if not self.usable or self.owner != os.getpid():
            return
        self.usable = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()

    def labels(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The labels."""
        return self._ask("labels", shape, dtype)

    def images(self, axis: int, start: int, stop: int) -> np.ndarray:
        """The images at these places of one of their axes, in all axes as they are stored."""
        shape = list(self.facts["shape"])
        shape[axis] = stop - start
        return self._ask(f"{axis} {start} {stop}", tuple(shape), self.facts["dtype"])

    def _ask(self, what: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = np.empty(shape, dtype)
        try:
            self._process.stdin.write(f"{what}\n".encode())
            self._fill(memoryview(array.reshape(-1).view(np.uint8)))
        except BrokenPipeError:
            error = self._died()
            self.close()
            raise error from None
        except BaseException:  # it is in the middle of an answer
            self.close()
            raise
        return array

    def _line(self) -> bytes:
        line = bytearray()
        byte = memoryview(bytearray(1))
        while not line.endswith(b"\n"):
            self._fill(byte)
            line += byte
        return bytes(line)

    def _fill(self, target: memoryview) -> None:
        """Read until the target is full; UserError names the file if the process is gone before that."""
        pipe, began = self._process.stdout.fileno(), time.monotonic()
        while target:
            if not select.select([pipe], [], [], TICK_S)[0]:
                heed_stop()
                if time.monotonic() - began > PATIENCE_S:
                    raise RunError(f"{self._path}: has given nothing for {PATIENCE_S:g} s; look at its file system")
                continue
            if not (count := os.readv(pipe, [target])):
                raise self._died()
            target, began = target[count:], time.monotonic()

    def _died(self) -> UserError:
        reason, status = self._process.stderr.read().decode(errors="replace").strip(), self._process.wait()
        if status == 1 and reason:
            return UserError(f"{self._path}: {reason}")
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return UserError(f"{self._path}: is damaged: reading it ended the HDF5 library {how}; replace it")
