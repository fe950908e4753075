"""Plan × buckets × communicator: the weighted mean Σ n_k θ_k / Σ n_k of the shared parts (paper, algorithm 1).

`fast`: each rank adds up what its own clients report, the reporting ranks all-reduce and deliver to those that did not
report, all segments at once. `ordered`: the same sum strictly in client order, passed on from rank to rank, so that it
is bit-equal for any number of ranks; it sends as many bytes, one after the other.

Order of calls: `add` for every hosted client that trained, in client order, then `finish` once, on every rank.
Whoever hosts several clients scales at once, before it is known whether all clients will report, and where some were
dropped once more; a client alone on its rank is scaled on the way, when it is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fdiff.comm import Communicator, Sum, pass_on
from fdiff.plan import Placement, RoundPlan, hosted_at, reporting_ranks


class Aggregation:
    """One round's averages, in `out`: the range of all shared parts, on every rank.

    `weights` has n_k of each client, `slices` the range of each part within `out`. A client's own parameters may be
    `out` itself (one client a rank: everything happens in place) or another tensor of its size. Where a rank hosts
    several clients, `reserve` has it keep all that its first one trained, in case that is left to report a part alone.
    """

    def __init__(
        self,
        plan: RoundPlan,
        weights: Mapping[int, float],
        out: Tensor,
        slices: Mapping[str, slice],
        placement: Placement,
        comm: Communicator,
        ordered: bool,
        purpose: str = "parameters",
        reserve: bool = False,
    ) -> None:
        self._plan, self._weights, self._out = plan, weights, out
        self._slices, self._placement, self._comm, self._ordered = slices, placement, comm, ordered
        self._purpose, self._keeps_reserve = purpose, reserve
        self._reserve: Tensor | None = None
        self._segments = [
            (slice(slices[parts[0]].start, slices[parts[-1]].stop), reporters) for parts, reporters in plan.segments()
        ]
        self._started = [False] * len(self._segments)
        self._terms: list[list[Tensor]] = [[] for _ in self._segments]

    def add(self, client: int, parameters: Tensor) -> None:
        """Take from a client, fresh from training, the segments that it reports; `parameters` has `out`'s shape."""
        if self._reserve is None:
            copies = self._keeps_reserve and parameters is not self._out
            self._reserve = parameters.clone() if copies else parameters
        for i, (span, reporters) in enumerate(self._segments):
            if client not in reporters:
                continue
            weight, in_place = self._weights[client] / self._total(reporters), parameters is self._out
            if self._ordered:
                self._terms[i].append(_scaled(parameters[span], weight, in_place))
            elif self._alone(self._comm.rank) is not None:
                if not in_place:
                    self._out[span].copy_(parameters[span])
            elif self._started[i]:
                self._out[span].add_(parameters[span], alpha=weight)
            else:
                torch.mul(parameters[span], weight, out=self._out[span])
            self._started[i] = True

    def finish(self, dropped: Collection[int] = ()) -> None:
        """Average all segments, the same on every rank.

        `dropped`, the same on every rank, are clients of the plan that were not added, though not all of them; see
        `RoundPlan.without`.
        """
        segments = range(len(self._segments))
        left = [self._left(i, dropped) for i in segments]
        ranks = [reporting_ranks(those, self._placement) for those in left]
        with self._comm.ledger.purpose(self._purpose):
            if not self._ordered:
                self._comm.combine([self._sum(i, left[i], ranks[i]) for i in segments])
                return
            for i in segments:
                terms, self._terms[i] = self._terms[i], []
                pass_on(self._comm, terms, self._out[self._segments[i][0]], ranks[i])
        for (span, reporters), those in zip(self._segments, left, strict=True):
            if set(those) < set(reporters):
                self._out[span].mul_(self._total(reporters) / self._total(those))

    def state(self) -> dict[str, Tensor]:
        """What was added so far; see `restore`."""
        terms = {f"term-{i}-{k}": t for i, terms in enumerate(self._terms) for k, t in enumerate(terms)}
        reserve = {"reserve": self._reserve} if self._reserve is not None and self._keeps_reserve else {}
        return {"sum": self._out, **terms, **reserve}

    def restore(self, added: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Go on after these clients were added, from the `state` then, in place of adding them again."""
        self._out.copy_(state["sum"])
        self._reserve = state["reserve"].to(self._out.device) if "reserve" in state else self._out
        for i, (_, reporters) in enumerate(self._segments):
            self._started[i] = any(client in reporters for client in added)
            terms = [state[name] for k in range(len(added)) if (name := f"term-{i}-{k}") in state]
            self._terms[i] = [term.to(self._out.device) for term in terms]

    def _left(self, i: int, dropped: Collection[int]) -> tuple[int, ...]:
        """The clients that report a segment; if one steps in for all who were to, it is now its rank's term."""
        span, reporters = self._segments[i]
        left = tuple(c for c in reporters if c not in dropped)
        if left:
            return left
        self._segments[i] = (span, left := self._plan.without(dropped).selected[:1])
        if reporting_ranks(left, self._placement) == (self._comm.rank,):
            assert self._reserve is not None
            self._terms[i] = [self._reserve[span]]
            self._out[span].copy_(self._reserve[span])
        return left

    def _sum(self, i: int, left: Sequence[int], ranks: tuple[int, ...]) -> Sum:
        """What the ranks are to do for a segment that these clients, on these ranks, report."""
        span, reporters = self._segments[i]
        receivers = tuple(r for r in range(self._comm.size) if r not in ranks)
        weights = {rank: self._unscaled(rank, reporters) / self._total(left) for rank in ranks}
        if ranks == (self._comm.rank,):  # nothing to add up
            _scaled(self._out[span], weights[self._comm.rank], in_place=True)
        return Sum(self._out[span], ranks, receivers, weights if len(ranks) > 1 else None)

    def _unscaled(self, rank: int, reporters: Sequence[int]) -> float:
        """By what the terms that a rank has added up are still to be multiplied, and divided by the sum of weights."""
        client = self._alone(rank)
        return self._total(reporters) if client is None else self._weights[client]

    def _total(self, clients: Sequence[int]) -> float:
        return sum(self._weights[c] for c in clients)

    def _alone(self, rank: int) -> int | None:
        """The client that is its rank's only one."""
        hosted = hosted_at(self._placement, rank)
        return hosted[0] if len(hosted) == 1 else None


def _scaled(tensor: Tensor, weight: float, in_place: bool) -> Tensor:
    if in_place:
        return tensor if weight == 1 else tensor.mul_(weight)
    return tensor * weight


