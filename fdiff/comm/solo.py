"""The world of one rank: the same calls, nothing to send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdiff.comm.base import Ledger, Sum


class SoloCommunicator:
    """One rank, which hosts every client."""

    name = "none"
    outlives = None
    rank = 0
    size = 1

    def __init__(self) -> None:
        self.ledger = Ledger()

    def open(self, device: torch.device, share_gpu: bool = False) -> None:
        """Nothing to make ready."""

    def combine(self, sums: Sequence[Sum]) -> None:
        """The sum over one rank is its tensor."""

    def all_reduce(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """The sum over one rank is its tensor."""

    def broadcast(self, tensor: Tensor, source: int, ranks: Sequence[int]) -> None:
        """Everybody has it."""

    def send(self, tensor: Tensor, to: int) -> None:
        """There is no other rank."""
        raise ValueError(f"rank {to} does not exist in a world of one")

    def recv(self, tensor: Tensor, source: int) -> None:
        """There is no other rank."""
        raise ValueError(f"rank {source} does not exist in a world of one")

    def exchange(self, value: bytes) -> list[bytes]:
        """Its own value."""
        return [value]

    def close(self) -> None:
        """Nothing to leave."""

    def abort(self) -> None:
        """Nobody waits."""
