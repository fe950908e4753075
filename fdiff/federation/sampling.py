"""Sampling over all ranks: each draws its batches, and rank 0 has the images. See `sample_batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fdiff.comm import Communicator, agree, gather
from fdiff.config import Config
from fdiff.errors import RunError, UserError, one_line
from fdiff.federation.assemble import RankSetup
from fdiff.federation.client import Trainer
from fdiff.federation.progress import progress
from fdiff.federation.sample_batches import Batch, batches, grid_batches
from fdiff.federation.voting import Votes
from fdiff.model import diffusion

INDICES = 2**32  # of images that there is noise for: see `fdiff.model.noise`
Progress = Callable[[Iterable[int]], Iterable[int]]
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def check_numbers(images: int, first: int, seed: int | None) -> None:
    """UserError unless there is noise for so many images from that one on, and of that seed."""
    if not 1 <= images <= INDICES:
        raise UserError(f"--images: {images} is not valid; it must be at least 1, and at most 2^32")
    if not 0 <= first <= INDICES - images:
        raise UserError(f"--first: {first} is not valid; it must be at least 0, and at most 2^32 less --images")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed: {seed} is not valid; it must be in [0, 2^63)")


def check_classes(numbers: Sequence[int], classes: int, given: object) -> None:
    """UserError, with what was `given`, unless these are numbers of a run's classes, of which there are so many."""
    if not classes:
        raise UserError(f"--classes: {given!r} is not valid; the run was trained without classes: leave it out")
    if not numbers or not all(0 <= number < classes for number in numbers):
        right = f"numbers from 0 to {classes - 1}, e.g. 0,{classes - 1}"
        raise UserError(f"--classes: {given!r} is not valid; give {right}")


def draw(
    trainer: Trainer,
    config: Config,
    batch: Batch,
    round: int,
    progress: Progress = iter,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """The images of a batch from the trainer's present parameters: (n, C, S, S), on its device.

    They are uint8, or where `data.range` is given, float32 in that range. With classes, image i shows number i mod
    their number, or of these `classes` the one at i mod theirs. `progress` wraps the iteration over the sampling steps.
    RunError, which names the batch's model and its `round`, if an image is not finite: as uint8 it would be black, and
    be scored like any other.
    """
    model = trainer.model
    indices = torch.arange(batch.first, batch.last, device=trainer.device)
    labels = indices % config.model.classes if config.model.classes else None
    if classes is not None:
        labels = torch.tensor(classes, device=trainer.device)[indices % len(classes)]
    model.eval()
    try:
        with trainer.autocast():
            x = trainer.drawing(config, len(indices)).draw(indices, labels, progress)
    finally:
        model.train()
    if not x.isfinite().all():
        whose = "the global model" if batch.model is None else f"client {batch.model}"
        remedy = "train with a smaller optim.lr, or take an earlier round"
        raise RunError(f"{whose}, round {round}: drawn images are not finite numbers; {remedy}")
    limits = config.data.range
    return diffusion.to_uint8(x) if limits is None else diffusion.to_range(x, *limits)


@contextmanager
def progress_bar(
    comm: Communicator, mine: Sequence[Batch], title: str, check: Callable[[], None] = lambda: None
) -> Iterator[Callable[[Batch], Progress]]:
    """Inside the block: the `progress` of each of this rank's batches, which calls `check` before every step.

    On rank 0 a bar or lines show how far its images are; a step of a batch counts as its share of the images.
    """
    images = sum(batch.last - batch.first for batch in mine)
    with progress(title, images, "images", comm.rank == 0, BAR) as advance:

        def progress_of(batch: Batch) -> Progress:
            def counted(steps: Iterable[int]) -> Iterator[int]:
                steps = list(steps)
                for step in steps:
                    check()
                    yield step
                    advance((batch.last - batch.first) / len(steps))

            return counted

        yield progress_of


def gather_images(comm: Communicator, cut: Sequence[Batch], drawn: Sequence[Tensor], empty: Tensor) -> Tensor | None:
    """On rank 0 the images of all batches, in the order of `cut`: (n, C, S, S), on the CPU; elsewhere None.

    `drawn` are this rank's, in the order of its batches in `cut`; `empty` (0, C, S, S) stands for none.
    """
    with comm.ledger.purpose("pictures"):
        return gather_in_order(comm, cut, torch.cat([empty, *drawn]))


def gather_in_order(comm: Communicator, cut: Sequence[Batch], mine: Tensor) -> Tensor | None:
    """On rank 0 a row of each image of all batches, in the order of `cut`, on the CPU; elsewhere None.

    `mine` (m, ...) are the rows of this rank's images, in the order of its batches in `cut`.
    """
    by_rank = gather(comm, mine)
    if comm.rank != 0:
        return None
    taken = [0] * comm.size
    ordered = []
    for batch in cut:
        start = taken[batch.rank]
        taken[batch.rank] += batch.last - batch.first
        ordered.append(by_rank[batch.rank][start : taken[batch.rank]])
    return torch.cat(ordered)


def empty_images(config: Config, device: torch.device) -> Tensor:
    """No images: (0, C, S, S), of the type in which they are drawn."""
    data = config.data
    dtype = torch.uint8 if data.range is None else torch.float32
    return torch.empty((0, *data.shape), dtype=dtype, device=device)


def draw_grid(
    rank: RankSetup, votes: Votes, round: int, ema: Tensor | None, check: Callable[[], None] = lambda: None
) -> Tensor | None:
    """On rank 0 a round's sample grid, of the global model, or a row of each client where it keeps private parts.

    Every rank calls it and draws its share, with `ema` (n,) from the moving averages, and calls `check` before every
    step. (m, C, S, S).
    """
    config, comm = rank.config, rank.comm
    cut = grid_batches(config, rank.keeps_private_parts, rank.placement)
    mine, drawn = [batch for batch in cut if batch.rank == comm.rank], []
    with progress_bar(comm, mine, f"round {round}, samples", check) as progress_of:
        for batch in mine:
            with votes.keeping_errors("sampling"), rank.host.using_parameters(rank.host.parameters(batch.model, ema)):
                drawn.append(draw(rank.host.trainer, config, batch, round, progress_of(batch)))
        votes.vote()
    return gather_images(comm, cut, drawn, empty_images(config, rank.host.trainer.device))


def draw_all(
    comm: Communicator,
    trainer: Trainer,
    config: Config,
    images: int,
    client: int | None,
    round: int,
    first: int = 0,
    classes: Sequence[int] | None = None,
) -> Tensor | None:
    """So many images from number `first` of the trainer's model, equal on all ranks, drawn by all in turn.

    They are as `gather_images` has them, of `classes` as in `draw`. An error names the model's client, or the global
    model (None), and its round.
    """
    in_turn = batches([None], images, config.sample, lambda _: 0, comm.size)
    cut = [replace(batch, model=client, first=first + batch.first, last=first + batch.last) for batch in in_turn]
    mine = [b for b in cut if b.rank == comm.rank]
    drawn, error = [], None
    try:
        with progress_bar(comm, mine, "sampling") as progress_of:
            drawn = [draw(trainer, config, batch, round, progress_of(batch), classes) for batch in mine]
    except Exception as failure:
        error = one_line(failure, "sampling")
    agree(comm, error)
    return gather_images(comm, cut, drawn, empty_images(config, trainer.device))
