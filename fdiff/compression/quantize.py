"""Stochastic k-level rounding (Suresh et al. 2017, section 2.2), summed as whole numbers.

For each block of values the reporters agree on s = max_k |w_k Δ_k|, by an all-reduce of maxima. Each of them rounds its
values at random, unbiased, to one of k levels evenly on [-s, s], numbered from 0 to k - 1. The numbers of r reporters
add up to at most r (k - 1), so a value has b = ⌈log2(r (k - 1) + 1)⌉ bits, and ⌊64 / b⌋ values share a word of 64 bits.
Words are summed modulo 2^64: fields never overflow into each other, nobody looks into them on the way, and the sum is
the same in any order. The variance of a coordinate of the sum is at most r s² / (k - 1)².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdiff import seeds
from fdiff.compression.sums import Exchange, Share

WORD = 64  # bits
ROWS = 512  # blocks that are worked on at a time: of larger pieces each step would go to memory and back
FEW_LEVELS = 2**8  # of which a level is a byte, and chances of 16 bits are fine enough
EXACT_LEVELS = 2**16  # up to which float32 has enough digits for a level and for the chance of the next one


def bits_of(levels: int, reporters: int) -> int:
    """Bits of a value's field: what the sum of so many reporters' levels needs."""
    return (reporters * (levels - 1)).bit_length()


def words_of(values: int, bits: int) -> int:
    """Words that hold so many values."""
    return -(-values // (WORD // bits))


def blocks_of(values: int, block: int) -> int:
    """Blocks of a part with so many values; the last one is padded."""
    return -(-values // block)


def average(exchange: Exchange, shares: Sequence[Share]) -> None:
    """See `average_updates`."""
    scales = [_largest(exchange, share) for share in shares]
    exchange.combine(shares, scales, largest=True)
    noise = {
        client: seeds.torch_stream(
            exchange.seed, f"quantize {exchange.stream}", client, exchange.round, shares[0].out.device
        )
        for client in sorted({client for share in shares for client in share.hosted})
    }
    words = [_encode(exchange, share, scale, noise) for share, scale in zip(shares, scales, strict=True)]
    exchange.combine(shares, words)
    for share, scale, summed in zip(shares, scales, words, strict=True):
        _decode(exchange, share, scale, summed)


def _largest(exchange: Exchange, share: Share) -> Tensor:
    """The largest magnitude in each block of this rank's updates, part by part; 0 where it reports nothing."""
    found = torch.zeros(sum(_blocks(exchange, share)), dtype=share.out.dtype, device=share.out.device)
    for client in share.hosted:
        update, of_parts = share.update(client), iter(found.split(_blocks(exchange, share)))
        for part, span in share.parts.items():
            pieces = _blocked(exchange, update[span], part).split(ROWS)
            for rows, piece in zip(next(of_parts).split(ROWS), pieces, strict=True):
                torch.maximum(rows, piece.abs().amax(1), out=rows)
    return found


def _encode(exchange: Exchange, share: Share, scales: Tensor, noise: dict[int, torch.Generator]) -> Tensor:
    """The words of this rank's reporters, added up."""
    levels, block = exchange.config.levels, exchange.config.block
    bits, blocks = bits_of(levels, len(share.hosts)), _blocks(exchange, share)
    sizes = [words_of(n * block, bits) for n in blocks]
    words = torch.zeros(sum(sizes), dtype=torch.int64, device=share.out.device)
    for client in share.hosted:
        update = share.update(client)
        sent = torch.empty_like(update) if share.keep else None
        of_parts = zip(share.parts.items(), words.split(sizes), scales.split(blocks), strict=True)
        for (part, span), into, scale in of_parts:
            rounded = round_to_levels(_blocked(exchange, update[span], part), scale, levels, noise[client])
            pack(rounded.view(-1), bits, into)
            if sent is not None:
                values = values_of(rounded.to(_exact(levels, scale)), scale, levels, 1)
                sent[span] = _unblocked(exchange, values, part, span.stop - span.start)
        if share.keep and sent is not None:
            share.keep(client, sent)
    return words


def _decode(exchange: Exchange, share: Share, scales: Tensor, words: Tensor) -> None:
    """Put the sum that the words hold into `out`."""
    levels, reporters, block = exchange.config.levels, len(share.hosts), exchange.config.block
    bits, blocks = bits_of(levels, reporters), _blocks(exchange, share)
    sizes = [words_of(n * block, bits) for n in blocks]
    pieces = zip(share.parts.items(), words.split(sizes), scales.split(blocks), blocks, strict=True)
    for (part, span), piece, scale, count in pieces:
        summed = unpack(piece, bits, count * block, scale.dtype).view(-1, block)
        values = values_of(summed, scale, levels, reporters)
        share.out[span] = _unblocked(exchange, values, part, span.stop - span.start)


