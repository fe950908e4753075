"""PowerSGD (Vogels et al. 2019, algorithm 1): matrices as products of two thin factors, which are what is summed.

A parameter of two or more dimensions is a matrix M, out × (in · kh · kw). With Q of the last round, P = Σ M_k Q is
summed and made orthonormal, then Q = Σ M_kᵀ P̂ is summed, and the sum of the M_k is P̂ Qᵀ. A matrix for which this is no
saving is summed as it is, with all parameters that are none. Q is the same on all ranks, and the federation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fdiff import seeds
from fdiff.compression.sums import Exchange, Share
from fdiff.model import Slot


def matrix_shape(slot: Slot, rank: int) -> tuple[int, int] | None:
    """(n, m) of a parameter that is sent as factors of this rank; None of one that is sent as it is."""
    if len(slot.shape) < 2:
        return None
    n, m = slot.shape[0], prod(slot.shape[1:])
    return (n, m) if rank * (n + m) < n * m else None


def dense_of(slots: Sequence[Slot], rank: int) -> int:
    """Values of a part that are sent as they are."""
    return sum(slot.numel for slot in slots if matrix_shape(slot, rank) is None)


def factor_sizes(slots: Sequence[Slot], rank: int) -> tuple[int, int]:
    """Elements of all P and of all Q of these parameters."""
    shapes = [shape for slot in slots if (shape := matrix_shape(slot, rank))]
    return sum(n * rank for n, _ in shapes), sum(m * rank for _, m in shapes)


def first_factors(slots: Sequence[Slot], rank: int, seed: int) -> Tensor:
    """The Q (q,) of all matrices with which a run begins: normal random numbers, float32, on the CPU."""
    return torch.randn(factor_sizes(slots, rank)[1], generator=seeds.torch_stream(seed, "low-rank"))


def average(exchange: Exchange, shares: Sequence[Share]) -> None:
    """See `average_updates`."""
    assert exchange.factors is not None
    q_of = _split_factors(exchange)
    made = [_Factored(exchange, share, q_of) for share in shares]
    sums = exchange.sum_terms(shares, [m.first_terms() for m in made], [m.first_like() for m in made])
    for one, summed in zip(made, sums, strict=True):
        one.take_first(summed)
    sums = exchange.sum_terms(shares, [m.second_terms() for m in made], [m.second_like() for m in made])
    for one, summed in zip(made, sums, strict=True):
        one.take_second(summed)


def _split_factors(exchange: Exchange) -> dict[str, Tensor]:
    """Q (m, rank) of each matrix by its name, views of the exchange's factors."""
    rank, start, found = exchange.config.rank, 0, {}
    assert exchange.factors is not None
    for slot in exchange.layout:
        if shape := matrix_shape(slot, rank):
            count = shape[1] * rank
            found[slot.name] = exchange.factors[start : start + count].view(shape[1], rank)
            start += count
    return found


class _Factored:
    """A share on its way: its matrices by their ranges in `out`, what is dense, and the factors as they come."""

    def __init__(self, exchange: Exchange, share: Share, q_of: dict[str, Tensor]) -> None:
        self.share, self._rank = share, exchange.config.rank
        self._matrices: list[tuple[slice, tuple[int, int], Tensor]] = []
        dense = []
        for part, span in share.parts.items():
            for slot in exchange.slots(part):
                start = span.start + slot.offset
                where = slice(start, start + slot.numel)
                if shape := matrix_shape(slot, self._rank):
                    self._matrices.append((where, shape, q_of[slot.name]))
                else:
                    dense.append(torch.arange(where.start, where.stop))
        self._dense = torch.cat([torch.empty(0, dtype=torch.int64), *dense]).to(share.out.device)
        self._p: list[Tensor] = []

    def first_terms(self) -> list[Tensor]:
        """Of each hosted client M_k Q of all matrices, and what is dense."""
        return [self._first(self.share.update(client)) for client in self.share.hosted]

    def first_like(self) -> Tensor:
        count = sum(n * self._rank for _, (n, _), _ in self._matrices) + len(self._dense)
        return torch.empty(count, dtype=self.share.out.dtype, device=self.share.out.device)

    def _first(self, update: Tensor) -> Tensor:
        products = [(update[where].view(shape) @ q).reshape(-1) for where, shape, q in self._matrices]
        return torch.cat([*products, update[self._dense]])

    def take_first(self, summed: Tensor) -> None:
        """P̂ of each matrix; what is dense is done."""
        sizes = [n * self._rank for _, (n, _), _ in self._matrices]
        *products, dense = summed.split([*sizes, len(self._dense)])
        shapes = [shape for _, shape, _ in self._matrices]
        self._p = [torch.linalg.qr(p.view(n, self._rank))[0] for p, (n, _) in zip(products, shapes, strict=True)]
        self.share.out[self._dense] = dense

    def second_terms(self) -> list[Tensor]:
        """Of each hosted client M_kᵀ P̂ of all matrices; what goes through is kept, if anybody wants to know."""
        terms = []
        for client in self.share.hosted:
            update = self.share.update(client)
            factors = [update[w].view(s).T @ p for (w, s, _), p in zip(self._matrices, self._p, strict=True)]
            if self.share.keep:
                sent = update.clone()
                for (where, _, _), p, q in zip(self._matrices, self._p, factors, strict=True):
                    sent[where] = (p @ q.T).reshape(-1)
                self.share.keep(client, sent)
            terms.append(torch.cat([q.reshape(-1) for q in factors]) if factors else update[:0])
        return terms

    def second_like(self) -> Tensor:
        count = sum(m * self._rank for _, (_, m), _ in self._matrices)
        return torch.empty(count, dtype=self.share.out.dtype, device=self.share.out.device)

    def take_second(self, summed: Tensor) -> None:
        """The sums P̂ Qᵀ; Q is where the next round begins, but for one that is nothing, from which none would come."""
        sizes = [m * self._rank for _, (_, m), _ in self._matrices]
        for (where, (_, m), q), p, flat in zip(self._matrices, self._p, summed.split(sizes), strict=True):
            found = flat.view(m, self._rank)
            self.share.out[where] = (p @ found.T).reshape(-1)
            q.copy_(torch.where(found.norm(dim=0) > 0, found, q))
