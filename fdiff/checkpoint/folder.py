"""Checkpoints: one folder a round, visible only when complete.

    RUN/checkpoints/round-000015/global.h5        shared parts, layout, configuration, metrics; written by rank 0
    RUN/checkpoints/round-000015/client-0003.h5   a client's own tensors; written by the rank that hosts it

Commit: every file is written under a temporary folder, closed, synced and renamed within it. When all are there, rank 0
completes `global.h5`, which lists them with their digests, syncs the folder, and one rename makes it visible. Every
reading verifies all checksums; what a disk lost in silence is found then, and at least one older checkpoint is there.
This module knows files and folders; it neither communicates nor knows what the tensors mean. See `file`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdiff.checkpoint.file import Damaged, Examined, examine, read_file
from fdiff.errors import UserError
from fdiff.model import Slot

GLOBAL = "global.h5"
_ROUND = re.compile(r"round-(\d{6,})")
_CLIENT = re.compile(r"client-\d{4,}\.h5")


@dataclass(frozen=True)
class Generation:
    """A complete checkpoint's folder and its round."""

    path: Path
    round: int


def layout_table(layout: Sequence[Slot]) -> list[list[Any]]:
    """The canonical order of the parameters as JSON rows: name, part, offset in its part, shape."""
    return [[s.name, s.part, s.offset, list(s.shape)] for s in layout]


# --- names ---------------------------------------------------------------------------------------------------------


