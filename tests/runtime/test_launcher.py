"""The launcher's table with plain dicts: what each launcher really sets, nested launchers, contradictions."""

from __future__ import annotations

import pytest

from fdiff.errors import UserError
from fdiff.runtime.launcher import Launch, Rendezvous, cray_gpu_support, detect, job_name, rendezvous, restarts

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4", "PMI_FD": "9"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
BATCH_SHELL = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "0",
}
# mpirun in a batch job starts its daemons with srun, one a node, and the ranks inherit what srun told them
DAEMONS_STEP = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
SUBMITIT_LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "812",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NODEID": "0",
    "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
}
IN_TORCHRUN, IN_OPENMPI = Launch("torchrun", 5, 8, 1, 4), Launch("openmpi", 3, 4, 1, 2)
IN_MPICH, IN_SRUN = Launch("mpich", 3, 4, 3, 4), Launch("srun", 2, 3, 0, 1)
NONE = Launch("none", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, NONE),
        (TORCHRUN, IN_TORCHRUN),
        (OPENMPI, IN_OPENMPI),
        (MPICH, IN_MPICH),
        (SRUN, IN_SRUN),
        (SRUN | {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": "/x"}, IN_SRUN),  # submitit on Slurm uses srun
        (SUBMITIT_LOCAL, Launch("submitit", 1, 2, 1, 2)),
        (SUBMITIT_LOCAL | BATCH_SHELL, Launch("submitit", 1, 2, 1, 2)),
        (BATCH_SHELL, NONE),
        (BATCH_SHELL | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, NONE),
        (BATCH_SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, NONE),  # salloc's own shell
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "11"}, IN_SRUN),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "2"}, IN_SRUN),  # srun --mpi=pmix
        (BATCH_SHELL | OPENMPI, IN_OPENMPI),
        (DAEMONS_STEP | OPENMPI, IN_OPENMPI),
        (DAEMONS_STEP | MPICH, IN_MPICH),
        (SRUN | TORCHRUN, IN_TORCHRUN),  # srun torchrun, once a node
        (OPENMPI | TORCHRUN, IN_TORCHRUN),
        ({"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_EXECUTOR": "local"}, NONE),  # submitit's controller
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("torchrun", 0, 1, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, NONE),
    ],
)
def test_detect(environment: dict[str, str], expected: Launch) -> None:
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("tasks", "node", "local_size"), [("2(x3),1", "2", 2), ("2(x3),1", "3", 1), ("1,3(x2)", "1", 3), ("4", "0", 4)]
)
def test_slurm_lists_the_tasks_of_all_nodes(tasks: str, node: str, local_size: int) -> None:
    step = SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_STEP_NUM_TASKS": "7"}
    assert detect(step).local_size == local_size


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            TORCHRUN | {"RANK": "8"},
            "RANK: rank 8 of 8, on its node 1 of 4, contradicts itself; start the job with torchrun",
        ),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "OMPI_COMM_WORLD_RANK: rank 3 of 4, on its node 2 of 2"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, "OMPI_COMM_WORLD_RANK: rank 3 of 4, on its node 1 of 5"),
        (TORCHRUN | {"RANK": "one"}, "RANK: 'one' is not valid; the launcher must set it to a whole number"),
        (MPICH | {"PMI_SIZE": "-4"}, "PMI_SIZE: '-4' is not valid"),
        ({"RANK": "1"}, "RANK: set without WORLD_SIZE; unset it, or start the job with torchrun"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE: set without RANK; unset it"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK: set without OMPI_COMM_WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK: not set, but RANK says rank 1 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_WORLD_SIZE: not set, but RANK says rank 1 of 2"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID: not set, but PMI_RANK says rank 1 of 2"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_STEP_TASKS_PER_NODE: '2,1' does not say how many tasks node 2 has"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE: 'two' does not say"),
        # RANK exported by hand, then mpirun or srun: every rank would be the same one
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "1"},
            "RANK, WORLD_SIZE: rank 0 of 1 contradicts OMPI_COMM_WORLD_RANK: rank 3 of 4",
        ),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"},
            "RANK, WORLD_SIZE: rank 0 of 3 contradicts SLURM_PROCID: rank 2 of 3; unset RANK and WORLD_SIZE",
        ),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as error:
        detect(environment)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "by_hand",
    [
        {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},  # as submitit's helper exports
        {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},  # several ranks for each task
    ],
)
def test_ranks_set_by_hand_that_fit_the_launcher_around_them(by_hand: dict[str, str]) -> None:
    launch = detect(SRUN | by_hand)
    assert (launch.launcher, launch.rank, launch.size) == ("torchrun", int(by_hand["RANK"]), int(by_hand["WORLD_SIZE"]))


def test_one_node() -> None:
    assert detect(MPICH).one_node and detect({}).one_node
    assert not detect(OPENMPI).one_node and not detect(SRUN).one_node


def test_visible_devices_are_kept() -> None:
    assert detect(SRUN).cuda_visible is None
    assert detect(SRUN | {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}).cuda_visible == "GPU-8932f937"
    assert detect({"CUDA_VISIBLE_DEVICES": ""}).cuda_visible == ""


