"""A model for others: its weights by parameter name in a safetensors file, with all that is needed to rebuild it.

`load` needs nothing but the file. No run, no ranks, no pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fdiff import __version__
from fdiff.buckets import Buckets
from fdiff.client import build_model
from fdiff.config import Config, from_dict, to_dict
from fdiff.errors import UserError
from fdiff.snapshot import Saved
from fdiff.unet import PARTS, UNet

FORMAT = "fdiff/1"


def save(path: Path, saved: Saved, client: int | None, ema: bool) -> None:
    """Write a model of a checkpoint, as `Saved.parameters` tells which; the file appears only when complete.

    UserError if the path cannot be written.
    """
    model = build_model(saved.config)
    parameters = saved.parameters(client, ema)
    Buckets(model, PARTS).to("cpu", parameters.dtype).flat.copy_(parameters)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(saved.config)),
        "round": str(saved.round),
        "client": "global" if client is None else str(client),
        "ema": str(ema).lower(),
        "fdiff_version": __version__,
    }
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); give another file") from None


def load(path: Path) -> tuple[UNet, Config]:
    """The model, on the CPU in the precision it was saved in, and the configuration of its run.

    UserError if the file is not one of `save`, or does not hold the model that it describes.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); export the checkpoint again") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: has format {metadata.get('format')}, expected {FORMAT}; make it by fdiff export")
    config = from_dict(json.loads(metadata["config"]))
    model = build_model(config)
    expected = {name: p.shape for name, p in model.named_parameters()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise UserError(f"{path}: its weights are not those of the model that it describes; export it again")
    model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=False)  # buffers are constants, and not in the file
    return model, config
