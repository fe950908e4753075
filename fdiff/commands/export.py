"""Write a checkpoint's weights for others: a safetensors file that rebuilds the model, or a folder for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fdiff.federation import check_choice, open_checkpoint, save_model, save_pipeline


def run(
    checkpoint: Path,
    file: Path,
    *,
    client: int | None = None,
    ema: bool = False,
    format: Literal["safetensors", "diffusers"] = "safetensors",
) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The safetensors file to write, which `fdiff.load_model` reads back; for diffusers a new folder.
        client: Whose model, where clients keep private parts.
        ema: The moving average instead of the last weights.
        format: safetensors, or for a run of model.kind unet2d diffusers: a folder that its DDPMPipeline opens.
    """
    saved = open_checkpoint(checkpoint)
    check_choice(saved, client, ema)
    if format == "diffusers":
        notes = save_pipeline(file, saved, client, ema)
        print("\n".join([f"round {saved.round}: {file}, for diffusers", *notes]))
        return
    save_model(file, saved, client, ema)
    print(f"round {saved.round}: {file} ({file.stat().st_size / 1e6:.1f} MB)")
