"""What a training would refuse, found out without one: nothing is written, and nothing kept in memory."""

from __future__ import annotations

import fcntl
import os

import torch

from fdiff import checkpoint
from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation import snapshot
from fdiff.federation.assemble import find_clients, initial_weights
from fdiff.federation.federator import LOCK, check_folder
from fdiff.federation.forecast import idle_note
from fdiff.federation.voting import together


def rehearse(config: Config, comm: Communicator, device: torch.device, resume: bool) -> list[str]:
    """Go as far as `federation.run` goes before it takes memory; lines that are good to know before it starts.

    Every rank calls it. UserError, the same on all, as the training would raise it.
    """
    together(comm, lambda: _check_folder(config, resume) if comm.rank == 0 else None)
    opened, split, placement = find_clients(config, comm, device)
    initial_weights(opened.config, comm, resume)
    sizes = [len(source) for source in opened.sources] if split is None else [len(rows) for rows in split]
    if split is None:
        sizes = [size for of_rank in exchange_json(comm, sizes) for size in of_rank]
    images = dict(enumerate(sizes))

    def compare() -> None:
        if newest := snapshot.newest_sound(config.run_dir):
            _, header, _ = checkpoint.read_generation(newest.path)
            snapshot.check_same(newest.path, header, opened.config, images, opened.fingerprints)

    if resume:
        together(comm, lambda: compare() if comm.rank == 0 else None)
    return [*opened.notes, *filter(None, [idle_note(config, placement, images)])]


def _check_folder(config: Config, resume: bool) -> None:
    """UserError if the run folder is not one to begin or to go on in, or is another job's just now."""
    check_folder(config.run_dir, resume)
    if not (file := config.run_dir / LOCK).exists():
        return
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run.dir: '{config.run_dir}' is in use by another job; choose another folder") from None
    except OSError:
        pass  # a file system without locks, of which a training warns
    finally:
        os.close(descriptor)
