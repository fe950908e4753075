"""Write a checkpoint's weights for others: a safetensors file that rebuilds the model, or a folder for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fdiff.errors import UserError, shown
from fdiff.federation import choose_model, model_name, open_checkpoint, private_parts, save_model, save_pipeline
from fdiff.runtime import check_output


def run(
    checkpoint: Path,
    file: Path,
    *,
    client: int | None = None,
    ema: bool | None = None,
    format: Literal["safetensors", "diffusers"] = "safetensors",
) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The file to write, FILE.safetensors, which `fdiff.load_model` reads back; for diffusers a new folder.
        client: Whose model, where clients keep private parts; by default client 0, as `fdiff sample` draws. For
            diffusers it has to be given there.
        ema: The moving average instead of the last weights; by default if the checkpoint has it, as `fdiff sample`.
        format: safetensors, or for a run of model.kind unet2d diffusers: a folder that its DDPMPipeline opens.
    """
    if format == "safetensors":
        check_output("FILE", file, (".safetensors",))
    saved = open_checkpoint(checkpoint)
    if format == "diffusers" and client is None and private_parts(saved.config):
        raise UserError(f"--client: with {saved.config.method} each client has its own model; say whose it is")
    client, ema = choose_model(saved, client, ema)
    if format == "diffusers":
        notes = save_pipeline(file, saved, client, ema)
        print("\n".join([f"{model_name(client, ema, saved.round)}: {shown(file)}, for diffusers", *notes]))
        return
    save_model(file, saved, client, ema)
    print(f"{model_name(client, ema, saved.round)}: {shown(file)} ({file.stat().st_size / 1e6:.1f} MB)")
