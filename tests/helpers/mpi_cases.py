"""What the ranks of test_mpi.py do: mpirun -n N python mpi_cases.py WHAT. A failure ends as in the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from comm_cases import CASES, ramp
from faults.injections import hold_the_lock, segfault

from fdiff.comm import Communicator, LostRanks, collectives, connect
from fdiff.comm.mpi import MpiCommunicator
from fdiff.config import RuntimeConfig
from fdiff.errors import RunError, UserError
from fdiff.runtime import launcher

PATIENCE_S = 3.0


class Staged(MpiCommunicator):
    """Takes CPU tensors for ones that MPI cannot reach."""

    def _in_place(self, tensor: torch.Tensor) -> bool:
        return False


@contextmanager
def counted(comm: MpiCommunicator) -> Iterator[list[str]]:
    """What is waited for inside the block, one by one."""
    started: list[str] = []
    wait = comm._control.wait

    def counting(requests: Sequence[object], what: str, ranks: Sequence[int]) -> None:
        started.append(what)
        wait(requests, what, ranks)

    comm._control.wait = counting
    try:
        yield started
    finally:
        comm._control.wait = wait


def pass_on(comm: MpiCommunicator, tensor: torch.Tensor) -> int:
    """From each even rank to the next; in how many pieces."""
    to = comm.rank ^ 1
    with comm.ledger.purpose("parameters"), counted(comm) as started:
        comm.send(tensor, to) if comm.rank < to else comm.recv(tensor, to)
    return len(started)


def pieces_add_up(comm: MpiCommunicator) -> None:
    """Chunks as before MPI-4, of 100 bytes instead of 1 GiB."""
    whole, comm._chunk_bytes = comm._chunk_bytes, 100
    try:
        CASES["send_and_recv_go_round"](comm)
        CASES["all_reduce_among_some"](comm)
        assert pass_on(comm, ramp(101)) == 5  # 404 bytes
    finally:
        comm._chunk_bytes = whole


def staging_delivers(comm: MpiCommunicator) -> None:
    """Through one buffer, which has grown to its full size once each operation has been done."""
    names = ("all_reduce_sums", "broadcast_delivers", "send_and_recv_go_round", "several_sums_at_once")
    buffers = []
    for name in 2 * names:
        CASES[name](comm)
        buffers.append(comm._host.data_ptr())
    assert len(set(buffers[len(names) - 1 :])) == 1 and comm._host.numel() > 0 and comm._host_taken == 0


def nothing_is_staged_on_the_cpu(comm: MpiCommunicator) -> None:
    tensor = ramp(10)
    with comm._reachable(tensor) as reached:
        assert reached is tensor
    assert comm._host.numel() == 0


def errors_say_what_happened(comm: MpiCommunicator) -> None:
    """Eight numbers into room for four."""
    if comm.rank > 1:
        return
    try:
        pass_on(comm, ramp(8) if comm.rank == 0 else torch.empty(4))
        assert comm.rank == 0
    except RunError as error:
        text = "rank 1: the receive from rank 0 failed: .*truncat"
        assert comm.rank == 1 and re.match(text, str(error)), error


def one_way(comm: MpiCommunicator, ring: bool, blocks: bool, name: str) -> None:
    comm._ring, comm._blocks = ring, blocks and comm._blocks
    collectives.GROUPS_KEPT = 2  # some are freed
    CASES[name](comm)
    assert len(comm._groups._kept) <= 2


def cases() -> None:
    """Every case of every communicator, both ways of partial sums and both of waiting, and MPI's own; rank 0 prints
    the errors by name as JSON."""
    launch = launcher.detect()
    comm, staged = MpiCommunicator(launch, 30.0), Staged(launch, 30.0)
    comm.open(torch.device("cpu"))
    runs: dict[str, Callable[[], None]] = {}
    for ring, blocks in ((True, True), (False, True), (False, False)):
        runs |= {f"{name}, {ring}, {blocks}": partial(one_way, comm, ring, blocks, name) for name in CASES}
    runs["pieces_add_up"] = lambda: pieces_add_up(comm)
    runs["nothing_is_staged_on_the_cpu"] = lambda: nothing_is_staged_on_the_cpu(comm)
    runs["errors_say_what_happened"] = lambda: errors_say_what_happened(comm)
    runs["staging_delivers"] = lambda: staging_delivers(staged)
    errors: dict[str, str] = {}
    for name, run in runs.items():
        try:
            run()
        except Exception:
            errors[name] = f"rank {comm.rank}: {traceback.format_exc()}"
            break  # the ranks may be out of step
    if errors or comm.rank == 0:
        print("ERRORS", json.dumps(errors), flush=True)
    if errors:
        comm.abort()
    comm.close()
    staged.close()


def large() -> None:
    """A broadcast and a message of more than 2^31-1 elements."""
    launch = launcher.detect()
    comm = MpiCommunicator(launch, 120.0)
    comm.open(torch.device("cpu"))
    size = 2**31 + 17
    tensor = torch.zeros(size, dtype=torch.uint8)
    marks = [0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, size - 1]
    if comm.rank == 0:
        tensor[marks] = torch.arange(1, len(marks) + 1, dtype=torch.uint8)
    with comm.ledger.purpose("parameters"):
        comm.broadcast(tensor, 0, (0, 1))
    assert tensor[marks].tolist() == list(range(1, len(marks) + 1)) and int(tensor.count_nonzero()) == len(marks)
    if comm.rank == 1:
        tensor.zero_()
    pieces = pass_on(comm, tensor)
    assert tensor[marks].tolist() == list(range(1, len(marks) + 1)) and int(tensor.count_nonzero()) == len(marks)
    if comm.rank == 1:
        print("DELIVERED", pieces, flush=True)
    comm.close()


def sums(comm: Communicator) -> None:
    tensor = ramp(1000) * (comm.rank + 1)
    with comm.ledger.purpose("parameters"):
        comm.all_reduce(tensor, tuple(range(comm.size)))
    assert torch.equal(tensor, ramp(1000) * sum(range(1, comm.size + 1)))


def many_sums(comm: Communicator) -> None:
    for _ in range(1000):
        with comm.ledger.purpose("parameters"):
            comm.all_reduce(ramp(3_000_000), tuple(range(comm.size)))


def over(kind: str, fault: Callable[[Communicator], None] = sums) -> None:
    """Connect as the command line does, do something, end as it does."""
    launch = launcher.detect()
    comm: Communicator | None = None
    try:
        comm = connect(RuntimeConfig(comm=kind, timeout_s=PATIENCE_S), launch)
        comm.open(torch.device("cpu"))
        fault(comm)
        sys.stdout.write(f"DONE {comm.name} {comm.rank} {comm.size}\n")  # in one piece, even if nothing is buffered
        sys.stdout.flush()
        comm.close()
    except UserError as error:
        print("USER", launch.rank, error, file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        assert comm is not None
        speaker = error.speaker if isinstance(error, LostRanks) else comm.rank
        if comm.rank == speaker:
            print("SAYS", comm.rank, error, file=sys.stderr, flush=True)
        comm.abort()
        os._exit(1)


def on(
    rank: int,
    do: Callable[[], object],
    then: Callable[[Communicator], None],
    first: Callable[[Communicator], None] = sums,
) -> Callable[[Communicator], None]:
    """After something that goes well, one rank does what it should not; `then` the others need it."""

    def fault(comm: Communicator) -> None:
        first(comm)
        comm.exchange(b"")
        if comm.rank == rank:
            print("FAULT", time.time(), file=sys.stderr, flush=True)
            do()
        then(comm)

    return fault


def pair(comm: Communicator) -> None:
    """Ranks 1 and 2 have something to do together; rank 0 goes on."""
    with comm.ledger.purpose("parameters"):
        comm.all_reduce(ramp(3_000_000), (1, 2))


def pair_while_rank_0_waits(comm: Communicator) -> None:
    pair(comm)
    comm.exchange(b"")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("client 1 has no idea")


def refuse() -> None:
    raise UserError("data.root: nothing there")


def exchange(comm: Communicator) -> None:
    comm.exchange(b"")


WHAT: dict[str, Callable[[], None]] = {
    "cases": cases,
    "large": large,
    "mpi": lambda: over("mpi"),
    "auto": lambda: over("auto"),
    "torch": lambda: over("torch"),
    "stopped-mpi": lambda: over("mpi", on(2, stop, exchange)),
    "stopped-torch": lambda: over("torch", on(2, stop, exchange)),
    "stopped-rank-0-mpi": lambda: over("mpi", on(0, stop, exchange)),
    "stopped-rank-0-torch": lambda: over("torch", on(0, stop, exchange)),
    "stopped-in-collective": lambda: over("mpi", on(2, stop, sums)),
    "stopped-in-pair": lambda: over("mpi", on(2, stop, pair_while_rank_0_waits, first=pair)),
    "locked": lambda: over("mpi", on(2, lambda: hold_the_lock(20), sums)),
    "segfault": lambda: over("mpi", on(1, segfault, exchange)),
    "segfault-in-collective": lambda: over("mpi", on(1, threading.Timer(0.002, segfault).start, many_sums)),
    "killed-mpi": lambda: over("mpi", on(1, die, exchange)),
    "killed-torch": lambda: over("torch", on(1, die, exchange)),
    "fails": lambda: over("mpi", on(1, fail, exchange)),
    "refuses": lambda: over("mpi", lambda comm: refuse()),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    WHAT[sys.argv[1]]()
