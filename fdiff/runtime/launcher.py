"""Who started this process, and which rank it is: one table of environment names, and the only reader of them.

Detection goes down the table and the first launcher whose rank and size are both set counts: mpirun inside an sbatch
job shows SLURM_* too, and torchrun may itself have been started by srun or mpirun, once a node.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fdiff.errors import UserError


@dataclass(frozen=True)
class Launch:
    """A process's place in the job; `local_*` count on its node."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cuda_visible: str | None = None
    """CUDA_VISIBLE_DEVICES, if set: what the launcher or the user left visible to this process."""

    @property
    def one_node(self) -> bool:
        """Whether all ranks run on one node."""
        return self.local_size == self.size


@dataclass(frozen=True)
class Names:
    """The variables of one launcher, and what to do where they are wrong."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    remedy: str


TABLE: dict[str, Names] = {
    "torchrun": Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "start the job with torchrun"),
    "openmpi": Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "start the job with Open MPI's mpirun",
    ),
    "mpich": Names(
        "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "start the job with MPICH's mpirun (hydra)"
    ),
    "submitit": Names(  # its local executor; on Slurm it starts its tasks with srun
        "SUBMITIT_LOCAL_GLOBALID",
        "SUBMITIT_LOCAL_NTASKS",
        "SUBMITIT_LOCAL_LOCALID",
        "SUBMITIT_LOCAL_NTASKS",
        "submit the job again",
    ),
    "srun": Names(
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "start the job with srun",
    ),
}

HALVES_ARE_NORMAL = ("submitit", "srun")  # in submitit's controller and in a batch script nothing is wrong
LAST_STEP = 0xFFFFFFF0  # Slurm's ids above are no steps of srun's: batch script, interactive shell, extern


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place, from the first launcher of the table that has set rank and size, else rank 0 of 1.

    UserError if what is set contradicts itself, e.g. a RANK left over in a job of mpirun.
    """
    found = [launch for name in TABLE if (launch := _row(name, environment))]
    if not found:
        _refuse_halves(environment)
    launch = found[0] if found else Launch("none")
    if launch.launcher == "torchrun" and len(found) > 1 and not environment.get("TORCHELASTIC_RUN_ID"):
        _check_set_by_hand(launch, found[1])
    return replace(launch, cuda_visible=environment.get("CUDA_VISIBLE_DEVICES"))


def _row(launcher: str, environment: Mapping[str, str]) -> Launch | None:
    """What one launcher says, or None if it did not start this process."""
    names = TABLE[launcher]
    rank, size = _number(environment, names.rank), _number(environment, names.size)
    if rank is None or size is None or not _started(launcher, environment):
        return None
    alone = 0 if size == 1 else None
    local_rank = _number(environment, names.local_rank, alone)
    tasks = _tasks_of_node if launcher == "srun" else _number
    local_size = tasks(environment, names.local_size, None if alone is None else 1)
    if local_rank is None or local_size is None:
        missing = names.local_rank if local_rank is None else names.local_size
        raise UserError(f"{missing}: not set, but {names.rank} says rank {rank} of {size}; {names.remedy}, or set it")
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(
            f"{names.rank}: rank {rank} of {size}, on its node {local_rank} of {local_size}, contradicts itself; "
            f"{names.remedy}"
        )
    return Launch(launcher, rank, size, local_rank, local_size)


def _started(launcher: str, environment: Mapping[str, str]) -> bool:
    """Whether the launcher's variables are there because it started this process, and not for another reason."""
    in_step = "SLURM_STEP_NUM_TASKS" in environment and (_number(environment, "SLURM_STEP_ID", 0) or 0) < LAST_STEP
    if launcher == "mpich":  # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE as well, but says nothing of the node
        return not in_step or "MPI_LOCALRANKID" in environment
    return launcher != "srun" or in_step


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    text = environment.get(name)
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}: {text!r} is not valid; the launcher must set it to a whole number")
    return int(text)


def _tasks_of_node(environment: Mapping[str, str], name: str, default: int | None) -> int | None:
    """Slurm lists the tasks of all nodes, e.g. "2(x3),1"; SLURM_NODEID says which of them is this one."""
    text, node = environment.get(name), _number(environment, "SLURM_NODEID", 0) or 0
    if not text:
        return default
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    if node >= len(counts):
        raise UserError(f"{name}: {text!r} does not say how many tasks node {node} has; start the job with srun")
    return counts[node]


def _refuse_halves(environment: Mapping[str, str]) -> None:
    """A rank without a size, or the reverse, would make each of several processes train the whole federation."""
    for launcher, names in TABLE.items():
        halves = (names.rank, names.size)
        present = [name for name in halves if environment.get(name)]
        if len(present) == 1 and launcher not in HALVES_ARE_NORMAL:
            missing = halves[present[0] == halves[0]]
            raise UserError(f"{present[0]}: set without {missing}; unset it, or {names.remedy}")


def _check_set_by_hand(launch: Launch, outer: Launch) -> None:
    """RANK and WORLD_SIZE without torchrun must fit the launcher around them: its ranks, or several for each."""
    same = launch.size == outer.size and launch.rank == outer.rank
    if not (same or launch.size > outer.size):
        raise UserError(
            f"RANK, WORLD_SIZE: rank {launch.rank} of {launch.size} contradicts {TABLE[outer.launcher].rank}: rank "
            f"{outer.rank} of {outer.size}; unset RANK and WORLD_SIZE"
        )


