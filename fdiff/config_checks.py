"""Checks of the configuration that need no more than a few of its values; `config` makes them of all its fields."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from fdiff import registry
from fdiff.errors import UserError

SMALLEST = 2.0**-126  # that float32 holds to its full precision


def check_names(method: str, kind: str, dataset: str, parts: Sequence[str]) -> None:
    """UserError for a method, a model or a data set that nobody knows; `parts` are those of fdiff's own models."""
    registry.check_name("model.kind", kind)
    registry.check_name("data.dataset", dataset)
    given = method.split("+")
    if set(given) <= set(parts) or (kind not in registry.BUILT_IN["model.kind"] and all(map(registry.is_name, given))):
        if len(set(given)) < len(given):
            raise UserError(f"method: {method!r} names a part twice")
        return
    if "+" in method and method not in registry.names("method"):
        unknown = next(part for part in given if part not in parts)
        raise UserError(f"method: {method!r} names a part {unknown!r}; the parts are {', '.join(parts)}")
    registry.check_name("method", method, f", or some of the parts {', '.join(parts)}, joined by +")


def check_type(name: str, value: Any, annotation: Any) -> None:
    """UserError unless the value of the field is of the annotated type, and one of the annotated choices."""
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise UserError(f"{name}: {value!r} is not valid; choose one of {', '.join(get_args(annotation))}")
        return
    if get_origin(annotation) is tuple:
        if not (isinstance(value, tuple) and all(type(v) is int for v in value)):
            raise UserError(f"{name}: {value!r} is not valid; it must be a list of whole numbers")
        return
    allowed = (dict,) if get_origin(annotation) is dict else get_args(annotation) or (annotation,)
    number = float in allowed and type(value) is int
    if type(value) not in allowed and not number:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        raise UserError(f"{name}: {value!r} is not valid; it must be of type {names}")
    if (number or isinstance(value, float)) and not abs(value) <= sys.float_info.max:
        raise UserError(f"{name}: {value!r} is not valid; it must be a finite number")


def is_option(item: tuple[Any, Any]) -> bool:
    """Whether a (name, value) may be among the settings of a model of one's own."""
    name, value = item
    values = value if isinstance(value, (list, tuple)) else [value]
    plain = all(type(v) in (int, float, str, bool, type(None)) and v == v for v in values)
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z]\w*", name)) and plain


def check_words(levels: int, clients: int) -> None:
    """UserError if the sum of all reporters' levels of quantize is more than a word of 64 bits holds."""
    if (bits := (clients * (levels - 1)).bit_length()) > 63:
        raise UserError(
            f"compression.levels: {levels} is not valid with {clients} clients; a value of the sum would take {bits} "
            "bits, and a word holds 63: use fewer levels"
        )


def check_schedule(first: float, last: float, steps: int) -> None:
    """UserError if so little of an image is left at the last timestep that the sampler's 1/√ᾱ_T is no number."""
    left = math.prod(1 - first - (last - first) * t / (steps - 1) for t in range(steps))
    if left < SMALLEST:
        raise UserError(
            f"diffusion.timesteps: {steps} is not valid with diffusion.beta_start = {first} and diffusion.beta_end = "
            f"{last}; ᾱ_T would be {left:.2g}, less than float32 holds ({SMALLEST:.2g}); use fewer timesteps or a "
            "smaller diffusion.beta_end"
        )


def check_bottleneck(blocks: int, attention: str) -> None:
    """UserError if nothing is left of the bottleneck."""
    if blocks == 0 and attention == "none":
        raise UserError(
            "model.bottleneck_blocks: 0 is not valid with model.bottleneck_attention none, since nothing would be left "
            "of the bottleneck; use --model.bottleneck_blocks 1 or --model.bottleneck_attention linear"
        )


def check_trained(train: str | None, parts: Sequence[str] | None) -> None:
    """UserError unless the parts to train are some of the model's, each once; None: nobody knows these yet."""
    if train is None:
        return
    given = train.split("+")
    if unknown := [part for part in given if not registry.is_name(part) or (parts and part not in parts)]:
        right = f"the parts are {', '.join(parts)}" if parts else "join names of parts by +"
        raise UserError(f"model.train: {train!r} names a part {unknown[0]!r}; {right}")
    if len(set(given)) < len(given):
        raise UserError(f"model.train: {train!r} names a part twice")


def check_init(init: str | None, client: int | None) -> None:
    """UserError if a client is named, and no run of which it could be one."""
    if client is not None and init is None:
        raise UserError(f"model.init_client: {client} is not valid without model.init; give the run as well")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean federation.clients?" of a name that is none of the known ones; "" where none is near.

    Names are told by what stands behind their last point, so that the right one is found in another group.
    """
    names = sorted(known, key=lambda other: other.rpartition(".")[0] != name.rpartition(".")[0])
    lasts = [other.rpartition(".")[2] for other in names]
    close = difflib.get_close_matches(name.rpartition(".")[2], dict.fromkeys(lasts), n=2, cutoff=0.72)
    found = [other for one in close for other, last in zip(names, lasts, strict=True) if last == one]
    return f"did you mean {' or '.join(found[:3])}?" if found else ""
