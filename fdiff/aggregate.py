"""Plan × buckets × communicator: the weighted mean Σ n_k θ_k / Σ n_k of the shared parts (paper, algorithm 1).

`fast`: each rank adds up what its own clients report, the reporting ranks all-reduce and deliver to those that did not
report, all segments at once. `ordered`: the same sum strictly in client order, passed on from rank to rank, so that it
is bit-equal for any number of ranks; it sends as many bytes, one after the other.

Order of calls: `add` for every hosted client that trained, in client order, then `finish` once, on every rank.
`add` scales at once, before it is known whether all clients will report; where some were dropped, the sum of the
others' terms is scaled once more, by the same factor on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fdiff.comm import Communicator, Sum
from fdiff.plan import RoundPlan, reporting_ranks


class Aggregation:
    """One round's averages, in `out`: the range of all shared parts, on every rank.

    `weights` has n_k of each client, `slices` the range of each part within `out`. A client's own parameters may be
    `out` itself (one client a rank: everything happens in place) or another tensor of its size. `before` (like `out`)
    is what a part keeps if all its reporters are dropped; it is not needed where none is.
    """

    def __init__(
        self,
        plan: RoundPlan,
        weights: Mapping[int, float],
        out: Tensor,
        slices: Mapping[str, slice],
        clients: int,
        comm: Communicator,
        ordered: bool,
        purpose: str = "parameters",
        before: Tensor | None = None,
    ) -> None:
        self._plan, self._weights, self._out = plan, weights, out
        self._slices, self._clients, self._comm, self._ordered = slices, clients, comm, ordered
        self._purpose, self._before = purpose, before
        self._segments = [
            (slice(slices[parts[0]].start, slices[parts[-1]].stop), reporters) for parts, reporters in plan.segments()
        ]
        self._started = [False] * len(self._segments)
        self._terms: list[list[Tensor]] = [[] for _ in self._segments]

    def add(self, client: int, parameters: Tensor) -> None:
        """Take from a client, fresh from training, the segments that it reports; `parameters` has `out`'s shape."""
        for i, (span, reporters) in enumerate(self._segments):
            if client not in reporters:
                continue
            weight = self._weights[client] / sum(self._weights[c] for c in reporters)
            if self._ordered:
                self._terms[i].append(_scaled(parameters[span], weight, parameters is self._out))
            elif self._started[i]:
                self._out[span].add_(parameters[span], alpha=weight)
            else:
                torch.mul(parameters[span], weight, out=self._out[span])
            self._started[i] = True

    def finish(self, dropped: Collection[int] = ()) -> None:
        """Average all segments, the same on every rank.

        `dropped`, the same on every rank, are clients of the plan that were not added; they are averaged over as if
        they had not been selected.
        """
        left = [[c for c in reporters if c not in dropped] for _, reporters in self._segments]
        ranks = [reporting_ranks(those, self._clients, self._comm.size) for those in left]
        with self._comm.ledger.purpose(self._purpose):
            if self._ordered:
                for i in (i for i, those in enumerate(ranks) if those):
                    self._pass_on(i, ranks[i])
            else:
                self._comm.combine([self._sum(i, those) for i, those in enumerate(ranks) if those])
        for (span, reporters), those in zip(self._segments, left, strict=True):
            if len(those) < len(reporters):
                self._make_up(span, reporters, those)

    def _make_up(self, span: slice, reporters: Sequence[int], left: Sequence[int]) -> None:
        """What was scaled by n_k / Σ of all reporters is scaled to n_k / Σ of those left, if any."""
        if left:
            self._out[span].mul_(sum(self._weights[c] for c in reporters) / sum(self._weights[c] for c in left))
            return
        assert self._before is not None
        self._out[span].copy_(self._before[span])

    def _sum(self, i: int, ranks: tuple[int, ...]) -> Sum:
        receivers = tuple(r for r in range(self._comm.size) if r not in ranks)
        return Sum(self._out[self._segments[i][0]], ranks, receivers)

    def _pass_on(self, i: int, ranks: tuple[int, ...]) -> None:
        out = self._out[self._segments[i][0]]
        rank = self._comm.rank
        if rank in ranks:
            at = ranks.index(rank)
            terms = self._terms[i]
            if at > 0:
                so_far = torch.empty_like(out)
                self._comm.recv(so_far, ranks[at - 1])
                terms = [so_far, *terms]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            out.copy_(total)
            self._terms[i] = []
            if at + 1 < len(ranks):
                self._comm.send(out, ranks[at + 1])
        self._comm.broadcast(out, ranks[-1], tuple(range(self._comm.size)))


def _scaled(tensor: Tensor, weight: float, in_place: bool) -> Tensor:
    return tensor.mul_(weight) if in_place else tensor * weight


