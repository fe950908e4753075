"""Draw images from a checkpoint on all ranks; image i starts from its own noise of the seed, however many ranks draw.

Where the run has classes, the images show them in turn, by their numbers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fdiff.comm import Communicator
from fdiff.config import RuntimeConfig
from fdiff.data import check_target, needs_array, save_images
from fdiff.errors import shown
from fdiff.evaluation import sampling_config
from fdiff.federation import Trainer, choose_model, model_name, on_rank_0, open_together, sampling, together


def run(
    checkpoint: Path,
    runtime: RuntimeConfig,
    comm: Communicator,
    device: torch.device,
    *,
    out: Path = Path("samples.png"),
    images: int = 64,
    first: int = 0,
    seed: int | None = None,
    classes: str | None = None,
    guidance: float | None = None,
    client: int | None = None,
    ema: bool | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Draw images.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        runtime: Where and how it runs.
        out: FILE.png for one grid, FILE.h5 for a dataset `images`, a name without suffix for a folder of PNGs; where
            PNGs cannot hold the images, FILE.npy is written beside the grid, or images.npy into the folder.
        images: How many.
        first: Number of the first one: after 64 images, --first 64 draws those that follow.
        seed: Seed of the noise; by default that of the run.
        classes: Only these, by their numbers, in turn: 3,7; by default all of them.
        guidance: Classifier-free guidance; by default what the run used. Other than 1 needs model.class_dropout.
        client: Whose model, where clients keep private parts; by default client 0, as `fdiff export` writes.
        ema: The moving average instead of the last weights; by default if the checkpoint has it, as `fdiff export`.
        sampler: ddpm or ddim; by default what the run used.
        steps: Steps of ddim; by default what the run used.
        batch_size: Images a sampling step; by default what the run used.
    """
    together(comm, lambda: sampling.check_numbers(images, first, seed))
    on_rank_0(comm, lambda: check_target(out))
    saved = open_together(comm, checkpoint)
    chosen = {"sampler": sampler, "steps": steps, "batch_size": batch_size, "guidance": guidance}
    config = together(comm, lambda: replace(sampling_config(saved.config, **chosen), runtime=runtime))
    data = config.data
    on_rank_0(comm, lambda: check_target(out, needs_array(data.shape[0], data.range)))
    wanted = together(comm, lambda: _classes(classes, config.model.classes))
    client, average = together(comm, lambda: choose_model(saved, client, ema))

    def trainer_with_model() -> Trainer:
        made = Trainer(config, device)
        saved.fill(made.buckets, client, average)
        return made

    trainer = together(comm, trainer_with_model)
    seeded = config if seed is None else replace(config, run=replace(config.run, seed=seed))
    drawn = sampling.draw_all(comm, trainer, seeded, images, client, saved.round, first, wanted)
    on_rank_0(comm, lambda: save_images(drawn, out, data.range, first))
    if comm.rank == 0:
        print(f"{images} images of {model_name(client, average, saved.round)}: {shown(out)}")


def _classes(given: str | None, classes: int) -> list[int] | None:
    """The numbers of the classes that are asked for; None for all."""
    if given is None:
        return None
    numbers = [int(word) if re.fullmatch("[0-9]{1,9}", word.strip()) else -1 for word in given.split(",")]
    sampling.check_classes(numbers, classes, given)
    return numbers
