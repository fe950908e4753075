"""Who sends which piece of a tensor to whom, so that the sum over its reporters is on them and on its receivers.

Pure: every rank computes its own share without talking, and `forecast` the time that all take on a slow link.
Three phases, for r reporters and m receivers. Reduce: a piece of the tensor belongs to each reporter; on its way round
the ring of reporters to its owner each of them adds its own. Spread: the sums go round once more, and the owners hand
each receiver a part. Forward: the parts go round the ring of receivers. In all 2(r-1)+m tensors, of which no rank sends
many more than another, whether it reports or only receives; a broadcast is the case of one reporter.

In a ring a link carries one stream in each direction. Where all send to all at once the streams share a link as they
happen to, and what comes last waits (measured: 1.2 to 1.4 times as long with 8 ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # from, to (excluded)
PHASES = 3


@dataclass(frozen=True)
class Hop:
    """What a rank has to do with some elements: they come from another (`source`; None: they start here), what is here
    is added to them if `adds`, and takes their place if not, and then they are sent `to` others."""

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
    pieces: Sequence[tuple[int, int, Span]], reporters: Sequence[int], receivers: Sequence[int], at: int
) -> list[list[Hop]]:
    ring, steps = len(reporters), []
    following, before = reporters[(at + 1) % ring], reporters[at - 1]
    for step in range(2 * ring - 1):
        source = before if step else None
        onward = (following,) if step < 2 * ring - 2 else ()
        complete = step == ring - 1  # the piece of this rank's own
        steps.append(
            [
                Hop(span, source, 0 < step < ring, onward + ((receivers[part],) if complete and receivers else ()))
                for owner, part, span in pieces
                if owner == (at - 1 - step) % ring
            ]
        )
    return steps


def _receiving(
    pieces: Sequence[tuple[int, int, Span]], reporters: Sequence[int], receivers: Sequence[int], at: int
) -> list[list[Hop]]:
    ring = len(receivers)
    steps: list[list[Hop]] = [[] for _ in reporters]  # until the owners' pieces are complete
    for step in range(ring):
        onward = (receivers[(at + 1) % ring],) if step < ring - 1 else ()
        steps.append(
            [
                Hop(span, receivers[at - 1] if step else reporters[owner], False, onward)
                for owner, part, span in pieces
                if part == (at - step) % ring
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


def _pieces(size: int, reporters: Sequence[int], receivers: Sequence[int]) -> list[tuple[int, int, Span]]:
    """All elements in order, none twice: which reporter owns them, which receiver is handed them first, by position."""
    cuts = [_edges(size, reporters), _edges(size, receivers)]
    edges = sorted({0, size}.union(*cuts))
    spans = [(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    owner, part = (_holders(spans, cut) for cut in cuts)
    return list(zip(owner, part, spans, strict=True))


def _holders(spans: Sequence[Span], edges: Sequence[int]) -> list[int]:
    """In which of the ranges between the edges each span lies."""
    return [sum(edge <= start for edge in edges[1:]) for start, _ in spans]


def _edges(size: int, ranks: Sequence[int]) -> list[int]:
    """Where to cut all elements into as equal ranges as possible, one a rank."""
    return [size * i // max(1, len(ranks)) for i in range(len(ranks) + 1)]


def _sizes(size: int, ranks: Sequence[int]) -> list[int]:
    edges = _edges(size, ranks)
    return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
