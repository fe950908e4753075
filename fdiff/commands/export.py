"""Write a checkpoint's weights, by parameter name, into a safetensors file that rebuilds the model: for others."""

from __future__ import annotations

from pathlib import Path

from fdiff.errors import shown
from fdiff.federation import choose_model, model_name, open_checkpoint, save_model
from fdiff.runtime import check_output


def run(checkpoint: Path, file: Path, *, client: int | None = None, ema: bool | None = None) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The file to write, FILE.safetensors; `fdiff.load_model` reads it back.
        client: Whose model, where clients keep private parts; by default client 0, as `fdiff sample` draws.
        ema: The moving average instead of the last weights; by default if the checkpoint has it, as `fdiff sample`.
    """
    check_output("FILE", file, (".safetensors",))
    saved = open_checkpoint(checkpoint)
    client, ema = choose_model(saved, client, ema)
    save_model(file, saved, client, ema)
    print(f"{model_name(client, ema, saved.round)}: {shown(file)} ({file.stat().st_size / 1e6:.1f} MB)")
