"""Devices without a GPU: the visible ones are a list here. On a machine with GPUs the last tests look at a real one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from small_datasets import needs_gpu

from fdiff.comm.base import device_problem
from fdiff.config import RuntimeConfig
from fdiff.errors import UserError
from fdiff.runtime.device import Gpu, choose_device, default_threads, set_up, share_of_cores, visible_gpus
from fdiff.runtime.launcher import Launch

GPUS = [Gpu("GPU of a test", f"0000-{i}") for i in range(8)]
CPU = torch.device("cpu")
RUNTIME = RuntimeConfig()
CUDA = RuntimeConfig(device="cuda")
SHARED = RuntimeConfig(share_gpu=True)


def rank_of_four(local_rank: int, cuda_visible: str | None = None, launcher: str = "torchrun") -> Launch:
    return Launch(launcher, 4 + local_rank, 8, local_rank, 4, cuda_visible)


@pytest.mark.parametrize("launcher", ["torchrun", "openmpi", "mpich", "srun", "submitit"])
@pytest.mark.parametrize("gpus", [4, 8])
def test_a_gpu_for_each_rank_of_a_node(launcher: str, gpus: int) -> None:
    for local_rank in range(4):
        launch = rank_of_four(local_rank, launcher=launcher)
        assert choose_device(RUNTIME, launch, GPUS[:gpus]) == torch.device("cuda", local_rank)


@pytest.mark.parametrize("visible", ["3", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-8932f937"])
def test_a_scheduler_that_narrowed_to_one(visible: str) -> None:
    for local_rank in range(4):
        assert choose_device(RUNTIME, rank_of_four(local_rank, visible), GPUS[:1]) == torch.device("cuda", 0)


def test_a_scheduler_that_gives_each_rank_several() -> None:
    assert choose_device(RUNTIME, Launch("srun", 1, 2, 1, 2, "2,3"), GPUS[:2]) == torch.device("cuda", 1)


def test_a_scheduler_that_gives_each_of_four_ranks_two() -> None:
    for local_rank in range(4):
        own = f"{2 * local_rank},{2 * local_rank + 1}"
        assert choose_device(RUNTIME, rank_of_four(local_rank, own, "srun"), GPUS[:2]) == torch.device("cuda", 0)


def test_a_scheduler_that_gives_all_ranks_the_same_is_found_out_when_they_meet() -> None:
    chosen = [choose_device(RUNTIME, rank_of_four(r, "0,1", "srun"), GPUS[:2]) for r in range(4)]
    problem = device_problem([(d.type, GPUS[d.index].uuid, "node1") for d in chosen], share_gpu=False)
    assert problem is not None and "ranks 0, 1, 2, 3 on node1 have the same GPU" in problem
    assert "--runtime.share_gpu true" in problem and "hosts several clients" in problem


@pytest.mark.parametrize(("gpus", "visible"), [(1, None), (2, None), (2, "0,1"), (3, "GPU-a,GPU-b,GPU-c")])
@pytest.mark.parametrize("runtime", [RUNTIME, CUDA])
def test_fewer_gpus_than_ranks_are_refused_with_both_ways_out(
    gpus: int, visible: str | None, runtime: RuntimeConfig
) -> None:
    for local_rank in range(4):  # the ranks that would find a GPU too
        with pytest.raises(UserError) as error:
            choose_device(runtime, rank_of_four(local_rank, visible), GPUS[:gpus])
        text = str(error.value)
        assert text.startswith(f"runtime.device: 4 ranks on this node, but visible GPUs: {gpus} (CUDA_VISIBLE_DEVICES ")
        assert (repr(visible) if visible else "not set") in text
        assert "--runtime.share_gpu true" in text and "hosts several clients" in text


def test_shared_gpus_go_round_robin() -> None:
    chosen = [choose_device(SHARED, rank_of_four(r), GPUS[:3]).index for r in range(4)]
    assert chosen == [0, 1, 2, 0]
    assert choose_device(SHARED, rank_of_four(3), GPUS[:1]) == torch.device("cuda", 0)


def test_no_gpu() -> None:
    assert choose_device(RUNTIME, rank_of_four(1), []) == CPU
    with pytest.raises(UserError, match=r"^runtime.device: 'cuda', but no GPU is visible \(CUDA_VISIBLE_DEVICES ''\)"):
        choose_device(CUDA, rank_of_four(1, ""), [])


def test_cpu_if_asked() -> None:
    assert choose_device(RuntimeConfig(device="cpu"), rank_of_four(1), GPUS) == CPU


# --- threads and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "of_parent", "local_size", "share"),
    [
        (16, 16, 1, 16),  # alone
        (16, 16, 4, 4),  # torchrun: all share all
        (2, 2, 4, 1),
        (4, 16, 4, 4),  # bound to four cores of its own
        (1, 64, 2, 1),  # mpirun of two ranks binds each to a core
        (32, 64, 8, 8),  # bound to one of two sockets, with three others
        (1, 2, 4, 1),  # more ranks than cores
        (16, 4, 4, 4),  # started from a process that is bound more narrowly
    ],
)
def test_share_of_cores(own: int, of_parent: int, local_size: int, share: int) -> None:
    assert share_of_cores(own, of_parent, local_size) == share


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_threads(torch_settings: None) -> None:
    cores = len(os.sched_getaffinity(0))
    one, two = Launch("none"), Launch("torchrun", 0, 2, 0, 2)
    assert default_threads(RUNTIME, one, {}) == cores
    assert default_threads(RUNTIME, two, {}) == max(1, cores // 2)
    assert default_threads(RuntimeConfig(reduction="ordered"), one, {}) == 1
    torch.set_num_threads(1)  # as torchrun has it, by OMP_NUM_THREADS
    set_up(RuntimeConfig(device="cpu", threads=3), two)
    assert torch.get_num_threads() == 3
    set_up(RuntimeConfig(device="cpu", reduction="ordered"), one)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("launch", "environment", "threads"),
    [
        (Launch("none"), {"OMP_NUM_THREADS": "3"}, 3),
        (Launch("none"), {"OMP_NUM_THREADS": "1"}, 1),
        (Launch("none"), {"OMP_NUM_THREADS": " 2,1 "}, 2),
        (Launch("none"), {"OMP_NUM_THREADS": ""}, None),
        (Launch("openmpi", 0, 2, 0, 2), {"OMP_NUM_THREADS": "1"}, 1),
        (Launch("torchrun", 0, 2, 0, 2), {"OMP_NUM_THREADS": "1"}, 1),  # RANK and WORLD_SIZE set by hand
        (Launch("torchrun", 0, 2, 0, 2), {"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 2),
        (Launch("torchrun", 0, 2, 0, 2), {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, None),
        (Launch("torchrun", 0, 2, 0, 1), {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 1),
    ],
)
def test_threads_of_the_environment(launch: Launch, environment: dict[str, str], threads: int | None) -> None:
    """None: the share of the cores, as where it is not set."""
    found = default_threads(RUNTIME, launch, environment)
    assert found == (default_threads(RUNTIME, launch, {}) if threads is None else threads)
    assert default_threads(RuntimeConfig(reduction="ordered"), launch, environment) == 1


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "²", "99999999"])
def test_no_number_of_threads(text: str) -> None:
    with pytest.raises(UserError, match="OMP_NUM_THREADS: .* is not valid"):
        default_threads(RUNTIME, Launch("none"), {"OMP_NUM_THREADS": text})


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
def test_tf32_only_if_asked(precision: str, torch_settings: None) -> None:
    for before in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
        set_up(RuntimeConfig(device="cpu", precision=precision), Launch("none"))
        allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        assert allowed == {precision == "tf32"}
        assert torch.backends.cudnn.conv.fp32_precision in ({"tf32"} if precision == "tf32" else {"ieee", "none"})


# --- a real GPU ------------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_real_gpu(torch_settings: None) -> None:
    gpus = visible_gpus()
    assert len(gpus) == torch.cuda.device_count() and all(g.name and g.uuid for g in gpus)
    device = set_up(CUDA, Launch("none"))
    assert device == torch.device("cuda", 0) and torch.cuda.current_device() == 0


@needs_gpu
def test_more_ranks_than_real_gpus() -> None:
    ranks = torch.cuda.device_count() + 1
    with pytest.raises(UserError, match="--runtime.share_gpu true"):
        choose_device(RUNTIME, Launch("torchrun", 0, ranks, 0, ranks))
