"""What every communicator can do, and the ledger of what it sent.

Two planes. Control (`exchange`) moves a few bytes from every rank to every rank within a time-out and names who is
missing; it works from the start. Payload (`combine`, `all_reduce`, `broadcast`, `send`, `recv`) moves tensors in place
among the ranks named, after `open`; every rank of the world makes the same calls in the same order, those not named
return at once.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fdiff.errors import Interrupted, RunError, UserError


class LostRanks(RunError):
    """Some ranks did not answer in time or are gone: `ranks`; none if an operation failed among ranks that all live.

    `speaker` is a rank that lives and reports it for all.
    """

    def __init__(self, ranks: Sequence[int], what: str, speaker: int) -> None:
        self.ranks, self.speaker = tuple(ranks), speaker
        names = ", ".join(map(str, self.ranks))
        super().__init__(f"rank{'s' if len(self.ranks) > 1 else ''} {names} {what}" if ranks else what)


class NoRendezvous(RunError):
    """Nobody is where the ranks are to meet."""


class Stranger(UserError):
    """This rank does not belong to those whom it met: it is another job's, or one too many."""


@dataclass(frozen=True)
class Sum:
    """A contiguous tensor to be summed, in place, over its reporters, and written to its receivers as well.

    Both are sorted, and no rank is in both; on other ranks the tensor is not touched. `weights` has the factor by which
    a reporter's tensor counts; none: 1 each. With `largest` not the sum is made, but the largest of each element.
    """

    tensor: Tensor
    reporters: tuple[int, ...]
    receivers: tuple[int, ...] = ()
    weights: Mapping[int, float] | None = None
    largest: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """All that take part, sorted."""
        return tuple(sorted(self.reporters + self.receivers))

    def weight(self, rank: int) -> float:
        """The factor of a reporter."""
        return 1.0 if self.weights is None else self.weights[rank]


