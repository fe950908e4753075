"""Communicators: how ranks sum tensors, vote, and notice that one is lost.

Open `base.py` first: the protocol that all of them follow. `collectives.py` says which sums are the library's own
all-reduce, and which go round the ring of `schedule.py`.
The only room that imports torch.distributed or mpi4py. It knows nothing of models and clients.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fdiff.comm.available import transports
from fdiff.comm.base import (
    Communicator,
    Ledger,
    LostRanks,
    NoRendezvous,
    Stranger,
    Sum,
    agree,
    exchange_json,
    gather,
    pass_on,
)
from fdiff.comm.collectives import Collectives
from fdiff.comm.mpi_library import STARTERS
from fdiff.comm.schedule import PHASES, loads
from fdiff.comm.solo import SoloCommunicator
from fdiff.config import RuntimeConfig
from fdiff.errors import UserError
from fdiff.runtime import Launch, launcher


def connect(runtime: RuntimeConfig, launch: Launch, folder: Path | None = None) -> Communicator:
    """Join the other ranks, for control only; `Communicator.open` makes it ready for payload.

    Where the launcher does not say which job this is, the folder that the job works on does; None: it is not known.
    UserError if the launcher and `runtime.comm` do not fit together, or if other ranks are another job's.
    """
    kind = runtime.comm
    if kind == "auto":
        kind = {"none": "none", "openmpi": "mpi", "mpich": "mpi"}.get(launch.launcher, "torch")
    if kind == "none":
        if launch.size > 1:
            raise UserError(
                f"runtime.comm: 'none' is a world of one, but {launch.launcher} started {launch.size} ranks; "
                "use auto, torch or mpi"
            )
        return SoloCommunicator()
    launcher.stay_on_loopback(launch)
    if kind == "mpi":
        from fdiff.comm.mpi import MpiCommunicator

        return MpiCommunicator(launch, runtime.timeout_s, runtime.partial_sums)
    return _connect_torch(runtime, launch, folder)


def _connect_torch(runtime: RuntimeConfig, launch: Launch, folder: Path | None) -> Communicator:
    from fdiff.comm import torch_dist

    place = launcher.rendezvous(launch)
    if place is None and launch.launcher == "none":
        raise UserError("runtime.comm: 'torch' needs a launcher; start the job with torchrun, mpirun or srun")
    if place is None:
        from fdiff.comm.mpi import agree_on_rendezvous

        place = agree_on_rendezvous(launch, runtime.timeout_s)
    if place.job is None and folder is not None:
        place = replace(place, job=f"the job of {folder.absolute()}")
    met = torch_dist.meet_at(place, launch.rank, launch.size, runtime.timeout_s)
    outlives = met.name if place.outlives_ranks else None
    served_by = f"torchrun's agent at {place.address}:{place.port}" if place.outlives_ranks else None
    return torch_dist.TorchCommunicator(
        met.store, launch.rank, launch.size, runtime.timeout_s, runtime.partial_sums, outlives, served_by
    )
