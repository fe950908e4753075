"""Sums over ranks from sends and receives alone, as `schedule` has them: any subset of ranks, and no group to set up.

What a rank adds up comes in rank order, so a sum has the same bits in every repetition, and each element is summed on
one rank, so it has the same bits everywhere. Between neighbours whose tensors both lie in memory that they show each
other a message says where the piece is, and the receiver reads it there; when all is done it says so, and only then may
the sender write there again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdiff.comm.base import Ledger, Sum
from fdiff.comm.neighbours import PLACE, Neighbours
from fdiff.schedule import PHASES, Phase, phases

BLOCK_BYTES = 2**25  # a tensor goes in blocks of this size: that bounds the memory for what is to be added

Handle = TypeVar("Handle")


@dataclass
class _Arrival:
    """A piece on its way: `target` is what the message goes to; `note` if that only says where the piece is."""

    source: int
    piece: Tensor
    target: Tensor
    note: bool
    handle: Any = None


class Transfers:
    """One rank's part in sums; `room` is memory for what it receives and has to add, kept and grown."""

    def __init__(self, rank: int, ledger: Ledger, neighbours: Neighbours) -> None:
        self._rank, self._ledger, self._neighbours = rank, ledger, neighbours
        self._room = torch.empty(0)

    def carry_out(
        self,
        sums: Sequence[Sum],
        post: Callable[[bool, Tensor, int], Handle],
        wait: Callable[[Sequence[Handle]], object],
    ) -> None:
        """All sums at once, so that those that only receive one report another meanwhile.

        `post(sends, tensor, rank)` starts to send or to receive, `wait` sees what was started end.
        """
        self._readers, self._read = set[int](), set[int]()
        for blocks in zip_longest(*(_blocks(s) for s in sums)):
            here = [b for b in blocks if b is not None]
            shares = [phases(b.tensor.numel(), b.reporters, b.receivers, self._rank) for b in here]
            for at in range(PHASES):
                self._phase([(b, share[at]) for b, share in zip(here, shares, strict=True)], post, wait)
        self._release(post, wait)

    def _phase(self, shares: Sequence[tuple[Sum, Phase]], post: Any, wait: Any) -> None:
        expected = self._expected(shares)
        for arrivals in expected:
            for arrival in arrivals:
                arrival.handle = post(False, arrival.target, arrival.source)
        departures = []
        for one, phase in shares:
            for to, (start, stop) in phase.sends:
                self._ledger.count((stop - start) * one.tensor.element_size())
                message = self._message(one.tensor[start:stop], to)
                departures.append((post(True, message, to), message))  # which has to live until it is sent
        for one, phase in shares:
            if phase.owns is not None:
                _scale(one.tensor[slice(*phase.owns)], one.weight(self._rank))
        for (one, phase), arrivals in zip(shares, expected, strict=True):
            for arrival in arrivals:
                wait([arrival.handle])
                term = self._arrived(arrival)
                if phase.adds:
                    _add(arrival.piece, term, one.weight(arrival.source))
                elif term is not arrival.piece:
                    arrival.piece.copy_(term)
        wait([handle for handle, _ in departures])
        tensor = shares[0][0].tensor
        if any(expected) and tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # before the sums are sent

    def _expected(self, shares: Sequence[tuple[Sum, Phase]]) -> list[list[_Arrival]]:
        """For each share what is to arrive, and the memory to which it goes."""
        terms = self._terms(shares)
        every: list[list[_Arrival]] = []
        for one, phase in shares:
            every.append([])
            for source, (start, stop) in phase.receives:
                piece = one.tensor[start:stop]
                target = next(terms) if phase.adds else piece
                note = self._place(piece, source) is not None
                every[-1].append(
                    _Arrival(source, piece, torch.empty(PLACE, dtype=torch.int64) if note else target, note)
                )
        return every

    def _message(self, piece: Tensor, to: int) -> Tensor:
        """The piece, or where a neighbour finds it."""
        if (place := self._place(piece, to)) is None:
            return piece
        self._readers.add(to)
        return torch.tensor(place)

    def _place(self, piece: Tensor, rank: int) -> list[int] | None:
        """Where the two ranks that exchange a piece find theirs in each other's memory; None if it is sent."""
        return self._neighbours.place(piece) if rank in self._neighbours else None

    def _arrived(self, arrival: _Arrival) -> Tensor:
        if not arrival.note:
            return arrival.target
        self._read.add(arrival.source)
        return self._neighbours.view(arrival.source, arrival.target.tolist(), arrival.piece)

    def _release(self, post: Any, wait: Any) -> None:
        """Tell those whose memory was read that it was, and hear the same of one's own."""
        words = {rank: torch.zeros(1, dtype=torch.int64) for rank in self._readers}
        done = torch.ones(1, dtype=torch.int64)
        heard = [post(False, word, rank) for rank, word in words.items()]
        wait(heard + [post(True, done, rank) for rank in self._read])

    def _terms(self, shares: Sequence[tuple[Sum, Phase]]) -> Iterator[Tensor]:
        """Memory for each of the pieces that are to be added."""
        sizes = [stop - start for _, phase in shares if phase.adds for _, (start, stop) in phase.receives]
        like = shares[0][0].tensor
        if self._room.numel() < sum(sizes) or (self._room.dtype, self._room.device) != (like.dtype, like.device):
            self._room = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        return iter(self._room[: sum(sizes)].split(sizes))


def _blocks(one: Sum) -> list[Sum]:
    """The same sum, block by block; its tensor flat."""
    flat = one.tensor.view(-1)
    pieces = flat.split(max(1, BLOCK_BYTES // flat.element_size()))
    return [replace(one, tensor=piece) for piece in pieces]


def _scale(piece: Tensor, weight: float) -> None:
    if weight != 1:
        piece.mul_(weight)


def _add(piece: Tensor, term: Tensor, weight: float) -> None:
    """Of whole numbers only as they are: they have no weights."""
    piece.add_(term) if weight == 1 else piece.add_(term, alpha=weight)