def root(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / "checkpoints"


def generations(run_dir: Path) -> list[Generation]:
    """The complete checkpoints of a run, oldest first; what is being written has another name."""
    parent = root(run_dir)
    paths = [p for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return sorted((Generation(p, r) for p in paths if (r := round_of(p)) is not None), key=lambda g: g.round)


def generation_name(round: int) -> str:
    """The name of a round's folder."""
    return f"round-{round:06d}"


def round_of(path: Path) -> int | None:
    """The round of a folder by its name, or None if it has another kind of name."""
    match = _ROUND.fullmatch(path.name)
    return int(match[1]) if match and path.name == generation_name(int(match[1])) else None


def client_file(index: int) -> str:
    """The name of a client's file."""
    return f"client-{index:04d}.h5"


def temporary_folder(run_dir: Path, round: int, attempt: str) -> Path:
    """Where a round's files are written before the commit; `attempt` tells it from what a killed run left."""
    return root(run_dir) / f".writing-{round:06d}-{attempt}"


def partial_folder(run_dir: Path, round: int) -> Path:
    """Where a start that was stopped leaves what its clients have done of this round."""
    return root(run_dir) / f".partial-{round:06d}"


# --- becoming visible, and going -----------------------------------------------------------------------------------


def make_visible(temporary: Path, run_dir: Path, round: int, keep: int) -> Path:
    """Make a folder whose files are all synced visible as this round's checkpoint, then drop the oldest ones.

    OSError if the round has a checkpoint already: see `set_aside`.
    """
    final = root(run_dir) / generation_name(round)
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)
    prune(run_dir, keep)
    return final


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints. Hidden first, so that half a checkpoint is never seen.

    What somebody reads stays until a later time. What was left of a round that is now complete goes too.
    """
    complete = generations(run_dir)
    for partial in root(run_dir).glob(".partial-*"):
        if complete and partial != partial_folder(run_dir, complete[-1].round + 1):
            shutil.rmtree(partial, ignore_errors=True)
    for old in complete[:-keep]:
        if (nobody_else := _lock(old.path, fcntl.LOCK_EX)) is None:
            continue
        hidden = old.path.with_name(f".old-{old.path.name}")
        os.rename(old.path, hidden)
        os.close(nobody_else)
        shutil.rmtree(hidden, ignore_errors=True)


class Hold:
    """A checkpoint that stays as long as this object does, though its run makes newer ones; see `hold`."""

    def __init__(self, descriptor: int) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)


def hold(path: Path) -> Hold | None:
    """Keep a checkpoint from being pruned by a run on this node; None if it is gone.

    Where the file system has no locks, or the run is on another node, it may go all the same.
    """
    descriptor = _lock(path, fcntl.LOCK_SH)
    return None if descriptor is None else Hold(descriptor)


def _lock(path: Path, kind: int) -> int | None:
    """An open descriptor of the folder, locked where that is possible; None if it is gone, or another has a lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        mine = True
    except OSError as error:  # of a file system without locks, if it is not that another has one
        mine = not isinstance(error, BlockingIOError)
    if mine and path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
        return descriptor
    os.close(descriptor)
    return None


def clean(run_dir: Path, last_round: int) -> list[Path]:
    """Remove what interrupted commits left, and set aside what is newer than the checkpoint that a run goes on from.

    What is kept of the next round stays. Those newer ones were damaged, or this run would go on from them. They are
    renamed and not removed: the damage may be in the reading. They may not stay, because they would count as the newest
    and soundest when old ones are pruned. Returns their new names. UserError if something that is no folder has the
    name of a round: no checkpoint could take its place.
    """
    for other in root(run_dir).iterdir():
        if round_of(other) is not None and not other.is_dir():
            raise UserError(f"{other}: is no folder, and has the name of a checkpoint; move it elsewhere")
    for rest in root(run_dir).glob(".*"):
        if rest != partial_folder(run_dir, last_round + 1):
            shutil.rmtree(rest, ignore_errors=True)
    aside = []
    for newer in (g for g in generations(run_dir) if g.round > last_round):
        aside.append(newer.path.with_name(f"damaged-{newer.path.name}-{secrets.token_hex(4)}"))
        os.rename(newer.path, aside[-1])
    return aside


def sync_folder(path: Path) -> None:
    """Have the folder's entries on the disk, where the file system knows how: CIFS, for one, does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- reading -------------------------------------------------------------------------------------------------------


def read_generation(
    path: Path, clients: Sequence[int] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[dict[str, np.ndarray]]]:
    """The arrays and header of `global.h5`, and the arrays of the given clients; Damaged if anything is amiss."""
    arrays, header = read_file(path / GLOBAL)
    return arrays, header, read_clients(path, header, clients)


def read_clients(path: Path, header: Mapping[str, Any], clients: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The arrays of the given clients, by the header of `global.h5`; Damaged if anything is amiss."""
    listed = _listed(path, header)
    states = []
    for client in clients:
        name = client_file(client)
        if name not in listed:
            raise Damaged(f"{path / GLOBAL}: does not list {name}; this client is not part of the checkpoint")
        states.append(read_file(path / name, listed[name])[0])
    return states


def inspect(path: Path) -> dict[str, Examined]:
    """Read every file of a checkpoint, by its name; a file that should not be there is a problem of the folder, "."."""
    found = {GLOBAL: examine(path / GLOBAL)}
    if found[GLOBAL].problems:
        return found
    try:
        listed = _listed(path, found[GLOBAL].header)
    except Damaged as error:
        found[GLOBAL].problems.append(str(error))
        return found
    found |= {name: examine(path / name, digest) for name, digest in listed.items()}
    strangers = sorted({f.name for f in path.iterdir()} - set(found))
    if strangers:
        found["."] = Examined(problems=[f"{path / strangers[0]}: is not listed in {GLOBAL}; move it elsewhere"])
    return found


def verify(path: Path) -> list[str]:
    """Read every file of a checkpoint; returns one line for each problem, none if it is sound."""
    return [problem for found in inspect(path).values() for problem in found.problems]


def _listed(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    """The clients' files and their digests. Damaged if a name could lead out of the folder."""
    listed = header.get("clients", {})
    if not isinstance(listed, dict) or not all(
        _CLIENT.fullmatch(name) and isinstance(digest, str) for name, digest in listed.items()
    ):
        raise Damaged(f"{path / GLOBAL}: lists files that are not those of clients; use another checkpoint")
    return listed
