"""Damaged, mangled and malformed files: found out, or without effect, and never loaded as something else."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from faults.ledger import Row
from faults.processes import Job
from faults.runs import rounds_there, train
from fdiff import checkpoint, snapshot
from fdiff import config as cfg
from fdiff.arrayfile import Damaged, read_file
from fdiff.errors import UserError

KINDS = ("truncated", "zero length", "bit flipped", "file missing", "dataset missing", "shape", "dtype", "version")
STARTS = 4  # how many of the damaged runs are also taken up by a job


def a_run(folder: Path, method: str = "udec", rounds: int = 2) -> Path:
    """A finished run to damage copies of."""
    job = Job(train(f"sound-{method}", method, rounds, "--optim.ema", 0.9, "--run.keep_checkpoints", 99), 1, folder)
    assert job.wait(120) and job.statuses() == [0], job.said()
    return folder / f"sound-{method}"


def files(count: int, folder: Path, seed: int) -> Row:
    """The newest checkpoint damaged in one of many ways: it is reported, and the one before it is used."""
    row, sound = Row("damaged checkpoint"), a_run(folder)
    for i in range(count):
        chance, run = random.Random(seed + i), folder / "run"
        shutil.copytree(sound, run)
        newest = checkpoint.generations(run)[-1].path
        file = chance.choice(sorted(newest.iterdir()))
        content = read_file(file)
        kind = KINDS[i % len(KINDS)]
        harm(file, kind, chance)
        found = snapshot.newest_sound(run)
        detected = found is not None and found.round == 1
        silent = _loads_otherwise(file, content)
        if kind == "bit flipped" and not detected and not silent:
            detected = True  # where no data is: it loads as it was written
        if i % (count // min(count, STARTS)) == 0:
            detected = detected and _is_taken_up(folder)
        if not detected:
            row.notes.append(f"{i} {kind} of {file.name}")
        row.saw(detected, silent=silent)
        shutil.rmtree(run)
    return row


def harm(file: Path, kind: str, chance: random.Random) -> None:
    """Damage a file of a checkpoint."""
    size = file.stat().st_size
    if kind == "truncated":
        os.truncate(file, chance.randrange(1, size))
    elif kind == "zero length":
        os.truncate(file, 0)
    elif kind == "file missing":
        file.unlink()
    elif kind == "bit flipped":
        content = bytearray(file.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        _harm_dataset(file, kind, chance)


def _harm_dataset(file: Path, kind: str, chance: random.Random) -> None:
    with h5py.File(file, "r+") as opened:
        names: list[str] = []
        opened.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = "header" if kind == "version" else chance.choice(sorted(set(names) - {"manifest"}))
        array = opened[name][()]
        del opened[name]
        if kind == "version":
            opened[name] = np.frombuffer(array.tobytes().replace(b'"version": 1', b'"version": 2'), np.uint8)
        elif kind == "shape":
            opened[name] = np.concatenate([array.reshape(-1), array.reshape(-1)[:1]])
        elif kind == "dtype":
            opened[name] = array.astype(np.float16)


def _loads_otherwise(file: Path, content: tuple[dict[str, np.ndarray], dict]) -> bool:
    try:
        arrays, header = read_file(file)
    except Damaged:
        return False
    same = arrays.keys() == content[0].keys() and all(np.array_equal(arrays[n], content[0][n]) for n in arrays)
    return not (same and header == content[1])


def _is_taken_up(folder: Path) -> bool:
    job = Job(train("run", "udec", 3, "--optim.ema", 0.9, "--run.keep_checkpoints", 99, resume=True), 1, folder)
    return job.wait(120) and job.statuses() == [0] and rounds_there(folder / "run") == [1, 2, 3]


# --- fuzzing -------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3)
)
FIELDS = ["method", *(f"{g}.{f}" for g, c in cfg.GROUPS.items() for f in c.__dataclass_fields__), "more", "run.more"]


def configurations(count: int, folder: Path, seed: int) -> Row:
    """Configuration files with fields of any type and value, or that are not YAML: refused in one line, or valid."""
    row = Row("malformed configuration (fuzzed)")

    @_fuzzed(count, seed)
    @given(
        st.one_of(
            st.dictionaries(st.sampled_from(FIELDS), SCALARS, min_size=1, max_size=4).map(_nested_yaml),
            st.binary(max_size=60),
        )
    )
    def one(text: bytes) -> None:
        file = folder / "fuzzed.yaml"
        file.write_bytes(text)
        try:
            from fdiff.flags import parse

            request = parse(["plan", "--config", str(file)])
            good = isinstance(request.arguments["config"], cfg.Config)
        except UserError as error:
            good = "\n" not in str(error)
        except SystemExit:
            good = False
        except Exception as error:
            good = False
            row.notes.append(f"{text!r}: {type(error).__name__}: {error}")
        row.saw(good)

    one()
    return row


def _nested_yaml(flat: dict) -> bytes:
    nested: dict = {}
    for name, value in flat.items():
        group, _, leaf = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    return yaml.safe_dump(nested).encode()


def checkpoints(count: int, folder: Path, seed: int) -> Row:
    """Checkpoint files with pieces overwritten, removed and repeated: refused, or as they were written."""
    row, sound = Row("mangled checkpoint (fuzzed)"), a_run(folder)
    file = checkpoint.generations(sound)[-1].path / "global.h5"
    whole, content, mangled = file.read_bytes(), read_file(file), folder / "mangled.h5"

    @_fuzzed(count, seed)
    @given(st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 64), st.binary(max_size=64)), min_size=1))
    def one(edits: list[tuple[int, int, bytes]]) -> None:
        data = bytearray(whole)
        for start, length, junk in edits:
            data[start : start + length] = junk
        mangled.write_bytes(data)
        row.saw(True, silent=_loads_otherwise(mangled, content))

    one()
    return row


def _fuzzed(count: int, seed: int):
    from hypothesis import seed as seeded

    quiet = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seeded(seed)(quiet(test))


# --- power cuts ----------------------------------------------------------------------------------------------------

WRITER = Path(__file__).with_name("writer.py")


def power_cuts(count: int, folder: Path, seed: int) -> Row:
    """The power fails while a run commits: what the disk then holds, its journal replayed, is enough."""
    return _cuts(Row("power cut during a commit"), "sound", count, folder, seed)


def careless(count: int, folder: Path, seed: int) -> Row:
    """The control: a writer that overwrites in place and syncs nothing, under the same power cuts."""
    return _cuts(Row("control: in place, no sync", control=True), "careless", count, folder, seed)


def _cuts(row: Row, how: str, count: int, folder: Path, seed: int) -> Row:
    for i in range(count):
        disk, mounted = folder / f"{how}.img", folder / f"{how}-{i}"
        subprocess.run(["truncate", "--size", "16M", str(disk)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
        with _mounted(disk, mounted, "loop,commit=300"):
            committed = _write_until_cut(how, mounted, random.Random(seed + i))
            shutil.copyfile(disk, cut := folder / "cut.img")
        with _mounted(cut, mounted, "loop"):
            there = {g.round: not checkpoint.verify(g.path) for g in checkpoint.generations(mounted)}
        gone = [r for r in (committed - 1, committed) if r > 0 and not there.get(r) and r + 1 not in there]
        broken = [r for r, whole in there.items() if not whole]
        row.saw(True, lost=len(set(gone + broken)))
    return row


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

