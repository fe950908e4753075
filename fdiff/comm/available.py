"""What this installation can communicate with, found out without communicating."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fdiff.comm import mpi_library
from fdiff.errors import UserError


@dataclass(frozen=True)
class Transports:
    """Versions, None where there is none; `mpi_problem` says why there is no MPI."""

    gloo: bool
    nccl: str | None
    mpi: str | None
    mpi_problem: str
    mpi_takes_device_pointers: bool | None  # None: not known before MPI has been started


def transports() -> Transports:
    """Loads the MPI library, but does not start it: outside of mpirun some end the process that does."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    try:
        MPI = mpi_library.load()
    except UserError as error:
        return Transports(dist.is_gloo_available(), nccl, None, str(error), None)
    up = MPI.Is_initialized() and not MPI.Is_finalized()
    aware = mpi_library.takes_device_pointers(MPI) if up else None
    return Transports(dist.is_gloo_available(), nccl, mpi_library.library_name(MPI), "", aware)
