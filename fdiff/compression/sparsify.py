"""Some of the values only: the same random ones of all reporters, or the largest of each."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from fdiff import seeds
from fdiff.compression.sums import Exchange, Share


def kept_of(values: int, fraction: float) -> int:
    """How many of a part's values are sent: ⌈fraction · n⌉."""
    return min(values, ceil(fraction * values - 1e-9))  # 0.1 of 30 is 3, whatever 0.1 is in binary


def average_random(exchange: Exchange, shares: Sequence[Share]) -> None:
    """random-k: m of n positions, new each round and the same on all ranks, so that their values are summed densely.

    Without error feedback the sum is multiplied by n / m, which makes it unbiased.
    """
    feeds_back = exchange.config.feeds_back
    positions = [_positions(exchange, share) for share in shares]
    terms, like = [], []
    for share, at in zip(shares, positions, strict=True):
        terms.append([_chosen(share, client, at) for client in share.hosted])
        like.append(torch.empty(len(at), dtype=share.out.dtype, device=share.out.device))
    sums = exchange.sum_terms(shares, terms, like)
    for share, at, summed in zip(shares, positions, sums, strict=True):
        share.out.zero_()
        share.out[at] = summed
        if not feeds_back:
            for span in share.parts.values():
                count = span.stop - span.start
                share.out[span] *= count / max(1, kept_of(count, exchange.config.fraction))


def _chosen(share: Share, client: int, at: Tensor) -> Tensor:
    update = share.update(client)
    chosen = update[at]
    if share.keep:
        share.keep(client, torch.zeros_like(update).index_copy_(0, at, chosen))
    return chosen


def _positions(exchange: Exchange, share: Share) -> Tensor:
    """The positions (m,) int64 in a share, part by part."""
    found = []
    for part, span in share.parts.items():
        count = span.stop - span.start
        stream = seeds.torch_stream(exchange.seed, f"positions {part}", round=exchange.round)
        chosen = torch.randperm(count, generator=stream)[: kept_of(count, exchange.config.fraction)]
        found.append(chosen.sort().values + span.start)
    return torch.cat(found).to(share.out.device)


def average_largest(exchange: Exchange, shares: Sequence[Share]) -> None:
    """top-k: the m largest by magnitude of each reporter, as pairs of position and value, added in client order."""
    for share in shares:
        share.out.zero_()
        for client, rank in share.hosts.items():
            pairs = _largest(exchange, share, client) if rank == share.rank else _room(exchange, share)
            exchange.comm.broadcast(pairs, rank, tuple(range(exchange.comm.size)))
            at, values = _unpaired(pairs, share.out.dtype)
            share.out.index_add_(0, at, values)


def _count(exchange: Exchange, share: Share) -> int:
    return sum(kept_of(span.stop - span.start, exchange.config.fraction) for span in share.parts.values())


def _room(exchange: Exchange, share: Share) -> Tensor:
    """Memory for another rank's pairs: int32 words, a position and then the value's own."""
    words = 1 + share.out.element_size() // 4
    return torch.empty(words * _count(exchange, share), dtype=torch.int32, device=share.out.device)


def _largest(exchange: Exchange, share: Share, client: int) -> Tensor:
    update = share.update(client)
    found = []
    for span in share.parts.values():
        piece = update[span]
        top = piece.abs().topk(kept_of(len(piece), exchange.config.fraction), sorted=False).indices
        found.append(top.sort().values + span.start)
    at = torch.cat(found)
    values = update[at]
    if share.keep:
        share.keep(client, torch.zeros_like(update).index_copy_(0, at, values))
    return torch.cat([at.to(torch.int32), values.view(torch.int32)])


def _unpaired(pairs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (m,) int64 and values (m,) of words as `_largest` makes them."""
    count = len(pairs) // (1 + torch.empty(0, dtype=dtype).element_size() // 4)
    return pairs[:count].long(), pairs[count:].clone().view(dtype)
