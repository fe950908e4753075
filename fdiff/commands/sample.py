"""Draw images from a checkpoint on all ranks; image i starts from the noise of seed i, however many ranks draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fdiff import evaluate
from fdiff.assembly import together
from fdiff.client import Trainer
from fdiff.comm import Communicator
from fdiff.config import RuntimeConfig
from fdiff.errors import UserError
from fdiff.pictures import save_images
from fdiff.snapshot import open_checkpoint


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
        out: FILE.png for one grid, FILE.h5 for a dataset `images`, anything else for a folder of PNGs.
        images: How many.
        client: Whose model, where clients keep private parts; by default client 0.
        ema: The moving average instead of the last weights; by default if the checkpoint has it.
        sampler: ddpm or ddim; by default what the run used.
        steps: Steps of ddim; by default what the run used.
        batch_size: Images a sampling step; by default what the run used.
    """
    if images < 1:
        raise UserError(f"--images: {images} is not valid; it must be at least 1")
    saved = together(comm, lambda: open_checkpoint(checkpoint))
    chosen = {"sampler": sampler, "steps": steps, "batch_size": batch_size}
    sample = replace(saved.config.sample, **{k: v for k, v in chosen.items() if v is not None})
    config = replace(saved.config, sample=sample, runtime=runtime)
    trainer = Trainer(config, device)
    parameters = together(comm, lambda: saved.parameters(client, saved.has_ema if ema is None else ema))
    trainer.buckets.flat.copy_(parameters)
    drawn = evaluate.draw_all(comm, trainer, config, images)
    if drawn is not None:
        save_images(drawn, out)
        print(f"{images} images of round {saved.round}: {out}")
