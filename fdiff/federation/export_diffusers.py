"""Export for diffusers: a folder that `DDPMPipeline.from_pretrained` opens, of a run of model.kind unet2d.

DIR/unet/          config.json, diffusion_pytorch_model.safetensors
DIR/scheduler/     scheduler_config.json: DDPMScheduler, with the noise that the run was trained on
DIR/model_index.json   not of a model with classes, whose labels that pipeline does not know
DIR/README.md      what it is, how to draw, and what differs from how the run draws
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from fdiff import __version__
from fdiff.checkpoint import sync_folder
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation.export import model_of, weights_of, write_weights
from fdiff.federation.saved import Saved

KIND = "unet2d"
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
OBJECTIVES = {"noise": "epsilon", "v": "v_prediction"}


def check_folder(folder: Path) -> None:
    """UserError unless the folder is new, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already, and is no empty folder; name another")


def save_pipeline(folder: Path, saved: Saved, client: int | None, ema: bool) -> list[str]:
    """Write a model of a checkpoint, as `Saved.parameters` tells which; the folder appears only when complete.

    The same model makes the same bytes. Returns a line for each thing in which the run draws otherwise. UserError if
    diffusers has no such model, or the folder cannot be written.
    """
    if (kind := saved.config.model.kind) != KIND:
        raise UserError(f"--format: diffusers has no class for model.kind {kind} of {saved.path}; leave it out")
    folder = folder.absolute()
    check_folder(folder)
    model, notes = model_of(saved, client, ema), differences(saved.config)
    whose = "of the global model" if client is None else f"of client {client}"
    what = f"round {saved.round} {whose}, {'moving average' if ema else 'last weights'}"
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(0o700)  # a client's own model is its owner's alone
        _write(temporary, model, saved.config, what, notes)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        renaming = isinstance(error, OSError) and error.filename2 is not None
        taken = renaming and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        why = "is there already" if taken else f"cannot be written ({error})"
        raise UserError(f"{folder}: {why}; name another folder") from None
    return notes


def _write(folder: Path, model: nn.Module, config: Config, what: str, notes: list[str]) -> None:
    import diffusers  # it is here, since the model is

    made_by = {"_diffusers_version": diffusers.__version__}
    settings = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(0o700)
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", weights_of(model), {"format": "pt"})
    _write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **made_by, **settings})
    _write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler_settings(config), **made_by})
    if not config.model.classes:
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        _write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **made_by, **parts})
    _write_text(folder / "README.md", _card(config, what, notes))
    for each in (folder / "unet", folder / "scheduler", folder):
        sync_folder(each)


def scheduler_settings(config: Config) -> dict[str, Any]:
    """The DDPMScheduler, as its scheduler_config.json has it, that draws as `fdiff sample --sampler ddpm` does."""
    diffusion = config.diffusion
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "trained_betas": None,
        "variance_type": "fixed_small",
        "clip_sample": config.sample.clip,
        "clip_sample_range": 1.0,
        "prediction_type": OBJECTIVES[diffusion.objective],
        "thresholding": False,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }


def differences(config: Config) -> list[str]:
    """A line for each thing in which the run draws otherwise than diffusers will from such a folder."""
    sample, timesteps, notes = config.sample, config.diffusion.timesteps, []
    if sample.sampler == "ddim":
        notes.append(
            f"the run draws by ddim in {sample.steps} steps; the scheduler here is DDPM's, over all {timesteps} steps, "
            "as fdiff sample --sampler ddpm draws"
        )
    if config.model.classes:
        notes.append("DDPMPipeline knows no classes, so there are only unet and scheduler, and no model_index.json")
    if sample.guidance != 1:
        notes.append(f"the run draws with guidance {sample.guidance}, which a loop of yours would have to add")
    return notes


def _card(config: Config, what: str, notes: list[str]) -> str:
    """The README of the folder."""
    channels, side, _ = config.data.shape
    timesteps, classes = config.diffusion.timesteps, config.model.classes
    if classes:
        labels = f"torch.tensor([0, {classes - 1}])"
        use = (
            'unet = UNet2DModel.from_pretrained("DIR", subfolder="unet")\n'
            'scheduler = DDPMScheduler.from_pretrained("DIR", subfolder="scheduler")\n'
            f"scheduler.set_timesteps({timesteps})\n"
            f"x, labels = torch.randn(2, {channels}, {side}, {side}), {labels}\n"
            "with torch.no_grad():\n"
            "    for t in scheduler.timesteps:\n"
            "        x = scheduler.step(unet(x, t, labels).sample, t, x).prev_sample\n"
        )
        use, images = f"import torch\nfrom diffusers import DDPMScheduler, UNet2DModel\n\n{use}", "x is in [-1, 1]."
    else:  # pictures have 1 or 3 channels, or transparency
        form = "" if channels in (1, 3) else ', output_type="np"'
        call = f"pipeline(batch_size=4, num_inference_steps={timesteps}{form})"
        use = (
            "from diffusers import DDPMPipeline\n\n"
            f'pipeline = DDPMPipeline.from_pretrained("DIR")\nimages = {call}.images\n'
        )
        images = "The images are an array in [0, 1]." if form else "The images are PIL's."
    listed = "".join(f"- {note}.\n" for note in notes)
    return (
        f"A diffusion model for {side}x{side} images of {channels} channels, trained by fdiff {__version__}:\n{what}, "
        f"method {config.method}, {config.federation.clients} clients.\n\n```python\n{use}```\n\n"
        + (f"{images}\n")
        + (f"\nWhat differs from how the run draws:\n\n{listed}" if notes else "")
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