# --- rendezvous ------------------------------------------------------------------------------------------------------


def test_torchrun_announces_its_own_meeting_place() -> None:
    assert rendezvous(IN_TORCHRUN, TORCHRUN) == Rendezvous("node1", 29500, False, None, True)
    named = TORCHRUN | {"TORCHELASTIC_RUN_ID": "42"}
    assert rendezvous(IN_TORCHRUN, named) == Rendezvous("node1", 29500, False, "torchrun's job 42", True)
    static = {k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_USE_AGENT_STORE"}
    assert rendezvous(Launch("openmpi", 0, 2, 0, 2), {"MASTER_PORT": "tcp://10.0.0.1:80"}) is None  # Kubernetes' own
    with pytest.raises(UserError, match="MASTER_PORT: 'tcp://10.0.0.1:80' is not valid"):
        rendezvous(IN_TORCHRUN, TORCHRUN | {"MASTER_PORT": "tcp://10.0.0.1:80"})
    place = rendezvous(Launch("torchrun", 0, 8, 0, 4), static)
    assert place is not None and place.serve  # rank 0 does, since no agent does


def test_on_one_node_ranks_meet_on_the_loopback_address_by_whatever_name_it_was_given() -> None:
    """TCPStore binds to one interface only where it is told 127.0.0.1; the agent's own store is not ours to bind."""
    given = {"MASTER_PORT": "29500"}
    for name in ("localhost", "node1", "127.0.1.1"):
        place = rendezvous(Launch("torchrun", 1, 4, 1, 4), given | {"MASTER_ADDR": name})
        assert place is not None and place.address == "127.0.0.1"
        place = rendezvous(Launch("torchrun", 1, 4, 1, 2), given | {"MASTER_ADDR": name})
        assert place is not None and place.address == name
    agent = given | {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = rendezvous(Launch("torchrun", 0, 4, 0, 4), agent)
    assert place is not None and place.address == "localhost" and not place.serve


def test_mpi_agrees_on_one_by_itself() -> None:
    assert rendezvous(IN_OPENMPI, OPENMPI) is None
    assert rendezvous(IN_MPICH, MPICH | {"MASTER_ADDR": "left-over", "MASTER_PORT": "1"}) is None


def test_slurm_on_one_node_meets_on_the_loopback_address_at_a_port_of_its_own() -> None:
    step = SRUN | {"SLURM_STEP_NUM_NODES": "1"}
    place = rendezvous(IN_SRUN, step)
    assert place is not None and place.address == "127.0.0.1" and 20_000 <= place.port < 32_768
    ports = {
        rendezvous(IN_SRUN, step | change).port for change in ({}, {"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"})
    }  # type: ignore[union-attr]
    assert len(ports) == 3


def test_a_requeued_job_does_not_meet_its_past() -> None:
    step = SRUN | {"SLURM_STEP_NUM_NODES": "1"}
    first, again = rendezvous(IN_SRUN, step), rendezvous(IN_SRUN, step | {"SLURM_RESTART_COUNT": "1"})
    assert first is not None and again is not None
    assert first.port != again.port and first.job == again.job == "Slurm's job 4711.0"


def test_a_master_that_is_set_wins() -> None:
    place = rendezvous(IN_SRUN, SRUN | {"MASTER_ADDR": "node1", "MASTER_PORT": "16123"})
    assert place == Rendezvous("node1", 16123, False, "Slurm's job 4711.0")


def test_submitit_local_meets_on_the_loopback_address() -> None:
    place = rendezvous(Launch("submitit", 0, 2, 0, 2), SUBMITIT_LOCAL)
    assert place is not None and place.address == "127.0.0.1" and place.serve


def test_torchrun_without_a_master() -> None:
    with pytest.raises(UserError, match="^MASTER_ADDR, MASTER_PORT: not set although torchrun started this process"):
        rendezvous(IN_TORCHRUN, {})


def test_a_node_list_that_cannot_be_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="^SLURM_STEP_NODELIST: 'node\\[1-2\\]' could not be expanded"):
        rendezvous(IN_SRUN, SRUN)


def test_cray_gpu_support_is_on_only_if_switched_on() -> None:
    assert cray_gpu_support({"MPICH_GPU_SUPPORT_ENABLED": "1"})
    assert not cray_gpu_support({"MPICH_GPU_SUPPORT_ENABLED": "0"}) and not cray_gpu_support({})


def test_a_job_that_is_started_again_keeps_its_name():
    requeued = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
    assert restarts(requeued) == 1 and restarts({}) == 0
    assert job_name(None, requeued) == job_name(None, {"SLURM_JOB_ID": "12"}) == "slurm 12"
    first, again = ({"TORCHELASTIC_RESTART_COUNT": n, "TORCHELASTIC_RUN_ID": "none"} for n in "01")
    assert restarts(again) == 1 and job_name(None, first) == job_name(None, again) is not None
    assert job_name("a store", again) == "torchrun a store none"  # as every agent of torchrun says
    assert job_name(None, {}) is None
