"""Sums over ranks from sends and receives alone, as `schedule` has them: any subset of ranks, and no group to set up.

Each element is added up along one ring that ends at one rank, so a sum has the same bits in every repetition and on
every rank. What is sent goes in chunks: while one is added the next is on its way.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from typing import Any

import torch
from torch import Tensor

from fdiff.comm.base import Ledger, Sum
from fdiff.comm.schedule import hops

CHUNK_BYTES = 2**20
AHEAD = 16  # chunks that a rank is ready to receive before it needs them

Post = Callable[[bool, Tensor, int], Any]
Wait = Callable[[Sequence[Any]], object]


@dataclass
class _Move:
    """What a rank does with a piece: see `schedule.Hop`. From step `vacant` on it may receive what takes its place."""

    step: int
    piece: Tensor
    source: int | None
    adds: bool
    to: tuple[int, ...]
    weight: float
    largest: bool
    vacant: int

    @property
    def chunks(self) -> Sequence[Tensor]:
        """The piece as it travels."""
        return self.piece.split(max(1, CHUNK_BYTES // self.piece.element_size()))


@dataclass
class _Arrival:
    """A chunk on its way to `target`: itself, or room from which it is added."""

    chunk: Tensor
    target: Tensor
    handle: Any


class Transfers:
    """One rank's part in sums; `room` is memory for chunks that are to be added, kept."""

    def __init__(self, rank: int, ledger: Ledger) -> None:
        self._rank, self._ledger = rank, ledger
        self._room = torch.empty(0)

    def carry_out(self, sums: Sequence[Sum], post: Post, wait: Wait) -> None:
        """All sums at once, so that those that only receive one report another meanwhile.

        `post(sends, tensor, rank)` starts to send or to receive, `wait` sees what was started end, once.
        """
        self._post, self._wait = post, wait
        self._leaving: dict[int, list[Any]] = {}  # sends of chunks, by address
        moves = self._moves(sums)
        coming = deque((move, chunk) for move in moves if move.source is not None for chunk in move.chunks)
        expected: deque[_Arrival] = deque()
        slots = cycle(self._slots(sums[0].tensor))

        def look_ahead(step: int) -> None:
            # Before this rank sends: over TCP the word that it is ready to receive would queue behind what it sends.
            while coming and len(expected) < AHEAD and coming[0][0].vacant <= step:
                expected.append(self._expect(*coming.popleft(), next(slots)))

        for move in moves:
            look_ahead(move.step)
            if move.source is None and move.weight != 1:
                move.piece.mul_(move.weight)
                _complete(move.piece)
            for chunk in move.chunks:
                if move.source is not None:
                    look_ahead(move.step)
                    self._take(move, expected.popleft())
                self._send(move, chunk)
        wait([handle for handles in self._leaving.values() for handle in handles])
        self._leaving.clear()  # a handle keeps alive what it sent

    def _moves(self, sums: Sequence[Sum]) -> list[_Move]:
        """What this rank has to do, in the order in which all ranks have it."""
        flat = [one.tensor.view(-1) for one in sums]
        shares = [hops(t.numel(), one.reporters, one.receivers, self._rank) for one, t in zip(sums, flat, strict=True)]
        weights = [one.weight(self._rank) if self._rank in one.reporters else 1.0 for one in sums]
        # A reporter has sent its share of a piece on before it expects the sum to take its place.
        rounds = [len(one.reporters) - 1 if self._rank in one.reporters else sys.maxsize for one in sums]
        largest = [one.largest for one in sums]
        moves = []
        for step, at_once in enumerate(zip_longest(*shares, fillvalue=())):
            for tensor, weight, most, round, here in zip(flat, weights, largest, rounds, at_once, strict=True):
                for hop in here:
                    piece, vacant = tensor[slice(*hop.span)], 0 if hop.adds else step - round
                    moves.append(_Move(step, piece, hop.source, hop.adds, hop.to, weight, most, vacant))
        return moves

    def _slots(self, like: Tensor) -> Sequence[Tensor]:
        """Memory for chunks that are to be added, for as many as may be on their way."""
        size = max(1, CHUNK_BYTES // like.element_size())
        if (self._room.numel(), self._room.dtype, self._room.device) != (AHEAD * size, like.dtype, like.device):
            self._room = torch.empty(AHEAD * size, dtype=like.dtype, device=like.device)
        return self._room.split(size)

    def _expect(self, move: _Move, chunk: Tensor, slot: Tensor) -> _Arrival:
        """Be ready to receive a chunk: to be added from the slot, else in its place, as soon as what is there left."""
        assert move.source is not None
        if not move.adds:
            self._wait(self._leaving.pop(chunk.data_ptr(), ()))
        target = slot[: len(chunk)] if move.adds else chunk
        return _Arrival(chunk, target, self._post(False, target, move.source))

    def _take(self, move: _Move, arrival: _Arrival) -> None:
        """Wait for it; if it is to be added, add what is here, or keep the larger. Whole numbers have no weights."""
        self._wait([arrival.handle])
        here, term = arrival.chunk, arrival.target
        if not move.adds:
            return
        if move.largest:
            torch.maximum(here, term, out=here)
        elif move.weight == 1:
            here.add_(term)
        else:
            torch.add(term, here, alpha=move.weight, out=here)
        _complete(here)

    def _send(self, move: _Move, chunk: Tensor) -> None:
        for to in move.to:
            self._ledger.count(chunk.nbytes)
            self._leaving.setdefault(chunk.data_ptr(), []).append(self._post(True, chunk, to))


def _complete(tensor: Tensor) -> None:
    """What a GPU is told to do with it is to be done before it is sent: MPI does not wait for kernels."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
