"""Sums over ranks from sends and receives alone, as `schedule` has them: any subset of ranks, and no group to set up.

What a rank adds up comes in rank order, so a sum has the same bits in every repetition, and each element is summed on
one rank, so it has the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdiff.comm.base import Ledger, Sum
from fdiff.schedule import PHASES, Phase, phases

BLOCK_BYTES = 2**25  # a tensor goes in blocks of this size: that bounds the memory for what is to be added

Handle = TypeVar("Handle")


class Transfers:
    """One rank's part in sums; `room` is memory for what it receives and has to add, kept and grown."""

    def __init__(self, rank: int, ledger: Ledger) -> None:
        self._rank, self._ledger = rank, ledger
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
        self._ledger.count(0)  # who only receives has to have a purpose too, or it would wait for those that have none
        for blocks in zip_longest(*(_blocks(s) for s in sums)):
            here = [b for b in blocks if b is not None]
            shares = [phases(b.tensor.numel(), b.reporters, b.receivers, self._rank) for b in here]
            for at in range(PHASES):
                self._phase([(b, share[at]) for b, share in zip(here, shares, strict=True)], post, wait)

    def _phase(self, shares: Sequence[tuple[Sum, Phase]], post: Any, wait: Any) -> None:
        arrivals, departures = [], []
        terms = self._terms(shares)
        for one, phase in shares:
            for source, (start, stop) in phase.receives:
                piece = one.tensor[start:stop]
                term = next(terms) if phase.adds else None
                arrivals.append((post(False, piece if term is None else term, source), piece, term, one, source))
        for one, phase in shares:
            for to, (start, stop) in phase.sends:
                self._ledger.count((stop - start) * one.tensor.element_size())
                departures.append(post(True, one.tensor[start:stop], to))
        for one, phase in shares:
            if phase.owns is not None:
                _scale(one.tensor[slice(*phase.owns)], one.weight(self._rank))
        for handle, piece, term, one, source in arrivals:
            wait([handle])
            if term is not None:
                _add(piece, term, one.weight(source))
        wait(departures)
        tensor = shares[0][0].tensor
        if arrivals and tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # before the sums are sent

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
