"""Gaussian noise as a pure function of (key, image, step, pixel): Philox 4x32-10 and Box–Muller, in torch.

A sampled image then does not depend on the batch it is drawn in, on the rank or on the device's own generator
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of the counter → four random words; all are int64 tensors of one shape with values in [0, 2^32).

    `key` has 64 bits, the low word first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32×32-bit product; int64 wraps around, which keeps all 64 bits."""
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def normal(key: int, images: Tensor, step: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), float32, of the images with the given indices (B,) int64 at a step.

    `step` is a number or an int64 tensor of no dimension, at most 2^32 - 1, as is each index.
    """
    numel = math.prod(shape)
    block = torch.arange((numel + 3) // 4, device=images.device).expand(len(images), -1)
    counter = (block, images[:, None].expand_as(block), torch.zeros_like(block) + step, torch.zeros_like(block))
    words = philox(counter, key)
    pairs = [_box_muller(words[0], words[1]), _box_muller(words[2], words[3])]
    flat = torch.cat([n for pair in pairs for n in pair], dim=1)[:, :numel]
    return flat.reshape(len(images), *shape)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # The upper 24 bits and a half: exact in float32 and never 0, so the logarithm is finite.
    u1, u2 = ((w >> 8).float().add_(0.5).mul_(2.0**-24) for w in (a, b))
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), (2.0 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)
