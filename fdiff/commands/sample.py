"""Draw images from a checkpoint on all ranks; image i starts from the noise of seed i, however many ranks draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fdiff.comm import Communicator
from fdiff.config import Config, RuntimeConfig
from fdiff.data import check_target, save_images
from fdiff.errors import UserError, shown
from fdiff.evaluation import sampling_config
from fdiff.federation import Saved, Trainer, check_choice, on_rank_0, open_together, private_parts, sampling, together


def run(
    checkpoint: Path,
    runtime: RuntimeConfig,
    comm: Communicator,
    device: torch.device,
    *,
    out: Path = Path("samples.png"),
    images: int = 64,
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
        out: FILE.png for one grid, FILE.h5 for a dataset `images`, a name without suffix for a folder of PNGs.
        images: How many.
        client: Whose model, where clients keep private parts; by default client 0.
        ema: The moving average instead of the last weights; by default if the checkpoint has it.
        sampler: ddpm or ddim; by default what the run used.
        steps: Steps of ddim; by default what the run used.
        batch_size: Images a sampling step; by default what the run used.
    """
    together(comm, lambda: _check_images(images))
    on_rank_0(comm, lambda: check_target(out))
    saved = open_together(comm, checkpoint)
    chosen = {"sampler": sampler, "steps": steps, "batch_size": batch_size}
    config = together(comm, lambda: replace(sampling_config(saved.config, **chosen), runtime=runtime))
    client = 0 if client is None and private_parts(config) else client
    trainer = together(comm, lambda: _trainer_with(saved, config, device, client, ema))
    drawn = sampling.draw_all(comm, trainer, config, images, client, saved.round)
    on_rank_0(comm, lambda: save_images(drawn, out))
    if comm.rank == 0:
        print(f"{images} images of round {saved.round}: {shown(out)}")


def _check_images(images: int) -> None:
    if images < 1:
        raise UserError(f"--images: {images} is not valid; it must be at least 1")


def _trainer_with(saved: Saved, config: Config, device: torch.device, client: int | None, ema: bool | None) -> Trainer:
    """A trainer with the parameters that are asked for; UserError if the checkpoint has no such model."""
    ema = saved.has_ema if ema is None else ema
    check_choice(saved, client, ema)
    trainer = Trainer(config, device)
    saved.fill(trainer.buckets, client, ema)
    return trainer
