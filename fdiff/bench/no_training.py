"""Federations whose clients do not train: what is left of a round is what the measurements are about."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config
from fdiff.federation import Client, Federation, Report
from fdiff.runtime import Stop

MANY = 10**6  # rounds that no measurement reaches


def quiet(config: Config, clients: int, **run: Any) -> Config:
    """The configuration with so many clients of one embedded image each, no sample grids and no commits but `run`'s."""
    return replace(
        config,
        federation=replace(config.federation, clients=clients, rounds=MANY, local_epochs=1),
        data=replace(config.data, dataset="embedded", root=None, partition="iid", limit=clients),
        sample=replace(config.sample, every=0),
        run=replace(config.run, **{"checkpoint_every": MANY, **run}),
    )


@contextmanager
def federation(
    config: Config, comm: Communicator, device: torch.device, trains: bool = False, place: Any = None
) -> Iterator[Federation]:
    """A started federation in a folder that is removed afterwards; its clients report at once unless it `trains`.

    `place` says on which rank they are, if not as usual.
    """
    with scratch(comm, config.run_dir.parent) as folder:
        config = replace(config, run=replace(config.run, dir=str(folder / "run")))
        idle = Federation(config, comm, device, Stop())
        idle.place = place or idle.place
        before = logging.root.manager.disable
        logging.disable(logging.INFO)  # its line a round is nobody's business here
        try:
            idle.start(resume=False)
            trainer: Any = idle.rank.host.trainer
            if not trains:
                trainer.prepare, trainer.train = lambda client, round: None, lambda client, round, tick: report(client)
            yield idle
        finally:
            idle.close()
            logging.disable(before)


def report(client: Client) -> Report:
    """What a client says that has not trained."""
    return Report(client.index, (1.0,), len(client.shard), 1.0)


@contextmanager
def scratch(comm: Communicator, beside: Path) -> Iterator[Path]:
    """A folder for all ranks on the file system where runs go, removed at the end."""
    if comm.rank == 0:
        beside.mkdir(parents=True, exist_ok=True)
    mine = tempfile.mkdtemp(prefix=".bench-", dir=beside) if comm.rank == 0 else ""
    folder = Path(exchange_json(comm, mine)[0])
    try:
        yield folder
    finally:
        comm.exchange(b"")
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