# --- levels ----------------------------------------------------------------------------------------------------------


def round_to_levels(values: Tensor, scales: Tensor, levels: int, noise: torch.Generator) -> Tensor:
    """The level (n, block) of each value, from 0 to k - 1, up or down at random so that its mean is right.

    `scales` (n,) are those of the blocks; where one is 0 the level means nothing. Of few levels uint8, else float.
    """
    exact = _exact(levels, values)
    per_value = torch.where(scales > 0, (levels - 1) / 2 / scales.to(exact), 0)[:, None]
    per_value.clamp_(max=torch.finfo(exact).max)  # of a scale that is next to nothing
    few = levels <= FEW_LEVELS
    found = torch.empty(values.shape, dtype=torch.uint8 if few else exact, device=values.device)
    for rows, piece, factor in zip(found.split(ROWS), values.split(ROWS), per_value.split(ROWS), strict=True):
        chance = (_chances if few else torch.rand)(piece.shape, generator=noise, device=values.device).to(exact)
        rows.copy_(chance.addcmul_(piece.to(exact), factor).add_((levels - 1) / 2).floor_().clamp_(0, levels - 1))
    return found


def _chances(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers between 0 and 1 of 16 bits each, float32: four of each word that the slow generator makes."""
    made = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device)
    made.random_(-(2**63), None, generator=generator)
    return made.view(torch.int16)[: shape.numel()].view(shape).float().add_(2**15 + 0.5).mul_(2**-16)


def values_of(levels_sum: Tensor, scales: Tensor, levels: int, reporters: int) -> Tensor:
    """The sum (n, block) of the values whose levels, which are overwritten, add up to this."""
    for rows, scale in zip(levels_sum.split(ROWS), scales[:, None].split(ROWS), strict=True):
        rows.mul_(2 / (levels - 1) * scale).sub_(reporters * scale)
    return levels_sum.to(scales.dtype)


def _exact(levels: int, like: Tensor) -> torch.dtype:
    """A type of floats that has enough digits for such a level, and for the chance of the next one."""
    return like.dtype if levels <= EXACT_LEVELS else torch.float64


# --- words -----------------------------------------------------------------------------------------------------------


def pack(levels: Tensor, bits: int, words: Tensor) -> None:
    """Add levels (n,), whole numbers, to words (m,) int64 that hold as many fields: field j of word i is j m + i."""
    for field, piece in enumerate(levels.split(len(words))):
        shift = 1 << (field * bits)
        whole = piece if piece.dtype == torch.uint8 else piece.to(torch.int64)
        words[: len(piece)].add_(whole, alpha=shift if shift < 2**63 else -shift)  # modulo 2^64


def unpack(words: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` fields of the words, as `pack` has put them there, as floats that hold them exactly."""
    mask, exact = (1 << bits) - 1, torch.float64 if bits > 24 else dtype
    found = torch.empty(-(-count // len(words)) * len(words), dtype=exact, device=words.device)
    for field, piece in enumerate(found.split(len(words))):
        piece.copy_((words >> (field * bits)) & mask)
    return found[:count]


# --- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(exchange: Exchange, share: Share) -> list[int]:
    return [blocks_of(span.stop - span.start, exchange.config.block) for span in share.parts.values()]


def _blocked(exchange: Exchange, values: Tensor, part: str) -> Tensor:
    """A part's values (n,) in blocks, the last one filled up with zeros, and rotated if that is asked for."""
    block = exchange.config.block
    missing = -len(values) % block
    blocks = (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, block)
    return hadamard(blocks * _signs(exchange, part, blocks)) if exchange.config.rotate else blocks


def _unblocked(exchange: Exchange, blocks: Tensor, part: str, count: int) -> Tensor:
    """The inverse of `_blocked`."""
    if exchange.config.rotate:
        blocks = hadamard(blocks) * _signs(exchange, part, blocks)
    return blocks.reshape(-1)[:count]


def _signs(exchange: Exchange, part: str, blocks: Tensor) -> Tensor:
    """A sign for each value, the same on all ranks and new each round."""
    stream = seeds.torch_stream(exchange.seed, f"rotation {part}", round=exchange.round)
    signs = torch.randint(2, blocks.shape, generator=stream, dtype=torch.int8)
    return (2 * signs - 1).to(blocks.device, blocks.dtype)


def hadamard(blocks: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each row (n, 2^p): its own inverse."""
    width = blocks.shape[1]
    left = 2 ** ((width.bit_length() - 1) // 2)
    right = width // left  # H of the width is the Kronecker product of the two
    matrices = [_hadamard_matrix(size).to(blocks.device, blocks.dtype) for size in (left, right)]
    return (matrices[0] @ blocks.view(-1, left, right) @ matrices[1]).reshape(blocks.shape)


def _hadamard_matrix(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
