"""Whose model draws which images on which rank, the same images for any number of ranks.

The work is cut into batches whose make-up does not follow the ranks: image i of a model starts from the noise of
seed i, in the same batch, wherever it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fdiff.config import Config, SampleConfig
from fdiff.plan import Placement


@dataclass(frozen=True)
class Batch:
    """Images [first, last) of one model: that of a client, or the global one (None), drawn by a rank."""

    model: int | None
    first: int
    last: int
    rank: int


def batches(
    models: Sequence[int | None], images: int, sample: SampleConfig, rank_of: Callable[[int], int], ranks: int
) -> list[Batch]:
    """Cut `images` images of each model into batches; a client's go to its host, the global model's to all in turn."""
    cut: list[Batch] = []
    for model in models:
        for i, first in enumerate(range(0, images, sample.batch_size)):
            rank = i % ranks if model is None else rank_of(model)
            cut.append(Batch(model, first, min(first + sample.batch_size, images), rank))
    return cut


def grid_batches(config: Config, by_client: bool, placement: Placement) -> list[Batch]:
    """Those of a round's sample grid: of the global model, or of each client where it keeps private parts."""
    models = list(range(len(placement))) if by_client else [None]
    return batches(models, config.sample.images, config.sample, lambda c: placement[c], max(placement) + 1)
