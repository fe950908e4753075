"""Write a checkpoint's weights, by parameter name, into a safetensors file that rebuilds the model: for others."""

from __future__ import annotations

from pathlib import Path

from fdiff import export
from fdiff.snapshot import open_checkpoint


def run(checkpoint: Path, file: Path, *, client: int | None = None, ema: bool = False) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The safetensors file to write; `fdiff.export.load` reads it back.
        client: Whose model, where clients keep private parts.
        ema: The moving average instead of the last weights.
    """
    saved = open_checkpoint(checkpoint)
    export.check_choice(saved, client, ema)
    export.save(file, saved, client, ema)
    print(f"round {saved.round}: {file} ({file.stat().st_size / 1e6:.1f} MB)")
