"""One seed, many streams: each derives from (seed, purpose, client, round), never from a rank.

So a result does not depend on which rank hosts which client, on their number, or on a restart.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, client: int = 0, round: int = 0) -> int:
    """A 63-bit seed for one stream: SHA-256 of the four names, so that no two streams are related."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{client}/{round}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_stream(
    seed: int, purpose: str, client: int = 0, round: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator for the stream, on `device`."""
    return torch.Generator(device=device).manual_seed(derive(seed, purpose, client, round))


def numpy_stream(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """A NumPy generator for the stream."""
    return np.random.default_rng(derive(seed, purpose, client, round))
