"""Sums over ranks from sends and receives alone, as `schedule` has them: any subset of ranks, and no group to set up.

Each element is added up along one ring that ends at one rank, so a sum has the same bits in every repetition and on
every rank. What is sent goes in chunks: while one is added the next is on its way. Between neighbours whose tensors
both lie in memory that they show each other a message says where the whole piece is, and the receiver reads it there.
Within a sum a piece is written over only by a sum that has in it what was read there; after it, only once those who
read have said that they are done.
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
from fdiff.comm.neighbours import PLACE, Neighbours
from fdiff.comm.schedule import hops

CHUNK_BYTES = 2**20
AHEAD = 16  # chunks that a rank is ready to receive before it needs them

Post = Callable[[bool, Tensor, int], Any]
Wait = Callable[[Sequence[Any]], object]


@dataclass
class _Move:
    """What a rank does with a piece: see `schedule.Hop`. From step `vacant` on the piece may be written over."""

    step: int
    piece: Tensor
    source: int | None
    adds: bool
    to: tuple[int, ...]
    weight: float
    vacant: int


@dataclass
class _Arrival:
    """A piece or a chunk on its way: `target` is what the message goes to, itself or a note that says where to read."""

    chunk: Tensor
    target: Tensor
    note: bool
    handle: Any


class Transfers:
    """One rank's part in sums; `room` is memory for chunks that are to be added, kept."""

    def __init__(self, rank: int, ledger: Ledger, neighbours: Neighbours) -> None:
        self._rank, self._ledger, self._neighbours = rank, ledger, neighbours
        self._room = torch.empty(0)

    def carry_out(self, sums: Sequence[Sum], post: Post, wait: Wait) -> None:
        """All sums at once, so that those that only receive one report another meanwhile.

        `post(sends, tensor, rank)` starts to send or to receive, `wait` sees what was started end, once.
        """
        self._post, self._wait = post, wait
        self._leaving: dict[int, list[Any]] = {}  # sends of chunks, by address
        self._notes: list[tuple[Any, Tensor]] = []  # sends of notes, which live as long
        self._readers, self._read = set[int](), set[int]()
        moves = self._moves(sums)
        coming = deque((move, chunk) for move in moves for chunk in self._arriving(move))
        expected: deque[_Arrival] = deque()
        slots = cycle(self._slots(sums[0].tensor))

        def look_ahead(step: int) -> None:
            # Before this rank sends: over TCP the word that it is ready to receive would queue behind what it sends.
            while coming and len(expected) < AHEAD and coming[0][0].vacant <= step:
                expected.append(self._expect(*coming.popleft(), next(slots)))

        for move in moves:
            look_ahead(move.step)
            if move.source is None:
                if move.weight != 1:
                    move.piece.mul_(move.weight)
                    _complete(move.piece)
                self._send(move, move.piece)
            for _ in self._arriving(move):
                look_ahead(move.step)
                arrival = expected.popleft()
                self._take(move, arrival)
                self._send(move, arrival.chunk)
            self._tell(move)
        wait([handle for handles in self._leaving.values() for handle in handles])
        wait([handle for handle, _ in self._notes])
        self._leaving.clear()  # a handle keeps alive what it sent
        self._notes.clear()
        self._release()

    def _moves(self, sums: Sequence[Sum]) -> list[_Move]:
        """What this rank has to do, in the order in which all ranks have it."""
        flat = [one.tensor.view(-1) for one in sums]
        shares = [hops(t.numel(), one.reporters, one.receivers, self._rank) for one, t in zip(sums, flat, strict=True)]
        weights = [one.weight(self._rank) if self._rank in one.reporters else 1.0 for one in sums]
        # A reporter has sent its share of a piece on before it expects the sum to take its place. A neighbour may not
        # have read that share by then, but it has by the time the sum comes, which has in it what was read.
        rounds = [len(one.reporters) - 1 if self._rank in one.reporters else sys.maxsize for one in sums]
        moves = []
        for step, at_once in enumerate(zip_longest(*shares, fillvalue=())):
            for tensor, weight, round, here in zip(flat, weights, rounds, at_once, strict=True):
                for hop in here:
                    piece, vacant = tensor[slice(*hop.span)], 0 if hop.adds else step - round
                    moves.append(_Move(step, piece, hop.source, hop.adds, hop.to, weight, vacant))
        return moves

    # --- receiving

    def _arriving(self, move: _Move) -> Sequence[Tensor]:
        """What of a piece arrives at once: a neighbour's is there when its note is."""
        if move.source is None:
            return ()
        return _chunks(move.piece) if self._place(move.piece, move.source) is None else (move.piece,)

    def _slots(self, like: Tensor) -> Sequence[Tensor]:
        """Memory for chunks that are to be added, for as many as may be on their way."""
        size = max(1, CHUNK_BYTES // like.element_size())
        if (self._room.numel(), self._room.dtype, self._room.device) != (AHEAD * size, like.dtype, like.device):
            self._room = torch.empty(AHEAD * size, dtype=like.dtype, device=like.device)
        return self._room.split(size)

    def _expect(self, move: _Move, chunk: Tensor, slot: Tensor) -> _Arrival:
        """Be ready to receive a chunk: to be added from the slot, else in its place, as soon as what is there left."""
        assert move.source is not None
        for part in () if move.adds else _chunks(chunk):
            self._wait(self._leaving.pop(part.data_ptr(), ()))
        note = self._place(chunk, move.source) is not None
        target = torch.empty(PLACE, dtype=torch.int64) if note else slot[: len(chunk)] if move.adds else chunk
        return _Arrival(chunk, target, note, self._post(False, target, move.source))

    def _take(self, move: _Move, arrival: _Arrival) -> None:
        """Wait for it and put it in its place, or add what is there; whole numbers have no weights."""
        self._wait([arrival.handle])
        here, term = arrival.chunk, arrival.target
        if arrival.note:
            assert move.source is not None
            self._read.add(move.source)
            term = self._neighbours.view(move.source, arrival.target.tolist(), here)
        if term is here:
            return
        if not move.adds:
            here.copy_(term)
        elif move.weight == 1:
            here.add_(term)
        else:
            torch.add(term, here, alpha=move.weight, out=here)
        _complete(here)

    # --- sending

    def _send(self, move: _Move, part: Tensor) -> None:
        """Send what is here of a piece to those that are no neighbours."""
        for to in move.to:
            if self._place(move.piece, to) is None:
                self._ledger.count(part.nbytes)
                for chunk in _chunks(part):
                    self._leaving.setdefault(chunk.data_ptr(), []).append(self._post(True, chunk, to))

    def _tell(self, move: _Move) -> None:
        """Tell neighbours where a piece is."""
        for to in move.to:
            if (place := self._place(move.piece, to)) is not None:
                self._ledger.count(move.piece.nbytes)
                self._readers.add(to)
                note = torch.tensor(place)
                self._notes.append((self._post(True, note, to), note))

    def _release(self) -> None:
        """Tell those whose memory was read that it was, and hear the same of one's own."""
        words = {rank: torch.zeros(1, dtype=torch.int64) for rank in self._readers}
        done = torch.ones(1, dtype=torch.int64)
        heard = [self._post(False, word, rank) for rank, word in words.items()]
        self._wait(heard + [self._post(True, done, rank) for rank in self._read])

    def _place(self, piece: Tensor, rank: int) -> list[int] | None:
        """Where the two ranks that exchange a piece find theirs in each other's memory; None if it is sent."""
        return self._neighbours.place(piece) if rank in self._neighbours else None


def _complete(tensor: Tensor) -> None:
    """What a GPU is told to do with it is to be done before it is sent: MPI does not wait for kernels."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _chunks(piece: Tensor) -> Sequence[Tensor]:
    return piece.split(max(1, CHUNK_BYTES // piece.element_size()))
