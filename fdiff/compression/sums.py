"""What the kinds have in common: shares of the model, updates of clients, and sums of their terms over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdiff.comm import Communicator, Sum, pass_on
from fdiff.config import CompressionConfig
from fdiff.model import Slot


@dataclass(frozen=True)
class Share:
    """A run of neighbouring parts that the same clients report, as one rank sees it.

    `parts` are their ranges in `out` (n,), into which the sum goes. `hosts` has the rank of each client that reports,
    in order. `update(client)` is w_k Δ_k (n,) of a client on this `rank`, with what was left out of it before. With
    error feedback `keep(client, sent)` takes what of that was sent.
    """

    parts: Mapping[str, slice]
    out: Tensor
    hosts: Mapping[int, int]
    rank: int
    update: Callable[[int], Tensor]
    keep: Callable[[int, Tensor], None] | None = None

    @property
    def hosted(self) -> list[int]:
        """The clients that this rank reports for."""
        return [client for client, rank in self.hosts.items() if rank == self.rank]

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that report, sorted."""
        return tuple(sorted(set(self.hosts.values())))


@dataclass
class Exchange:
    """One round's sums: over whom, how, and with which random numbers. `stream` names these among others of the run.

    `factors` are low-rank's Q (q,) of the last round, and afterwards of this one.
    """

    comm: Communicator
    config: CompressionConfig
    layout: Sequence[Slot]
    seed: int
    round: int
    stream: str = "parameters"
    ordered: bool = False
    factors: Tensor | None = field(default=None, repr=False)

    def slots(self, part: str) -> list[Slot]:
        """Where each parameter of a part lies in it."""
        return [slot for slot in self.layout if slot.part == part]

    def receivers(self, share: Share) -> tuple[int, ...]:
        """The ranks that do not report a share."""
        return tuple(rank for rank in range(self.comm.size) if rank not in share.ranks)

    def combine(self, shares: Sequence[Share], tensors: Sequence[Tensor], largest: bool = False) -> None:
        """Sum what each reporting rank has for each share, or take the largest, in place, on all ranks."""
        pairs = zip(shares, tensors, strict=True)
        self.comm.combine([Sum(t, s.ranks, self.receivers(s), largest=largest) for s, t in pairs])

    def sum_terms(
        self, shares: Sequence[Share], terms: Sequence[Sequence[Tensor]], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """The sum of all clients' terms of each share, on all ranks; `terms` are those of this rank, in client order.

        `like` has a tensor of their shape. With `ordered` strictly in client order.
        """
        if self.ordered:
            return [self._in_order(*each) for each in zip(shares, terms, like, strict=True)]
        pairs = zip(terms, like, strict=True)
        sums = [sum(those[1:], start=those[0]) if those else torch.empty_like(t) for those, t in pairs]
        self.combine(shares, sums)
        return sums

    def _in_order(self, share: Share, terms: Sequence[Tensor], like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        pass_on(self.comm, terms, out, share.ranks)
        return out


def average_updates(exchange: Exchange, shares: Sequence[Share]) -> None:
    """Put Σ w_k Δ_k, as far as the compression lets it through, into `out` of each share. Every rank calls it."""
    from fdiff.compression import low_rank, quantize, sparsify  # here: each of them needs what is above

    kinds: dict[str, Callable[[Exchange, Sequence[Share]], None]] = {
        "quantize": quantize.average,
        "random-k": sparsify.average_random,
        "top-k": sparsify.average_largest,
        "low-rank": low_rank.average,
    }
    kinds[exchange.config.kind](exchange, shares)
