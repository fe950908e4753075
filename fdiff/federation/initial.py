"""The weights that a run begins with, where `model.init` says: of an export, of a run, or of diffusers.

Names and shapes are compared before memory is taken, then the values are read, by parameter name. No pickle.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdiff import checkpoint, config_unet2d, registry
from fdiff.config import KINDS, Config, to_dict
from fdiff.config_file import read_unet2d
from fdiff.errors import UserError
from fdiff.federation.export import FORMAT, check_choice, config_of, model_of, weights_of
from fdiff.federation.export_diffusers import scheduler_settings
from fdiff.federation.saved import find_checkpoint, read_checkpoint
from fdiff.federation.validate import check_global
from fdiff.model import describe_model

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
NOISE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")  # of a scheduler
MAX_SCHEDULER = 100_000  # characters
MAX_LISTED = 6  # of what does not fit, in one line
FLOATS = ("F16", "BF16", "F32", "F64")
UNET_UNSEEN = ("heads", "head_dim", "bottleneck_attention", "bottleneck_select")
# How diffusers called the layers of an attention before 2023.
FORMERLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FORMER = re.compile(rf"(?<=\.)({'|'.join(FORMERLY)})(?=\.(weight|bias)$)")


@dataclass(frozen=True)
class Source:
    """Weights that nobody has read yet: the shape of each, by its name; `read` reads them.

    `settings` has of such a model what shapes do not show, `diffusion` of the noise that it was trained on what
    is known. `config` is that of the run they are from, if there is one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Weights]
    settings: Mapping[str, Any]
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None


def find_initial(path: Path) -> Path:
    """What is read of this `model.init`: of a run its newest checkpoint. UserError if it has none."""
    if not checkpoint.root(path).is_dir():
        return path
    try:
        return find_checkpoint(path)[0]
    except UserError as error:
        raise UserError(f"model.init: {error}") from None


def read_initial(config: Config, path: Path | None = None) -> Weights:
    """The weights with which a run of this configuration begins, by parameter name; on the CPU, in its precision.

    `path` is what `find_initial` makes of `model.init`. UserError that begins with model.init if they cannot be read,
    are not those of its model, or are not finite.
    """
    path = path or find_initial(Path(config.model.init or ""))
    try:
        source = _open(path, config)
        _check_fit(path, source, config)
        weights = source.read()
        dtype = torch.float64 if config.runtime.precision == "float64" else torch.float32
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise UserError(f"{path}: {bad[0]} is not finite (NaN or infinity); use other weights")
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("model.init") else f"model.init: {error}") from None
    if other := _differences(source.diffusion, {**to_dict(config.diffusion), **scheduler_settings(config)}):
        log.warning("model.init: %s was trained with another diffusion: %s", path, "; ".join(other))
    return weights


# --- where they may be ---------------------------------------------------------------------------------------------


def _open(path: Path, config: Config) -> Source:
    if (path / checkpoint.GLOBAL).is_file() or checkpoint.root(path).is_dir():
        return _of_run(path, config)
    if config.model.init_client is not None:
        raise UserError(f"model.init_client: {config.model.init_client} is not valid; {path} is no run of fdiff")
    if path.is_file():
        return _of_file(path, config)
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return _of_diffusers(folder, config)
    what = "is none of these" if path.exists() else "is not there"
    raise UserError(
        f"{path}: {what}; give a file of fdiff export, a run or a checkpoint of fdiff, or a diffusers folder with "
        f"config.json and {DIFFUSERS_WEIGHTS}"
    )


def _of_run(path: Path, config: Config) -> Source:
    found, hold = find_checkpoint(path)
    examined = checkpoint.examine(found / checkpoint.GLOBAL)
    if examined.problems:
        raise UserError(examined.problems[0])
    _check_code(found, examined.header.get("config"))
    theirs = check_global(found, examined.header, examined.datasets)
    client = config.model.init_client

    def read() -> Weights:
        saved = read_checkpoint(found, hold)
        check_choice(saved, client, False, "model.init_client")
        return weights_of(model_of(saved, client, saved.has_ema))

    return Source(_shapes_of(theirs), read, _settings_of(theirs), to_dict(theirs.diffusion), theirs)


