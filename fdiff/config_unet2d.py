"""The settings of model.kind unet2d: those of diffusers' UNet2DModel, under the same names in `model.options`.

They are checked here without diffusers, so that whatever is wrong is said before anything is opened. What they leave
open follows from `model.dim`, `model.dim_mults` and `model.head_dim`; channels, side and labels follow from the data
and from `model.classes`, which they may repeat and not contradict. A `model` here is the configuration's group, whose
class is a floor higher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from fdiff.config_checks import nearest
from fdiff.errors import UserError

Options = Mapping[str, Any]
ModelConfig = Any
Check = tuple[Callable[[Any], bool], str]  # a predicate, and what would be right

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
MAX_LEVELS = 8
# What two models may differ in although their parameters have the same names and shapes.
UNSEEN = (
    "center_input_sample", "freq_shift", "flip_sin_to_cos", "mid_block_scale_factor", "downsample_padding", "act_fn",
    "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps",
)  # fmt: skip
# As in diffusers' signature, where it has any; what the data and `model.classes` say is not among them.
DEFAULTS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_train_timesteps": None,
}


def _is_count(high: int) -> Check:
    return lambda v: type(v) is int and 1 <= v <= high, f"a whole number between 1 and {high}"


def _or_null(check: Check) -> Check:
    return lambda v: v is None or check[0](v), f"{check[1]}, or null"


def _one_of(*choices: Any) -> Check:
    named = ", ".join("null" if c is None else str(c) for c in choices)
    right = f"one of {named}" if len(choices) > 1 else named
    return lambda v: any(type(v) is type(c) and v == c for c in choices), right


def _number(low: float, high: float) -> Check:
    return lambda v: type(v) in (int, float) and low <= v <= high, f"a number between {low:g} and {high:g}"


def _list_of(check: Check) -> Check:
    fits = lambda v: isinstance(v, (list, tuple)) and 1 <= len(v) <= MAX_LEVELS and all(map(check[0], v))  # noqa: E731
    return fits, f"a list, one entry for each of up to {MAX_LEVELS} levels, each {check[1]}"


_YES_NO = (lambda v: type(v) is bool, "true or false")
_SIDES = (
    lambda v: v is None or type(v) is int or (isinstance(v, (list, tuple)) and len(v) == 2 and v[0] == v[1]),
    "the side of square images, or null",
)
OPTIONS: dict[str, Check] = {
    "sample_size": _SIDES,
    "in_channels": _is_count(4096),
    "out_channels": _is_count(4096),
    "center_input_sample": _YES_NO,
    "time_embedding_type": _one_of("positional", "learned"),
    "time_embedding_dim": _or_null(_is_count(65_536)),
    "freq_shift": (lambda v: type(v) in (int, float) and v in (0, 1), "0 or 1"),
    "flip_sin_to_cos": _YES_NO,
    "down_block_types": _list_of(_one_of(*DOWN)),
    "mid_block_type": _one_of("UNetMidBlock2D"),
    "up_block_types": _list_of(_one_of(*UP)),
    "block_out_channels": _list_of((lambda v: type(v) is int and 4 <= v <= 65_536, "between 4 and 65536")),
    "layers_per_block": _is_count(32),
    "mid_block_scale_factor": _number(1e-3, 1e3),
    "downsample_padding": _one_of(0, 1),
    "downsample_type": _one_of("conv", "resnet"),
    "upsample_type": _one_of("conv", "resnet"),
    "dropout": (lambda v: type(v) in (int, float) and 0 <= v < 1, "in [0, 1)"),
    "act_fn": _one_of("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": _or_null(_is_count(65_536)),
    "norm_num_groups": _is_count(65_536),
    "attn_norm_num_groups": _or_null(_is_count(65_536)),
    "norm_eps": _number(1e-12, 1),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "add_attention": _YES_NO,
    "class_embed_type": _one_of(None),
    "num_class_embeds": _or_null(_is_count(1_000_000)),
    "num_train_timesteps": _or_null(_is_count(1_000_000)),
}
WHY = {
    ("time_embedding_type", "fourier"): "it takes the logarithm of the timestep, and fdiff's begin at 0",
    ("mid_block_type", None): "without a middle block there is no part bottleneck",
}


def complete(model: ModelConfig) -> dict[str, Any]:
    """All settings but those that the data and `model.classes` decide.

    What the options leave open: widths dim × dim_mults, attention at the last level, heads of the largest size up to
    head_dim and the largest count of groups up to 32 that divide all widths; all else is diffusers' default.
    """
    widths = list(model.options.get("block_out_channels") or [model.dim * multiple for multiple in model.dim_mults])
    plain, common = len(widths) - 1, math.gcd(*widths)
    left_open = {
        "block_out_channels": widths,
        "down_block_types": ["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        "attention_head_dim": _divisor(common, model.head_dim),
        "norm_num_groups": _divisor(common, 32),
    }
    return {**DEFAULTS, **left_open, **{k: v for k, v in model.options.items() if k in DEFAULTS}}


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of the number up to the limit."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def levels(model: ModelConfig) -> int:
    """The levels between which the side of an image is halved."""
    return len(model.options.get("block_out_channels") or model.dim_mults)


def stored(model: ModelConfig) -> dict[str, Any]:
    """The options as a configuration keeps them: lists for tuples, and without what follows from `model.classes`."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in model.options.items()}
    if plain.get("num_class_embeds", 0) in (None, model.label_rows):
        plain.pop("num_class_embeds", None)
    return plain


