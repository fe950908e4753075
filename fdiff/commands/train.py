"""Train the federation: alone, or as one of the ranks that torchrun, mpirun or srun started."""

from __future__ import annotations

import torch

from fdiff import federation
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.federation import Federator, methods_table
from fdiff.runtime import heeding_signals


def run(config: Config, comm: Communicator, device: torch.device, *, resume: bool = False) -> None:
    """Train the federation.

    Args:
        resume: Go on from the newest complete checkpoint of the run folder, if it has one.
    """
    with heeding_signals() as stop:
        folder = federation.run(config, comm, device, resume, stop)
    if comm.rank != 0:
        return
    fed = config.federation
    print(f"\nrun folder   {folder}")
    if config.sample.every:
        print(f"sample grid  {Federator(config).grid_path(fed.rounds)}")
    print(f"\nwhat each method communicates in {fed.rounds} rounds with {fed.clients} clients on {comm.size} ranks:")
    print(methods_table(config, comm.size))
