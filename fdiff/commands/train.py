"""Train the federation: alone, or as one of the ranks that torchrun, mpirun or srun started."""

from __future__ import annotations

from pathlib import Path

import torch

from fdiff import federation
from fdiff.checkpoint import generations
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.errors import shown
from fdiff.federation import Federator, images_of, methods_table, read_setting
from fdiff.runtime import heeding_signals, launcher


def run(config: Config, comm: Communicator, device: torch.device, *, resume: bool = False) -> None:
    """Train the federation.

    Args:
        resume: Go on from the newest complete checkpoint of the run folder, if it has one.
    """
    with heeding_signals(launcher.started_by()) as stop:
        config = federation.run(config, comm, device, resume, stop)
    if comm.rank != 0:
        return
    fed, folder = config.federation, config.run_dir
    print(f"\nrun folder   {shown(folder)}")
    if (done := newest_round(folder)) > fed.rounds:
        print(f"it has {done} rounds already, more than federation.rounds {fed.rounds}: nothing was trained")
    if (grid := Federator(config).grid_path(max(done, fed.rounds))).exists():
        print(f"sample grid  {shown(grid)}")
    print(f"\nwhat each method communicates in {fed.rounds} rounds with {fed.clients} clients on {comm.size} ranks:")
    print(methods_table(config, comm.size, images_of(read_setting(folder), fed.clients)))


def newest_round(folder: Path) -> int:
    """The round of a run's newest checkpoint."""
    return generations(folder)[-1].round
