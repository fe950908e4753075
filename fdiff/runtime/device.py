"""Which device a rank computes on, and how: GPU by local rank, CPU threads by cores, float32 arithmetic by request.

The list of visible GPUs is a parameter of the decisions, so that they can be tested without a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fdiff.config import RuntimeConfig
from fdiff.errors import UserError
from fdiff.runtime.launcher import Launch


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process can see; its place in the list is its CUDA index."""

    name: str
    uuid: str


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows to this process, in CUDA's order."""
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(Gpu(p.name, str(p.uuid)) for p in every)


def set_up(runtime: RuntimeConfig, launch: Launch) -> torch.device:
    """Choose this rank's device and prepare torch for it: CPU threads, current GPU, precision of float32 arithmetic.

    Raises what `choose_device` raises, and UserError if steps are to be captured on a CPU.
    """
    device = choose_device(runtime, launch)
    if device.type == "cpu" and runtime.execution == "captured":
        raise UserError("runtime.execution: 'captured' needs a GPU; use eager, compiled or auto")
    _check_threads("runtime.threads", runtime.threads or 1)
    torch.set_num_threads(runtime.threads or default_threads(runtime, launch))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    allow_tf32(runtime.precision == "tf32")
    return device


def allow_tf32(allowed: bool) -> bool:
    """Whether this process's float32 products and convolutions on a GPU may be tf32; returns what was the case."""
    before = torch.backends.cudnn.allow_tf32
    # Not the newer `fp32_precision`: once it is set, reading these two raises, which torch.compile does.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    return before


# --- GPU -----------------------------------------------------------------------------------------------------------


def choose_device(runtime: RuntimeConfig, launch: Launch, gpus: Sequence[Gpu] | None = None) -> torch.device:
    """The GPU of this rank among those visible, or the CPU.

    UserError if a GPU is asked for and there is none, or if several ranks would share one without `share_gpu`.
    Ranks to which a scheduler left fewer GPUs than there are ranks may still see the same ones: `Communicator.open`
    finds that out.
    """
    if runtime.device == "cpu":
        return torch.device("cpu")
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus and runtime.device == "cuda":
        raise UserError(f"runtime.device: 'cuda', but no GPU is visible ({_visibility(launch)}); use cpu or auto")
    if not gpus:
        return torch.device("cpu")
    return torch.device("cuda", _index(runtime, launch, len(gpus)))


def _index(runtime: RuntimeConfig, launch: Launch, gpus: int) -> int:
    if gpus >= launch.local_size:
        return launch.local_rank
    if gpus == 1 and launch.cuda_visible:  # the scheduler left each rank the one that is meant for it
        return 0
    if runtime.share_gpu:
        return launch.local_rank % gpus
    if launch.launcher == "srun" and launch.cuda_visible:  # or several, e.g. by --gpus-per-task
        return 0
    raise UserError(
        f"runtime.device: {launch.local_size} ranks on this node, but visible GPUs: {gpus} ({_visibility(launch)}); "
        "let ranks share a GPU with --runtime.share_gpu true (they then communicate over gloo), or start one rank a "
        "GPU, which then hosts several clients"
    )


def _visibility(launch: Launch) -> str:
    return "CUDA_VISIBLE_DEVICES " + ("not set" if launch.cuda_visible is None else repr(launch.cuda_visible))


# --- CPU -----------------------------------------------------------------------------------------------------------


def default_threads(runtime: RuntimeConfig, launch: Launch, environment: Mapping[str, str] = os.environ) -> int:
    """1 in ordered reduction, whose sums must not depend on the number of threads, else what OMP_NUM_THREADS says.

    Where it is not set: this rank's share of cores. Then torchrun sets it to 1 for several ranks of a node, and so a 1
    of theirs counts as not set: nobody can tell it from one of the user's own, who has `runtime.threads`. UserError if
    it is no number of threads.
    """
    if runtime.reduction == "ordered":
        return 1
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # others are of nested loops
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment and launch.local_size > 1
    if first and not (first == "1" and by_torchrun):
        if not (first.isascii() and first.isdigit() and int(first)):
            raise UserError(f"OMP_NUM_THREADS: {first!r} is not valid; set it to a whole number from 1, or unset it")
        return _check_threads("OMP_NUM_THREADS", int(first))
    return share_of_cores(len(os.sched_getaffinity(0)), len(os.sched_getaffinity(os.getppid())), launch.local_size)


def _check_threads(name: str, threads: int) -> int:
    """The number itself; UserError if it is more than makes sense here."""
    cores = os.cpu_count() or 1
    if threads > 4 * cores:
        raise UserError(f"{name}: {threads} is not valid; at most 4 for each of {cores} cores")
    return threads


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep for the next step what a step has freed; False where the C library is another.

    By itself it gives large blocks back to the system, so that each step pays anew for every page of its
    activations: a tenth to a fifth of a step's time. The process stays as large as its largest step was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def share_of_cores(own: int, of_parent: int, local_size: int) -> int:
    """The cores for one of a node's ranks, at least 1.

    `own` cores are open to this process and `of_parent` to the one that started it. Where both are the same, all the
    node's ranks share them; where the launcher (mpirun, srun) bound each rank to some, those few ranks do that were
    bound to the same ones.
    """
    sharers = min(local_size, max(1, -(-local_size * own // of_parent)))
    return max(1, own // sharers)