# --- where the ranks meet ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of torch.distributed meet, and the job that they are; None: nobody but the run folder says."""

    address: str
    port: int
    serve: bool
    job: str | None
    outlives_ranks: bool = False
    """Whether a launcher serves the store there, and goes on to do so while it starts the ranks again."""


def rendezvous(launch: Launch, environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """The meeting place that the launcher announces, or None where MPI must agree on one.

    Slurm and submitit announce none: rank 0's node serves, on a port that follows from the job's id and its restart
    count, so that a requeued job, which keeps its id, does not meet its own past.
    """
    if launch.launcher in ("openmpi", "mpich", "none"):  # what others have set, e.g. Kubernetes, is not looked at
        return None
    address, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT")
    if launch.launcher in ("srun", "submitit") and not (address and port):
        address = _first_host(environment) if launch.launcher == "srun" else "127.0.0.1"
        job = _number(environment, "SLURM_JOB_ID" if launch.launcher == "srun" else "SUBMITIT_LOCAL_JOB_ID", 0) or 0
        step = _number(environment, "SLURM_STEP_ID", 0) or 0
        # Below the ports that the kernel gives out.
        port = 20_000 + (job * 7 + restarts(environment) * 131 + step) % 12_000
    if not address or not port:
        raise UserError(f"MASTER_ADDR, MASTER_PORT: not set although {launch.launcher} started this process; set both")
    agent_serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.one_node and not agent_serves:
        address = "127.0.0.1"  # by another of this node's names the store would be open to its network
    serve = launch.rank == 0 and not agent_serves
    return Rendezvous(address, port, serve, job_of(launch, environment), agent_serves)


def job_of(launch: Launch, environment: Mapping[str, str] = os.environ) -> str | None:
    """What the ranks of a job have in common and no other job has, as their launcher says; None where it does not."""
    run = environment.get("TORCHELASTIC_RUN_ID", "none")
    if launch.launcher == "torchrun" and run != "none":  # its default, the same for all jobs
        return f"torchrun's job {run}"
    if launch.launcher == "srun":
        return f"Slurm's job {environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID', '0')}"
    if launch.launcher == "submitit":
        return f"submitit's job {environment.get('SUBMITIT_LOCAL_JOB_ID')}"
    return None


def environment_of(
    rank: int, size: int, address: str, port: int, interface: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of a rank that is started by hand, the only one on its network, to meet the others there."""
    launchers = [name for names in TABLE.values() for name in (names.rank, names.size, names.local_rank)]
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    meeting = {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": interface}
    kept = {name: value for name, value in environment.items() if name not in launchers}
    return {**kept, **{name: str(value) for name, value in place.items()}, **meeting}


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"SLURM_STEP_NODELIST: {nodes!r} could not be expanded ({error}); set MASTER_ADDR") from None
    return listed.stdout.split()[0]


def stay_on_loopback(launch: Launch) -> None:
    """On one node let gloo and NCCL open their sockets on the loopback interface only, unless the user chose one."""
    if launch.one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def cray_gpu_support(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user switched on that Cray's MPICH takes device pointers."""
    return environment.get("MPICH_GPU_SUPPORT_ENABLED") == "1"


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started this job's ranks again, or else Slurm has requeued the job, which keeps its id."""
    return _number(environment, "TORCHELASTIC_RESTART_COUNT", 0) or _number(environment, "SLURM_RESTART_COUNT", 0) or 0


def job_name(outlives: str | None = None, environment: Mapping[str, str] = os.environ) -> str | None:
    """What a job that its launcher starts again keeps and no other job has; None where nothing starts it again.

    `outlives` as of the communicator: the agents of torchrun on several nodes have nothing else in common.
    """
    if job := environment.get("SLURM_JOB_ID"):
        return f"slurm {job}"
    if "TORCHELASTIC_RESTART_COUNT" in environment:  # all jobs may have the same run id, but not the same torchrun
        agent = f"{socket.gethostname()} {os.getppid()}"
        return f"torchrun {outlives or agent} {environment.get('TORCHELASTIC_RUN_ID')}"
    return None


def started_by(environment: Mapping[str, str] = os.environ) -> int | None:
    """The process id of the launcher's part on this node that started this rank; None for one started by hand."""
    launch = detect(environment)
    by_hand = launch.launcher == "torchrun" and not environment.get("TORCHELASTIC_RUN_ID")
    return None if by_hand or launch.launcher == "none" or os.getppid() == 1 else os.getppid()


@contextmanager
def without_a_job() -> Iterator[None]:
    """Inside the block the environment says nothing of a Slurm job around this process: sbatch would take it over."""
    of_slurm = {n: v for n, v in os.environ.items() if n.startswith(("SLURM_", "SLURMD_", "SRUN_"))}
    of_a_job = {n: v for n, v in of_slurm.items() if n != "SLURM_CONF"}
    for name in of_a_job:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(of_a_job)


def cache_folder(of: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where this user's cache of something is: in $XDG_CACHE_HOME, else in ~/.cache; None for a user without a home."""
    try:
        root = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "fdiff" / of
