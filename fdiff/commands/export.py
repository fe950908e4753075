"""Write a checkpoint's weights, by parameter name, into a safetensors file that rebuilds the model: for others."""

from __future__ import annotations

from pathlib import Path

from fdiff.errors import shown
from fdiff.federation import check_choice, open_checkpoint, save_model
from fdiff.runtime import check_output


def run(checkpoint: Path, file: Path, *, client: int | None = None, ema: bool = False) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The file to write, FILE.safetensors; `fdiff.load_model` reads it back.
        client: Whose model, where clients keep private parts.
        ema: The moving average instead of the last weights.
    """
    check_output("FILE", file, (".safetensors",))
    saved = open_checkpoint(checkpoint)
    check_choice(saved, client, ema)
    save_model(file, saved, client, ema)
    print(f"round {saved.round}: {shown(file)} ({file.stat().st_size / 1e6:.1f} MB)")