def _check_code(path: Path, fields: Any) -> None:
    """UserError if a run needs code that nobody has named: the flags name that of the run that begins."""
    fields = fields if isinstance(fields, dict) else {}
    model = fields.get("model") if isinstance(fields.get("model"), dict) else {}
    for of, name in (("method", fields.get("method")), ("model.kind", model.get("kind"))):
        if isinstance(name, str) and registry.is_reference(name) and name not in registry.allowed(of):
            raise UserError(f"{path}: was made with {name}, which is code; start from a file of fdiff export")


def _of_file(path: Path, config: Config) -> Source:
    shapes, metadata = _header_of(path, config)
    theirs = config_of(path, metadata) if metadata.get("format") == FORMAT else None
    settings, diffusion = (_settings_of(theirs), to_dict(theirs.diffusion)) if theirs else ({}, {})
    return Source(shapes, lambda: _load(path, config), settings, diffusion, theirs)


def _of_diffusers(folder: Path, config: Config) -> Source:
    file = folder / DIFFUSERS_WEIGHTS
    if not file.is_file():
        there = sorted(f.name for f in folder.iterdir() if f.name != "config.json")
        raise UserError(
            f"{folder}: has no {DIFFUSERS_WEIGHTS}{' but ' if there else ''}{', '.join(there[:MAX_LISTED])}; save the "
            "model as one file by save_pretrained, which does not pickle: pickles are never read"
        )
    options = read_unet2d(folder / "config.json")
    settings = _same_functions({name: options[name] for name in config_unet2d.UNSEEN})
    return Source(_header_of(file, config)[0], lambda: _load(file, config), settings, _scheduler_beside(folder))


def _scheduler_beside(unet: Path) -> dict[str, Any]:
    """What a pipeline's scheduler says of the noise; nothing where there is none, or none that can be read."""
    try:
        text = (unet.parent / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")[:MAX_SCHEDULER]
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: found[name] for name in NOISE if name in found} if isinstance(found, dict) else {}


def _same_functions(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with one name for a function that has two."""
    return {**settings, "act_fn": "silu"} if settings.get("act_fn") == "swish" else settings


def _settings_of(config: Config) -> dict[str, Any]:
    if config.model.kind == "unet2d":
        whole = config_unet2d.complete(config.model)
        return _same_functions({name: whole[name] for name in config_unet2d.UNSEEN})
    return {name: getattr(config.model, name) for name in UNET_UNSEEN} if config.model.kind == "unet" else {}


# --- safetensors ---------------------------------------------------------------------------------------------------


def _header_of(path: Path, config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes, by the names of today, and the metadata of a safetensors file. UserError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {_renamed(name, config): tuple(part.get_shape()) for name, part in slices.items()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); pickled weights are never read") from None
    if wrong := [name for name, kind in kinds.items() if kind not in FLOATS]:
        raise UserError(f"{path}: {wrong[0]} is {kinds[wrong[0]]}; weights are one of {', '.join(FLOATS)}")
    return shapes, metadata


def _load(path: Path, config: Config) -> Weights:
    try:
        return {_renamed(name, config): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def _renamed(name: str, config: Config) -> str:
    if config.model.kind != "unet2d":
        return name
    return _FORMER.sub(lambda found: FORMERLY[found[1]], name)


# --- whether they are those of the model ---------------------------------------------------------------------------


def _check_fit(path: Path, source: Source, config: Config) -> None:
    """UserError that lists what is not as this run's model has it."""
    kinds = {one.model.kind for one in (source.config, config) if one and one.model.kind in KINDS}
    if len(kinds) > 1 and source.config:
        raise UserError(f"{path}: is of model.kind {source.config.model.kind}, this run of {config.model.kind}")
    expected, found = _shapes_of(config), source.shapes
    wrong = [f"no {name} {shape}" for name, shape in expected.items() if name not in found]
    wrong += [f"{name} {shape}, which the model lacks" for name, shape in found.items() if name not in expected]
    both = [name for name in expected if name in found and expected[name] != found[name]]
    wrong += [f"{name} {found[name]}, the model {expected[name]}" for name in both]
    wrong += _differences(source.settings, _settings_of(config))
    if wrong:
        more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        of = "--model.config for diffusers' config.json" if config.model.kind == "unet2d" else "the model's settings"
        raise UserError(f"{path}: does not fit the model; it has {'; '.join(wrong[:MAX_LISTED])}{more}; give {of}")


def _shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in describe_model(config).named_parameters()}


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """A phrase for each setting that both have, and that is not the same."""
    other = [name for name in theirs if name in mine and theirs[name] != mine[name]]
    return [f"{name} {theirs[name]}, this run {mine[name]}" for name in other]
