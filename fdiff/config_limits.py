"""What each field of the configuration may be, beyond its type; `config` checks all of them."""

from __future__ import annotations

import re
from struct import pack, unpack
from typing import Any

from fdiff.config_checks import is_option

MANY = 1_000_000  # of anything that a run does one after the other


def _between(low: int, high: int) -> tuple[Any, str]:
    return lambda v: low <= v <= high, f"between {low} and {high}"


def _is_range(values: tuple[float, ...]) -> bool:
    """Whether they are a lower and a higher limit, also as float32."""
    if len(values) != 2 or max(map(abs, values)) > 1e30:
        return False
    low, high = unpack("2f", pack("2f", *values))
    return low < high


# Field: (predicate, what would be right). Types and choices are checked first, from the annotations. Every number has
# an upper limit: far beyond what makes sense a library fails in words of its own, or a list never ends.
LIMITS: dict[str, tuple[Any, str]] = {
    "federation.clients": _between(1, 100_000),
    "federation.rounds": _between(1, MANY),
    "federation.local_epochs": _between(1, MANY),
    "federation.fraction": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "federation.server_lr": (lambda v: v is None or 0 < v <= MANY, f"greater than 0, at most {MANY}, or null"),
    "federation.server_beta1": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "federation.server_beta2": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "federation.server_tau": (lambda v: 0 < v <= MANY, f"greater than 0, and at most {MANY}"),
    "federation.proximal_mu": _between(0, MANY),
    "data.image_side": (lambda v: v is None or 1 <= v <= 4096, "between 1 and 4096 pixels, or null"),
    "data.channels": (lambda v: v is None or 1 <= v <= 16, "between 1 and 16, or null"),
    "data.range": (
        lambda v: v is None or _is_range(v),
        "two numbers [LOW,HIGH] with LOW below HIGH, at most 1e30 and different as float32, or null",
    ),
    "data.axes": (
        lambda v: v is None or sorted(v) in (sorted("NHW"), sorted("NHWC")),
        "the letters N, H, W and, for colour, C in the order of the axes, e.g. NHWC, or null",
    ),
    "data.background": (
        lambda v: v in ("white", "black") or re.fullmatch("#[0-9a-fA-F]{6}", v),
        "white, black or #RRGGBB",
    ),
    "data.max_pixels": _between(1, 2**40),
    "data.beta": (lambda v: 0 < v <= MANY, f"greater than 0, and at most {MANY}"),
    "data.labels_per_client": _between(1, 100_000),
    "data.seed": (lambda v: 0 <= v < 2**32, "in [0, 2^32)"),
    "data.limit": (lambda v: v is None or 1 <= v < 2**31, "in [1, 2^31), or null"),
    "data.test_limit": (lambda v: v is None or 1 <= v < 2**31, "in [1, 2^31), or null"),
    "data.workers": _between(0, 256),
    "model.options": (
        lambda v: all(map(is_option, v.items())),
        "a table of numbers, words, true, false, null or lists of them, under names like hidden_width",
    ),
    "model.init": (lambda v: v != "", "a file or a folder, or null"),
    "model.init_client": (lambda v: v is None or 0 <= v < 100_000, "a client's number, or null"),
    "model.dim": (lambda v: 4 <= v <= 4096 and v % 2 == 0, "an even number between 4 and 4096"),
    "model.dim_mults": (lambda v: 1 <= len(v) <= 8 and all(1 <= m <= 64 for m in v), "1 to 8 numbers from 1 to 64"),
    "model.heads": _between(1, 64),
    "model.head_dim": _between(1, 1024),
    "model.classes": (lambda v: 0 <= v <= 100_000, "0 (unconditional) or the number of classes, at most 100000"),
    "model.class_dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "model.bottleneck_width": (lambda v: 0 < v <= 16, "greater than 0, and at most 16"),
    "model.bottleneck_blocks": _between(0, 4),
    "model.bottleneck_select": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "diffusion.timesteps": _between(2, 100_000),
    "diffusion.beta_start": (lambda v: 1e-12 <= v < 1, "in [1e-12, 1)"),
    "diffusion.beta_end": (lambda v: 0 < v < 1, "in (0, 1)"),
    "optim.lr": (lambda v: v > 0, "greater than 0"),
    "optim.batch_size": _between(1, 10_000_000),
    "optim.warmup_steps": _between(0, MANY),
    "optim.grad_clip": (lambda v: v is None or 0 < v <= MANY, f"greater than 0, at most {MANY}, or null"),
    "optim.weight_decay": _between(0, 1000),
    "optim.ema": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "compression.levels": _between(2, 2**53),
    "compression.block": (lambda v: 8 <= v <= 2**20 and v & (v - 1) == 0, "a power of two between 8 and 1048576"),
    "compression.fraction": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "compression.rank": _between(1, 4096),
    "sample.steps": _between(1, 100_000),
    "sample.guidance": _between(0, 1000),
    "sample.images": _between(1, 100_000),
    "sample.every": _between(0, MANY),
    "sample.batch_size": _between(1, 100_000),
    "run.seed": (lambda v: 0 <= v < 2**63, "in [0, 2^63)"),
    "run.checkpoint_every": _between(1, MANY),
    "run.keep_checkpoints": _between(2, MANY),
    "runtime.threads": (lambda v: v is None or 1 <= v <= 1024, "between 1 and 1024, or null"),
    "runtime.timeout_s": (lambda v: 0.1 <= v <= MANY, f"between 0.1 and {MANY} seconds"),
}
