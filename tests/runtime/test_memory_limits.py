"""What is free: the node's memory, within the limits of cgroups and of Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fdiff.runtime import memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def node(tmp_path: Path, monkeypatch) -> Path:
    """A node with 1,000 MiB available whose cgroups are in a folder; this process is in job/step of both versions."""
    for version in ("v1", "v2"):
        (tmp_path / version / "job" / "step").mkdir(parents=True)
    files = {
        "MEMINFO": f"MemTotal: 2 kB\nMemAvailable: {1000 * 1024} kB\n",
        "OWN_CGROUPS": "4:memory:/job/step\n3:cpuset:/\n0::/job/step\n",
        "MOUNTS": f"cgroup {tmp_path}/v1 cgroup rw,relatime,memory 0 0\ncgroup2 {tmp_path}/v2 cgroup2 rw 0 0\n",
        "OWN_PAGES": f"9 {10 * MIB // memory.PAGE} 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, name, tmp_path / name)
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_without_limits_it_is_what_the_kernel_says(node: Path) -> None:
    write(node / "v2" / "job", memory_max="max", memory_current=5)
    write(node / "v1" / "job", memory_limit_in_bytes=2**63 - 4096, memory_usage_in_bytes=5)
    assert memory.free_memory(CPU) == 1000 * MIB


@pytest.mark.parametrize("at", ["job", "job/step"])
def test_a_cgroup_of_version_2_and_those_above_it_limit_it(node: Path, at: str) -> None:
    write(node / "v2" / at, memory_max=300 * MIB, memory_current=100 * MIB, memory_stat=f"inactive_file {7 * MIB}")
    assert memory.free_memory(CPU) == 207 * MIB


def test_a_cgroup_of_version_1_limits_it(node: Path) -> None:
    write(node / "v1" / "job", memory_limit_in_bytes=300 * MIB, memory_usage_in_bytes=100 * MIB)
    write(node / "v1" / "job", memory_stat=f"cache 5\ntotal_inactive_file {7 * MIB}")
    assert memory.free_memory(CPU) == 207 * MIB


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({"SLURM_MEM_PER_NODE": "500"}, 490),
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 390),
        ({"SLURM_MEM_PER_NODE": "0"}, 1000),
    ],
)
def test_slurms_limit_counts_too(node: Path, monkeypatch, limits: dict[str, str], free: int) -> None:
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    assert memory.free_memory(CPU) == free * MIB


def test_kills_for_want_of_memory_are_counted(node: Path) -> None:
    assert memory.killed_for_memory() == 0
    write(node / "v2" / "job" / "step", memory_events="oom 3\noom_kill 2")
    assert memory.killed_for_memory() == 2
    write(node / "v1" / "job" / "step", memory_oom_control="oom_kill_disable 0\noom_kill 5")
    assert memory.killed_for_memory() == 5
