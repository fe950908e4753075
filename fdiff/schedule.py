"""Who sends which piece of a tensor to whom, so that the sum over its reporters is on them and on its receivers.

Pure: every rank computes its own share without talking, and `forecast` the time that all take on a slow link.
Three phases, for r reporters and m receivers. Reduce: a piece of the tensor belongs to each reporter, and all others
send it theirs. Spread: each reporter sends its sum to the other reporters, and to each receiver a part of it. Forward:
each receiver sends what it got to the other receivers. In all 2(r-1)+m tensors, of which no rank sends many more than
another, whether it reports or only receives; a broadcast is the case of one reporter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Span = tuple[int, int]  # from, to (excluded)
PHASES = 3


@dataclass(frozen=True)
class Phase:
    """What a rank sends and receives at once: (other rank, elements).

    In the reduce phase it adds what it receives to its own share of the elements that it `owns`.
    """

    sends: list[tuple[int, Span]] = field(default_factory=list)
    receives: list[tuple[int, Span]] = field(default_factory=list)
    owns: Span | None = None

    @property
    def adds(self) -> bool:
        """Whether what it receives is to be added."""
        return self.owns is not None


def phases(size: int, reporters: Sequence[int], receivers: Sequence[int], rank: int) -> list[Phase]:
    """A rank's share of the three phases for a tensor of so many elements; both groups are sorted and disjoint."""
    owned, handed = _cut(size, reporters), _cut(size, receivers)
    if rank in owned:
        mine = owned.pop(rank)
        to_receivers = [(m, both) for m, part in handed.items() if (both := _overlap(mine, part))]
        everybody = [(r, mine) for r in owned if mine[0] < mine[1]]
        others = _filled(owned)
        return [Phase(others, everybody, owns=mine), Phase(everybody + to_receivers, others), Phase()]
    if rank in handed:
        mine = handed.pop(rank)
        from_owners = [(r, both) for r, piece in owned.items() if (both := _overlap(piece, mine))]
        everybody = [(m, mine) for m in handed if mine[0] < mine[1]]
        return [Phase(), Phase([], from_owners), Phase(everybody, _filled(handed))]
    return [Phase()] * PHASES


def loads(size: int, reporters: Sequence[int], receivers: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Elements that each rank sends and receives in each phase: what `phases` of all of them add up to."""
    r, m = len(reporters), len(receivers)
    of_rank = {}
    for rank, (start, stop) in _cut(size, reporters).items():
        own = stop - start
        of_rank[rank] = [(size - own, own * (r - 1)), (own * (r - 1 + (m > 0)), size - own), (0, 0)]
    for rank, (start, stop) in _cut(size, receivers).items():
        own = stop - start
        of_rank[rank] = [(0, 0), (0, own), (own * (m - 1), size - own)]
    return of_rank


def _cut(size: int, ranks: Sequence[int]) -> dict[int, Span]:
    """All elements in as equal pieces as possible, one a rank."""
    edges = [size * i // max(1, len(ranks)) for i in range(len(ranks) + 1)]
    return dict(zip(ranks, zip(edges, edges[1:], strict=False), strict=False))


def _overlap(a: Span, b: Span) -> Span | None:
    both = max(a[0], b[0]), min(a[1], b[1])
    return both if both[0] < both[1] else None


def _filled(pieces: Mapping[int, Span]) -> list[tuple[int, Span]]:
    return [(rank, span) for rank, span in pieces.items() if span[0] < span[1]]
