"""How much memory a rank may still take: what is free on the node, and what its cgroups and Slurm leave of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

MEMINFO, OWN_CGROUPS, MOUNTS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/proc/self/mounts")
OWN_PAGES = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, or on the host: available without swapping, and within every limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_left_by_cgroups(), *_left_by_slurm()]))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: in tensors on a CUDA device, or of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def killed_for_memory() -> int:
    """How many processes of this one's cgroup the kernel has killed for want of memory; 0 where it does not say."""
    files = (folder / name for folder in _cgroups() for name in ("memory.events", "memory.oom_control"))  # v2, v1
    return next((table["oom_kill"] for file in files if "oom_kill" in (table := _table(file))), 0)


def _left_by_cgroups() -> Iterator[int]:
    for folder in _cgroups():
        names = ("memory.max", "memory.current", "inactive_file")
        if not (folder / names[0]).exists():
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is not None and used is not None:
            yield limit - used + _table(folder / "memory.stat").get(names[2], 0)  # a cache that would give way


def _left_by_slurm(environment: Mapping[str, str] = os.environ) -> Iterator[int]:
    """Slurm's limit for this job on a node, which it may enforce by other means than cgroups."""
    per_node, per_cpu = environment.get("SLURM_MEM_PER_NODE", ""), environment.get("SLURM_MEM_PER_CPU", "")
    cpus = environment.get("SLURM_CPUS_ON_NODE", "")
    own = int(OWN_PAGES.read_text().split()[1]) * PAGE
    if per_node.isdigit() and int(per_node):  # 0 is all of the node's
        yield int(per_node) * 2**20 - own
    elif per_cpu.isdigit() and cpus.isdigit():
        yield int(per_cpu) * int(cpus) * 2**20 - own


def _cgroups() -> Iterator[Path]:
    """The folders of this process's memory cgroup and of all above it, from the lowest up, as far as they show here."""
    mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        kind = "cgroup" if "memory" in controllers.split(",") else "cgroup2" if not controllers else None
        for _, at, file_system, options, *_ in mounts:
            if file_system == kind and (kind == "cgroup2" or "memory" in options.split(",")):
                folder, root = Path(at + path), Path(at)
                yield from (f for f in (folder, *folder.parents) if f.is_relative_to(root) and f.is_dir())


def _number(file: Path) -> int | None:
    """A file's number; None for "max", or where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _table(file: Path) -> dict[str, int]:
    """A file of names and numbers; nothing where it cannot be read."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
