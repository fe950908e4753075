"""What rank 0 alone does: the run folder, its logs, the sample grids. No collective happens here.

    RUN/config.yaml        the resolved configuration, written before training starts
    RUN/setting.json       versions, where each rank runs, images and label counts of each client
    RUN/clients.jsonl      a line per round and client
    RUN/rounds.jsonl       a line per round
    RUN/scores.jsonl       a line per scored model, written by `fdiff evaluate`
    RUN/samples/           a PNG grid per sampled round, and a .npy of images that a PNG cannot hold
    RUN/tensorboard/       the same as TensorBoard events, see `events`
    RUN/checkpoints/       see `fdiff.checkpoint`

On the other ranks a `NoFederator` takes the same calls and does nothing, so that the round loop has no rank in it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiff import __version__, checkpoint
from fdiff.config import Config
from fdiff.config_file import as_yaml
from fdiff.data import as_pictures, needs_array, save_array, save_grid
from fdiff.errors import UserError
from fdiff.federation import logs
from fdiff.federation.events import Events
from fdiff.federation.logs import Row
from fdiff.federation.progress import Advance, Forecast, line_said, progress
from fdiff.federation.run_files import read_setting

log = logging.getLogger(__name__)

LOCK = ".lock"
FRUITLESS_STARTS = ".fruitless-starts"
OWN = frozenset({"config.yaml", "setting.json", "checkpoints", *(f"{name}.jsonl" for name in logs.LOGS)})
ENOTSUPP = 524  # of the kernel's own, which the C library does not know
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP)  # Lustre and NFS, depending on how they are mounted


class Federator:
    """The run folder, which rank 0 keeps. Call `open` before the first round and `close` after the last."""

    def __init__(self, config: Config) -> None:
        self.config, self.dir = config, config.run_dir
        self.rows: dict[str, list[Row]] = {}
        """The rows of the logs so far."""
        self._events: Events | None = None
        self._lock: int | None = None
        self._left = Forecast(config.federation.rounds)

    def made_by(self, job: str | None) -> bool:
        """Whether this job made the run folder itself, before its launcher started it again: then it is to go on.

        If the folder does not say so in a way that can be read, it is somebody else's, and `open` refuses it.
        """
        try:
            return job is not None and read_setting(self.dir).get("job") == job
        except UserError as error:
            log.warning("nobody knows which job made this run: %s", error)
            return False

    def open(self, resume: bool) -> None:
        """Make the run folder; UserError if it is there and is not to be resumed, or is no run, or cannot be written.

        A resumption that finds nothing to go on from says that it is a new start.
        """
        check_folder(self.dir, resume)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.dir / LOCK)
        except BlockingIOError:
            raise UserError(f"run.dir: '{self.dir}' is in use by another job; choose another folder") from None
        except OSError as error:
            raise UserError(f"run.dir: '{self.dir}' cannot be written ({error.strerror}); choose another") from None
        if resume and not checkpoint.generations(self.dir):
            log.info("run.dir: '%s' has no checkpoint to resume from: this is a new start", self.dir)

    def begin(self, last_round: int, setting: Mapping[str, Any], saved: Mapping[str, Sequence[Row]] | None) -> None:
        """Write down configuration and setting (see `assemble`); have the logs end with the last round.

        `last_round` is the one to go on from, 0 for none; `saved` are the rows that its checkpoint holds, if it does.
        """
        if last_round < self.config.federation.rounds:  # else nothing follows that this would describe
            logs.write_atomically(self.dir / "config.yaml", as_yaml(self.config))
            versions = {"fdiff": __version__, "python": platform.python_version(), "torch": torch.__version__}
            here = {"system": platform.platform()}
            logs.write_atomically(self.dir / "setting.json", json.dumps({**versions, **here, **setting}))
        for folder in (self.dir / "samples", checkpoint.root(self.dir)):
            folder.mkdir(exist_ok=True)
        for aside in checkpoint.clean(self.dir, last_round):
            log.warning("a damaged checkpoint newer than round %d is now %s", last_round, aside)
        if mended := logs.restore_logs(self.dir, last_round, saved):
            names = ", ".join(mended)
            log.warning("%s: %s had lost rows, and is whole again up to round %d", self.dir, names, last_round)
        self.rows = {name: logs.read_jsonl(self.dir / f"{name}.jsonl") for name in logs.LOGS}
        samples = self.dir / "samples"
        for grid in [*samples.glob("round-*.png"), *samples.glob("round-*.npy")]:
            if int(grid.stem.removeprefix("round-")) > last_round:
                grid.unlink()
        self._events = Events(self.dir, self.config, last_round)

    def count_start(self, fruitful: bool) -> int:
        """Note whether this start came to anything; how many in a row now have not."""
        file = self.dir / FRUITLESS_STARTS
        try:
            before = int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = 0
        count = 0 if fruitful else before + 1
        logs.write_atomically(file, f"{count}\n")
        return count

    def announce(self, lines: Sequence[str], last_round: int) -> None:
        """Say the header of a run that goes on after this round."""
        for line in lines:
            log.info("%s", line)
        line_said()
        self._left.begin(last_round)

    def bar(self, round: int, steps: int) -> AbstractContextManager[Advance]:
        """How far this rank is with its optimizer steps of a round, to be told of each: see `progress`."""
        left = f" ({self._left.text(round - 1)} left)" if self._left.known else ""
        return progress(f"round {round}/{self.config.federation.rounds}{left}", steps, "steps", shown=True)

    def record(self, metrics: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """Append a round and its clients to the logs, and say it in one line. On the disk they are after `sync`."""
        for name, rows in (("clients", list(clients)), ("rounds", [metrics])):
            logs.append_jsonl(self.dir / f"{name}.jsonl", rows, sync=False)
            self.rows[name] += rows
        assert self._events is not None
        self._events.round(metrics, clients)
        number, rounds = metrics["round"], self.config.federation.rounds
        first, left = not self._left.known, self._left.after(number)
        log.info(
            "round %d/%d  loss %.4f  %.1f s  %.0f images/s  sent %.1f MB%s",
            number,
            rounds,
            metrics["loss"],
            sum(metrics["seconds"].values()),
            metrics["images_per_s"],
            metrics["wire_bytes"] / 1e6,
            f"  {left} left" if number < rounds else "",
        )
        if first and number < rounds:
            log.info("end: about %s, if the other rounds take as long as the first", self._left.end(number))
        line_said()

    def sync(self) -> None:
        """Have the logs on the disk: before the checkpoint of a round becomes visible its rows must be there."""
        for name in logs.LOGS:
            logs.sync_log(self.dir / f"{name}.jsonl")

    def show(self, round: int, images: Tensor | None, row_each: bool) -> None:
        """Save images (n, C, S, S), if any, as this round's grid; with `row_each` a row of each client."""
        if images is None:
            return
        columns = self.config.sample.images if row_each else math.ceil(math.sqrt(len(images)))
        limits = self.config.data.range
        if needs_array(images.shape[1], limits):
            save_array(self.grid_path(round).with_suffix(".npy"), images)
        pictures = as_pictures(images, limits)
        save_grid(self.grid_path(round), pictures, columns)
        assert self._events is not None
        self._events.images(pictures, round)

    def grid_path(self, round: int) -> Path:
        """Where a round's grid is."""
        return self.dir / "samples" / f"round-{round:06d}.png"

    def close(self) -> None:
        """Flush the events, and let others have the folder."""
        if self._events is not None:
            self._events.close()
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)


