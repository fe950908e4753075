"""Write a checkpoint's weights, by parameter name, into a safetensors file that rebuilds the model: for others."""

from __future__ import annotations

from pathlib import Path

from fdiff import export
from fdiff.errors import UserError
from fdiff.snapshot import open_checkpoint, private_parts


def run(checkpoint: Path, file: Path, *, client: int | None = None, ema: bool = False) -> None:
    """Export a model.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        file: The safetensors file to write; `fdiff.export.load` reads it back.
        client: Whose model, where clients keep private parts.
        ema: The moving average instead of the last weights.
    """
    saved = open_checkpoint(checkpoint)
    clients, own = saved.config.federation.clients, bool(private_parts(saved.config))
    if own and (client is None or not 0 <= client < clients):
        raise UserError(
            f"--client: {client} is not valid; with {saved.config.method} each client has its own model: 0 to "
            f"{clients - 1}"
        )
    if client is not None and not own:
        raise UserError(f"--client: {client} is not valid; {saved.config.method} has one model for all clients")
    if ema and not saved.has_ema:
        raise UserError(f"--ema: {saved.path} has no moving averages; train with --optim.ema, or leave it out")
    export.save(file, saved, client, ema)
    print(f"round {saved.round}: {file} ({file.stat().st_size / 1e6:.1f} MB)")