def check(model: ModelConfig) -> None:
    """UserError for an option that UNet2DModel lacks or has otherwise, that does not go with the others, or for a field
    that only the paper's UNet reads."""
    for name, value in model.options.items():
        if name not in OPTIONS:
            right = nearest(name, OPTIONS) or f"it has {', '.join(OPTIONS)}"
            raise _refused(name, value, f"is not valid; UNet2DModel has no such setting: {right}")
        fits, right = OPTIONS[name]
        if not fits(value):
            why = WHY.get((name, value)) if isinstance(value, (str, type(None))) else None
            raise _refused(name, value, f"is not valid{f': {why}' if why else ''}; it must be {right}")
    for field in dataclasses.fields(model):
        only_unet = field.name == "heads" or field.name.startswith("bottleneck_")
        if only_unet and (value := getattr(model, field.name)) != field.default:
            raise UserError(
                f"model.{field.name}: {value!r} is not valid with model.kind unet2d, which has no such setting; leave "
                "it out, or use --model.options"
            )
    _check_widths(complete(model))


def _check_widths(whole: Options) -> None:
    widths, groups, size = whole["block_out_channels"], whole["norm_num_groups"], whole["attention_head_dim"]
    for name in ("down_block_types", "up_block_types"):
        if len(whole[name]) != len(widths):
            raise _refused(name, whole[name], f"is not valid; it must have an entry for each width of {widths}")
    if any(width % groups for width in widths):
        raise _refused("norm_num_groups", groups, f"is not valid; it must divide all of block_out_channels {widths}")
    kinds = zip([*whole["down_block_types"], *whole["up_block_types"]], [*widths, *widths[::-1]], strict=True)
    attended = [width for kind, width in kinds if "Attn" in kind] + [widths[-1]] * whole["add_attention"]
    if size is not None and attended and size > min(attended):
        raise _refused("attention_head_dim", size, f"is not valid; it must be at most the width there, {min(attended)}")


def check_data(model: ModelConfig, channels: int | None, side: int | None, timesteps: int) -> None:
    """UserError if the options say something else than the data (None: not known yet), or than the run's settings."""
    options, labels = model.options, model.label_rows
    given = {name: options[name] for name in ("in_channels", "out_channels") if name in options}
    for name, value in given.items():
        if channels is not None and value != channels:
            raise _refused(name, value, f"is a config for other channels; the model sees images with {channels}")
    if len(set(given.values())) > 1:
        raise _refused("out_channels", given["out_channels"], "must be in_channels: the noise is as the images are")
    size = options.get("sample_size")
    if size is not None and side is not None and size not in (side, [side, side], (side, side)):
        raise _refused("sample_size", size, f"is a config for another side; the model sees images with {side}")
    classes = options.get("num_class_embeds")
    if classes is not None and classes != labels:
        right = f"--model.classes makes it {labels}" if labels else "the run has none without --model.classes"
        raise _refused("num_class_embeds", classes, f"is a config for other labels; {right}")
    known = options.get("num_train_timesteps")
    if options.get("time_embedding_type") == "learned" and (known or 0) < timesteps:
        right = f"it must be at least diffusion.timesteps = {timesteps}"
        raise _refused("num_train_timesteps", known, f"is not valid; {right}")


def _refused(name: str, value: Any, why: str) -> UserError:
    return UserError(f"model.options.{name}: {'null' if value is None else repr(value)} {why}")