class NoFederator:
    """A federator on a rank that is not the federator."""

    config: Config
    rows: dict[str, list[Row]] = {}

    def made_by(self, job: str | None) -> bool:
        """It cannot say."""
        return False

    def open(self, resume: bool) -> None:
        """Nothing."""

    def begin(self, last_round: int, setting: Mapping[str, Any], saved: Mapping[str, Sequence[Row]] | None) -> None:
        """Nothing."""

    def announce(self, lines: Sequence[str], last_round: int) -> None:
        """Nothing."""

    def bar(self, round: int, steps: int) -> AbstractContextManager[Advance]:
        """An invisible one."""
        return progress("", steps, "steps", shown=False)

    def record(self, metrics: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def show(self, round: int, images: Tensor | None, row_each: bool) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def federator_on(config: Config, rank: int) -> Federator | NoFederator:
    """The federator on rank 0, elsewhere one that does nothing."""
    return Federator(config) if rank == 0 else NoFederator()


def check_folder(run_dir: Path, resume: bool) -> None:
    """UserError if a run cannot be in this folder: it is there, not to be resumed, or is no run."""
    try:
        str(run_dir).encode()
    except UnicodeEncodeError:  # TensorBoard, for one, could not name its files
        raise UserError(f"run.dir: '{run_dir}' is no UTF-8; name another, or set a locale that can say it") from None
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir: '{run_dir}' is a file; name a folder")
    found = [f.name for f in run_dir.iterdir()] if run_dir.exists() else []
    if resume and OWN.isdisjoint(found) and any(not name.startswith(".") for name in found):
        raise UserError(
            f"run.dir: '{run_dir}' is not a run's folder (no config.yaml), so there is nothing to resume; name a "
            "run's folder, or one that is new"
        )
    if not resume and any(name != LOCK for name in found):
        raise UserError(
            f"run.dir: '{run_dir}' exists already; choose another, or pass --resume to go on from its newest "
            "checkpoint"
        )


_locks: list[int] = []


def _leave_locks_to_parent() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks_to_parent)


def lock(path: Path) -> int:
    """Hold the file while its descriptor, which is returned, is open in this process; its children do not hold it.

    BlockingIOError if another process does.

    Some file systems have no locks; there the user must see to it, and is told so.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        log.warning("%s cannot be locked (%s); let no other job use this run folder", path, error.strerror)
    _locks.append(descriptor)
    return descriptor
