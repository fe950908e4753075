"""Who sends which piece of a tensor to whom, so that the sum over its reporters is on them and on its receivers.

Pure: every rank computes its own share without talking, and `forecast` the time that all take on a slow link.
Three phases, for r reporters and m receivers. Reduce: a piece of the tensor belongs to each reporter; on its way round
the ring of reporters to its owner each of them adds its own. Spread: the sums go round once more, and the owners hand
each receiver a part. Forward: the parts go round the ring of receivers. In all 2(r-1)+m tensors, of which a reporter
sends less than two and a receiver less than one; a broadcast is the case of one reporter.

In a ring a link carries one stream in each direction. Where all send to all at once the streams share a link as they
happen to, and what comes last is waited for: with 8 ranks that took 1.3 to 1.6 times what `forecast` says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # from, to (excluded)
PHASES = 3


@dataclass(frozen=True)
class Hop:
    """What a rank has to do with some elements: they come from another (`source`; None: they start here), are added to
    what is here if it `adds`, else take its place, and then go on `to` others."""

    span: Span
    source: int | None
    adds: bool
    to: tuple[int, ...]


def hops(size: int, reporters: Sequence[int], receivers: Sequence[int], rank: int) -> list[list[Hop]]:
    """A rank's share in the sum of tensors of so many elements, step by step; both groups are sorted and disjoint.

    What is sent in one step arrives in the next. In each step elements follow each other in the same order everywhere.
    """
    pieces = _pieces(size, reporters, receivers)
    if rank in reporters:
        return _reporting(pieces, reporters, receivers, reporters.index(rank))
    if rank in receivers:
        return _receiving(pieces, reporters, receivers, receivers.index(rank))
    return []


def _reporting(
    pieces: Sequence[_Piece], reporters: Sequence[int], receivers: Sequence[int], at: int
) -> list[list[Hop]]:
    """Of the reporter at this position: twice round the ring, first to be added up, then to be spread."""
    ring, steps = len(reporters), []
    following, before = reporters[(at + 1) % ring], reporters[at - 1]
    owned = _grouped(pieces, ring, lambda piece: piece.owner)
    for step in range(2 * ring - 1):
        source = before if step else None
        onward = (following,) if step < 2 * ring - 2 else ()
        handed = step == ring - 1 and len(receivers) > 0  # the piece of this rank's own
        steps.append(
            [
                Hop(piece.span, source, 0 < step < ring, (*onward, *((receivers[piece.part],) if handed else ())))
                for piece in owned[(at - 1 - step) % ring]
            ]
        )
    return steps


def _receiving(
    pieces: Sequence[_Piece], reporters: Sequence[int], receivers: Sequence[int], at: int
) -> list[list[Hop]]:
    """Of the receiver at this position: a part from its owners, the others round the ring."""
    ring = len(receivers)
    following, before = receivers[(at + 1) % ring], receivers[at - 1]
    parts = _grouped(pieces, ring, lambda piece: piece.part)
    steps: list[list[Hop]] = [[] for _ in reporters]  # until the owners' pieces are complete
    for step in range(ring):
        onward = (following,) if step < ring - 1 else ()
        steps.append(
            [
                Hop(piece.span, before if step else reporters[piece.owner], False, onward)
                for piece in parts[(at - step) % ring]
            ]
        )
    return steps


def loads(size: int, reporters: Sequence[int], receivers: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Elements that each rank sends and receives in each phase: what `hops` of all of them add up to."""
    of_rank = {}
    owned, handed = _sizes(size, reporters), _sizes(size, receivers)
    for i, rank in enumerate(reporters):
        own, to_receivers = owned[i], owned[i] if receivers else 0
        reduce, spread = size - own, size - owned[(i + 1) % len(owned)]
        of_rank[rank] = [(reduce, size - owned[i - 1]), (spread + to_receivers, size - own), (0, 0)]
    for i, rank in enumerate(receivers):
        own = handed[i]
        of_rank[rank] = [(0, 0), (0, own), (size - handed[(i + 1) % len(handed)], size - own)]
    return of_rank


@dataclass(frozen=True)
class _Piece:
    """Elements that one reporter owns and one receiver is handed first, both by position."""

    span: Span
    owner: int
    part: int


def _pieces(size: int, reporters: Sequence[int], receivers: Sequence[int]) -> list[_Piece]:
    """All elements in order, none twice."""
    owners, parts = _edges(size, reporters), _edges(size, receivers)
    edges = sorted({0, size, *owners, *parts})
    return [
        _Piece((start, stop), bisect_right(owners, start) - 1, bisect_right(parts, start) - 1)
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


def _grouped(pieces: Sequence[_Piece], groups: int, which: Callable[[_Piece], int]) -> list[list[_Piece]]:
    grouped: list[list[_Piece]] = [[] for _ in range(groups)]
    for piece in pieces:
        grouped[which(piece)].append(piece)
    return grouped


def _edges(size: int, ranks: Sequence[int]) -> list[int]:
    """Where to cut all elements into as equal ranges as possible, one a rank."""
    return [size * i // max(1, len(ranks)) for i in range(len(ranks) + 1)]


def _sizes(size: int, ranks: Sequence[int]) -> list[int]:
    edges = _edges(size, ranks)
    return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
