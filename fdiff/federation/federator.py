"""What rank 0 alone does: the run folder, its logs, the sample grids. No collective happens here.

    RUN/config.yaml        the resolved configuration, written before training starts
    RUN/setting.json       versions, where each rank runs, images and label counts of each client
    RUN/clients.jsonl      a line per round and client
    RUN/rounds.jsonl       a line per round
    RUN/scores.jsonl       a line per scored model, written by `fdiff evaluate`
    RUN/samples/           a PNG grid per sampled round
    RUN/tensorboard/       the same curves as TensorBoard events
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
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from fdiff import __version__, checkpoint
from fdiff.config import Config, to_dict
from fdiff.data import save_grid
from fdiff.errors import UserError, one_line
from fdiff.runtime import launcher

log = logging.getLogger(__name__)

LOCK = ".lock"
LOGS = ("rounds.jsonl", "clients.jsonl")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Lustre and NFS, depending on how they are mounted


class Federator:
    """The run folder, which rank 0 keeps. Call `open` before the first round and `close` after the last."""

    def __init__(self, config: Config) -> None:
        self.config, self.dir = config, config.run_dir
        self._events: Any = None

    def was_started_again(self) -> bool:
        """Whether this job made the run folder itself, before its launcher started it again: then it is to go on.

        If the folder does not say so in a way that can be read, it is somebody else's, and `open` refuses it.
        """
        file = self.dir / "setting.json"
        if not launcher.restarts() or not file.exists():
            return False
        try:
            setting = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s), so nobody knows which job made this run", file, one_line(error))
            return False
        return isinstance(setting, dict) and setting.get("job") == launcher.job_name()

    def open(self, resume: bool) -> None:
        """Make the run folder; UserError if it exists and is not to be resumed, or cannot be written."""
        if self.dir.exists() and not self.dir.is_dir():
            raise UserError(f"run.dir: '{self.dir}' is a file; name a folder")
        if not resume and self.dir.exists() and any(f.name != LOCK for f in self.dir.iterdir()):
            raise UserError(
                f"run.dir: '{self.dir}' exists already; choose another, or pass --resume to go on from its newest "
                "checkpoint"
            )
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.dir / LOCK)
        except BlockingIOError:
            raise UserError(f"run.dir: '{self.dir}' is in use by another job; choose another folder") from None
        except OSError as error:
            raise UserError(f"run.dir: '{self.dir}' cannot be written ({error.strerror}); choose another") from None

    def begin(self, last_round: int, setting: Mapping[str, Any]) -> None:
        """Write down configuration and setting (see `assemble`); forget what the logs say of rounds after the last one.

        `last_round` is the one to go on from, 0 for none.
        """
        write_atomically(self.dir / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
        versions = {"fdiff": __version__, "python": platform.python_version(), "torch": torch.__version__}
        here = {"system": platform.platform(), "job": launcher.job_name()}
        write_atomically(self.dir / "setting.json", json.dumps({**versions, **here, **setting}))
        for folder in (self.dir / "samples", checkpoint.root(self.dir)):
            folder.mkdir(exist_ok=True)
        for aside in checkpoint.clean(self.dir, last_round):
            log.warning("a damaged checkpoint newer than round %d is now %s", last_round, aside)
        for name in (*LOGS, "scores.jsonl"):
            kept = [row for row in read_jsonl(self.dir / name) if row["round"] <= last_round]
            write_atomically(self.dir / name, "".join(json.dumps(row) + "\n" for row in kept))
        for grid in (self.dir / "samples").glob("round-*.png"):
            if int(grid.stem.removeprefix("round-")) > last_round:
                grid.unlink()
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

        self._events = SummaryWriter(str(self.dir / "tensorboard"), purge_step=last_round + 1)

    def bar(self, round: int, steps: int) -> tqdm:
        """A progress bar over this rank's optimizer steps of a round, where a person watches."""
        title = f"round {round}/{self.config.federation.rounds}"
        return tqdm(total=steps, desc=title, unit="step", leave=False, disable=None)

    def record(self, metrics: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """Append a round and its clients to the logs, and say it in one line. On the disk they are after `sync`."""
        append_jsonl(self.dir / "clients.jsonl", clients, sync=False)
        append_jsonl(self.dir / "rounds.jsonl", [metrics], sync=False)
        for name in ("loss", "images_per_s", "wire_bytes", "communicated_parameters"):
            self._events.add_scalar(f"round/{name}", metrics[name], metrics["round"])
        for client in clients:
            self._events.add_scalar(f"client-{client['client']:04d}/loss", client["loss"], metrics["round"])
        log.info(
            "round %d/%d  loss %.4f  %.1f s  %.0f images/s  sent %.1f MB",
            metrics["round"],
            self.config.federation.rounds,
            metrics["loss"],
            sum(metrics["seconds"].values()),
            metrics["images_per_s"],
            metrics["wire_bytes"] / 1e6,
        )

    def sync(self) -> None:
        """Have the logs on the disk: before the checkpoint of a round becomes visible its rows must be there."""
        for name in LOGS:
            with _appending(self.dir / name) as file:
                os.fsync(file.fileno())

    def show(self, round: int, images: Tensor | None, row_each: bool) -> None:
        """Save uint8 images (n, C, S, S), if any, as this round's grid; with `row_each` a row of each client."""
        if images is None:
            return
        columns = self.config.sample.images if row_each else math.ceil(math.sqrt(len(images)))
        save_grid(self.grid_path(round), images, columns)
        self._events.add_images("samples", images, round)

    def grid_path(self, round: int) -> Path:
        """Where a round's grid is."""
        return self.dir / "samples" / f"round-{round:06d}.png"

    def close(self) -> None:
        """Flush the events."""
        if self._events is not None:
            self._events.close()


class NoFederator:
    """A federator on a rank that is not the federator."""

    def was_started_again(self) -> bool:
        """It cannot say."""
        return False

    def open(self, resume: bool) -> None:
        """Nothing."""

    def begin(self, last_round: int, setting: Mapping[str, Any]) -> None:
        """Nothing."""

    def bar(self, round: int, steps: int) -> tqdm:
        """An invisible one."""
        return tqdm(disable=True)

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


def lock(path: Path) -> int:
    """Hold the file for as long as this process lives; BlockingIOError if another process does.

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
    return descriptor


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; none if it does not exist. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]], sync: bool = True) -> None:
    """Append one line a row; with `sync` they are on the disk on return. OSError if the file is a link elsewhere."""
    with _appending(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _appending(path: Path) -> TextIO:
    return open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a", encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one step; on return it is on the disk. A link is replaced, not followed."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    checkpoint.sync_folder(path.parent)
