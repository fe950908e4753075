"""From the configuration to a model: the paper's UNet, diffusers', or one of the user's own."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import nn

from fdiff import config_unet2d, registry, seeds
from fdiff.config import PARTS, Config, ModelConfig
from fdiff.errors import UserError, first_line
from fdiff.model.buckets import layout_of, part_sizes
from fdiff.model.labels import no_class
from fdiff.model.parts import freeze_all_but, parameters_by_part
from fdiff.model.unet import UNet


def build_unet(shape: tuple[int, int, int], model: ModelConfig) -> UNet:
    """The UNet, the paper's or one with another bottleneck, for images (C, S, S)."""
    return UNet(
        shape[0],
        model.dim,
        model.dim_mults,
        model.heads,
        model.head_dim,
        model.label_rows,
        model.bottleneck_width,
        model.bottleneck_blocks,
        model.bottleneck_attention,
        model.bottleneck_select,
    )


def build_unet2d(shape: tuple[int, int, int], model: ModelConfig, **_: Any) -> nn.Module:
    """diffusers' UNet2DModel for images (C, S, S), with `model.options`. UserError where it is not installed.

    Also where it takes other settings than these, which depends on its version.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("model.kind: unet2d is diffusers', which is not installed; pip install 'fdiff[diffusers]'")
    from fdiff.model.unet2d import UNet2D  # slow to import, and only wanted here

    labels = model.label_rows
    sizes = {"in_channels": shape[0], "out_channels": shape[0], "sample_size": shape[1]}
    settings = {**config_unet2d.complete(model), **sizes, "num_class_embeds": labels or None}
    known = inspect.signature(UNet2D.__init__).parameters
    same = {name for name, value in settings.items() if value == config_unet2d.DEFAULTS.get(name, ...)}
    settings = {name: value for name, value in settings.items() if name in known or name not in same}
    try:
        return UNet2D(**settings)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of what the settings make of each other
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model.options: diffusers' UNet2DModel cannot be made of them ({reason})") from None


BUILDERS = {"unet": build_unet, "unet2d": build_unet2d}


def build_model(config: Config) -> nn.Module:
    """The model with its initial weights, which derive from the seed and are equal on every rank; float32, CPU.

    A builder of the user's own is called as `build(shape, model, **options)`: the (C, S, S) of the images, the group
    `model` of the configuration, and `model.options`. UserError if that is no model that can be shared.
    """
    kind, options = config.model.kind, config.model.options
    build = BUILDERS.get(kind) or registry.find("model.kind", kind)
    _check_options(kind, build, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(config.run.seed, "weights"))
        try:
            model = build(config.data.shape, config.model, **options)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # of somebody's function
            if kind in BUILDERS:
                raise
            raise UserError(f"model.kind: {kind} fails ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"model.kind: {kind} returns a {type(model).__name__}; it must be a torch.nn.Module")
    if config.model.train is not None:
        freeze_all_but(model, config.model.train.split("+"))
    return model


def _check_options(kind: str, build: object, options: dict[str, object]) -> None:
    try:
        known = inspect.signature(build).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"model.kind: {kind} is no function that builds a model") from None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = [*known][2:]  # behind shape and model
    if unknown := [name for name in options if name not in names]:
        right = f"its options are {', '.join(names)}" if names else "it has none"
        raise UserError(f"model.options.{unknown[0]}: {kind} has no such option; {right}")


def describe_model(config: Config) -> nn.Module:
    """The model without memory for its parameters, or, of one that cannot be had so, with it."""
    with torch.device("meta"):
        try:
            return build_model(config)
        except UserError:
            if config.model.kind in BUILDERS:
                raise
    return build_model(config)


def sizes_of(config: Config) -> dict[str, int]:
    """Trained parameters of each part of the configured model that has some."""
    return part_sizes(layout_of(describe_model(config)))


def parts_of(config: Config) -> tuple[str, ...]:
    """The parts of the configured model that have something to train."""
    if config.model.kind not in BUILDERS:
        return tuple(sizes_of(config))
    return tuple(part for part in PARTS if part not in frozen_parts(config))


def frozen_parts(config: Config) -> tuple[str, ...]:
    """The parts of the configured model that `model.train` leaves out."""
    if config.model.train is None:
        return ()
    parts = PARTS if config.model.kind in BUILDERS else tuple(parameters_by_part(describe_model(config)))
    return tuple(part for part in parts if part not in config.model.train.split("+"))


def check_model(config: Config) -> None:
    """UserError if diffusers' UNet cannot be had as it is configured, as far as that is known before data are opened.

    Takes no memory for it. What is wrong with the other models is found out when they are built.
    """
    if config.model.kind != "unet2d":
        return
    try:
        shape = config.data.shape
    except UserError:
        with torch.device("meta"):
            build_unet2d((1, 256, 256), config.model)
        return
    with torch.device("meta"):
        check_forward(build_unet2d(shape, config.model), config)


def check_forward(model: nn.Module, config: Config) -> None:
    """UserError unless the model predicts as much as an image has. Runs it once, with two images of zeros.

    Where labels are dropped in training, one of the two has lost its own.
    """
    first = next(model.parameters())
    x = torch.zeros(2, *config.data.shape, dtype=first.dtype, device=first.device)
    t = torch.zeros(2, dtype=torch.int64, device=first.device)
    kind = config.model.kind
    labels = t.clone() if config.model.classes else None
    if labels is not None and config.model.class_dropout:
        labels[1] = no_class(config.model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            predicted = model(x, t, labels)
    except (Exception, SystemExit) as error:  # of somebody's module
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model.kind: {kind} fails on images of {config.data.shape} ({reason})") from None
    if not isinstance(predicted, torch.Tensor) or predicted.shape != x.shape:
        shape = tuple(predicted.shape) if isinstance(predicted, torch.Tensor) else type(predicted).__name__
        raise UserError(
            f"model.kind: {kind} makes {shape} of images {tuple(x.shape)}; it must predict their "
            f"{config.diffusion.objective}"
        )
