"""The power fails: a disk image is copied at a random moment of a commit, and mounted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults.ledger import Row
from fdiff import checkpoint

WRITER = Path(__file__).with_name("power_cut_writer.py")


def cuts(row: Row, cases: range, folder: Path) -> None:
    """The power fails while a run commits: what the disk then holds, its journal replayed, is enough."""
    _cuts(row, "sound", cases, folder)


def careless(row: Row, cases: range, folder: Path) -> None:
    """The control: a writer that overwrites in place and syncs nothing, under the same power cuts."""
    _cuts(row, "careless", cases, folder)


def _cuts(row: Row, how: str, cases: range, folder: Path) -> None:
    for i in cases:
        disk, mounted = folder / f"{how}.img", folder / f"{how}-{i}"
        subprocess.run(["truncate", "--size", "16M", str(disk)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
        with _mounted(disk, mounted, "loop,commit=300"):
            committed = _write_until_cut(how, mounted, random.Random(i))
            shutil.copyfile(disk, cut := folder / "cut.img")
        with _mounted(cut, mounted, "loop"):
            there = {g.round: not checkpoint.verify(g.path) for g in checkpoint.generations(mounted)}
        gone = [r for r in (committed - 1, committed) if r > 0 and not there.get(r) and r + 1 not in there]
        broken = [r for r, whole in there.items() if not whole]
        row.saw(True, lost=len(set(gone + broken)))


def _write_until_cut(how: str, where: Path, chance: random.Random) -> int:
    """The last round that the writer said was committed when it was cut off."""
    writer = subprocess.Popen([sys.executable, WRITER, how, str(where)], stdout=subprocess.PIPE)
    said = writer.stdout
    try:
        last = b""
        for _ in range(chance.randrange(2, 6)):
            last = said.readline()
        time.sleep(chance.uniform(0, 0.03))
        os.kill(writer.pid, signal.SIGSTOP)
        os.set_blocking(said.fileno(), False)
        while line := said.readline():
            last = line
        return int(last)
    finally:
        writer.kill()
        writer.wait()


class _mounted:
    """A disk image as a folder; needs root."""

    def __init__(self, image: Path, where: Path, options: str) -> None:
        self.image, self.where, self.options = image, where, options

    def __enter__(self) -> None:
        self.where.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", self.options, str(self.image), str(self.where)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.where)], check=True)