class Ledger:
    """Payload bytes that this rank sent, by purpose; the purposes are what may leave a client, and nothing else.

    The bytes are nominal: what a ring moves. A library may move others; only counters of interfaces measure that.
    """

    PURPOSES = ("parameters", "ema", "statistics", "pictures")

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self._purpose: str | None = None

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Payload inside the block is sent for this purpose, one of PURPOSES."""
        if name not in self.PURPOSES:
            raise ValueError(f"{name!r} is not a purpose for which anything may leave a rank: {self.PURPOSES}")
        before, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self._purpose = before

    def count(self, bytes_sent: float) -> None:
        """Note payload about to be sent; RuntimeError outside of a declared purpose, so that it is not."""
        if self._purpose is None:
            raise RuntimeError("payload was to leave this rank without a declared purpose")
        self.sent[self._purpose] = self.sent.get(self._purpose, 0) + bytes_sent

    def take(self) -> dict[str, float]:
        """What was sent since the last call, by purpose, and forget it."""
        taken, self.sent = self.sent, {}
        return taken


class Communicator(Protocol):
    """Ranks that average together. Implementations: torch.distributed, MPI, and a world of one.

    `outlives` names what stays while the launcher starts all ranks again, the same on all of them; None: nothing does.
    """

    name: str
    outlives: str | None
    rank: int
    size: int
    ledger: Ledger

    def open(self, device: torch.device, share_gpu: bool = False) -> None:
        """Make ready for payload on the device; every rank calls it once, after they agreed that nothing is amiss."""

    def combine(self, sums: Sequence[Sum]) -> None:
        """Carry out several sums at once; all ranks give the same ones. Each is bit-equal wherever it goes.

        Their tensors have one dtype and device. For r reporters and m receivers the ranks together nominally send
        2(r-1)+m times its tensor.
        """

    def all_reduce(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """Sum the tensor over `ranks` (sorted), in place on each of them; bit-equal on all."""

    def broadcast(self, tensor: Tensor, source: int, ranks: Sequence[int]) -> None:
        """Overwrite the tensor on `ranks` (sorted, `source` among them) with the source's."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to one rank, which calls `recv` with the same shape and dtype."""

    def recv(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with what `source` sends."""

    def exchange(self, value: bytes) -> list[bytes]:
        """Everybody's value, in rank order, on every rank. LostRanks if one does not answer in time."""

    def close(self) -> None:
        """Leave in good order; every rank calls it."""

    def abort(self) -> None:
        """Leave at once after a failure, so that no other rank waits for this one. May end the process, status 1."""


def exchange_json(comm: Communicator, value: Any) -> list[Any]:
    """Everybody's JSON value, in rank order. Raises what `exchange` raises."""
    return [json.loads(v) for v in comm.exchange(json.dumps(value).encode())]


def agree(comm: Communicator, error: Exception | None = None, facts: Mapping[str, Any] | None = None) -> None:
    """The vote before payload moves: every rank raises the same error, in one line, if any rank has one.

    Interrupted if a signal is all that is amiss, UserError if all other errors are bad requests, else RunError: so also
    if one of a rank's `facts`, of a name that rank 0 has too, is another than rank 0's.
    """
    ballot = None if error is None else [getattr(error, "status", 1), str(error)]
    everyone = exchange_json(comm, [ballot, dict(facts or {})])
    ballots = [(status, text) for status, text in filter(None, (cast for cast, _ in everyone))]
    for name, value in everyone[0][1].items():
        if unlike := [str(rank) for rank, (_, theirs) in enumerate(everyone) if theirs.get(name, value) != value]:
            which = f"rank{'s' * (len(unlike) > 1)} {', '.join(unlike)}"
            remedy = "give all ranks the same code, processors and libraries"
            ballots.append((RunError.status, f"{name}: {which} has another than rank 0; {remedy}"))
    if not ballots:
        return
    failures = [(status, text) for status, text in ballots if status < 128]
    kind = UserError if all(status == UserError.status for status, _ in failures) else RunError
    text = "; ".join(dict.fromkeys(text for _, text in failures))
    agreed = kind(text) if failures else Interrupted(ballots[0][0] - 128)
    agreed.agreed = True
    raise agreed


def check_devices(comm: Communicator, device: torch.device, share_gpu: bool) -> None:
    """Every rank on a GPU of its own, or of any if `share_gpu`, or all on the CPU; else UserError on every rank.

    Asked before a backend starts: NCCL fails with two ranks on a GPU, and hangs if some ranks have none.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    places = exchange_json(comm, [device.type, uuid, socket.gethostname()])
    if problem := device_problem(places, share_gpu):
        error = UserError(problem)
        error.agreed = True
        raise error


def device_problem(places: Sequence[Sequence[str]], share_gpu: bool) -> str | None:
    """What is wrong with the ranks' devices, given as (type, UUID, host) in rank order; None if nothing is."""
    if len({kind for kind, _, _ in places}) > 1:
        without = [str(r) for r, (kind, _, _) in enumerate(places) if kind == "cpu"]
        return f"runtime.device: ranks {', '.join(without)} see no GPU but others do; use cpu, or nodes with GPUs"
    ranks: dict[str, list[str]] = {}
    for rank, (_, uuid, _) in enumerate(places):
        ranks.setdefault(uuid, []).append(str(rank))
    shared = next((uuid for uuid, sharers in ranks.items() if uuid and len(sharers) > 1), None)
    if shared is None or share_gpu:
        return None
    host = places[int(ranks[shared][0])][2]
    return (
        f"runtime.device: ranks {', '.join(ranks[shared])} on {host} have the same GPU {shared}; give each rank its "
        "own, or let them share it with --runtime.share_gpu true (they then communicate over gloo), or start one rank "
        "a GPU, which then hosts several clients"
    )


def pass_on(comm: Communicator, terms: Sequence[Tensor], out: Tensor, ranks: Sequence[int]) -> None:
    """Put the sum of the terms of `ranks` into `out` on all ranks, added strictly in the order of ranks, then of terms.

    So it is bit-equal however the terms are spread. `terms` are this rank's, none on one that is not in `ranks`.
    """
    if comm.rank in ranks:
        at = ranks.index(comm.rank)
        if at > 0:
            so_far = torch.empty_like(out)
            comm.recv(so_far, ranks[at - 1])
            terms = [so_far, *terms]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        out.copy_(total)
        if at + 1 < len(ranks):
            comm.send(out, ranks[at + 1])
    comm.broadcast(out, ranks[-1], tuple(range(comm.size)))


def gather(comm: Communicator, tensor: Tensor) -> list[Tensor]:
    """On rank 0 everybody's tensor, on the CPU, in rank order; elsewhere []. Only the first dimension may differ."""
    tensor = tensor.contiguous()
    lengths = exchange_json(comm, len(tensor))
    if comm.rank != 0:
        if len(tensor):
            comm.send(tensor, 0)
        return []
    tensors = [tensor.cpu()]
    for source in range(1, comm.size):
        received = torch.empty((lengths[source], *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        if lengths[source]:
            comm.recv(received, source)
        tensors.append(received.cpu())
    return tensors
