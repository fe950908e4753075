"""The model and the arithmetic of diffusion: a network in parts, in flat buckets, on one device.

Open `unet.py` first (the paper's network), then `diffusion.py` (the schedule, the loss, sampling), `parts.py` (what a
model of your own has to be) and `buckets.py` (each part's parameters as one flat tensor). Knows no ranks and no files.
"""

from __future__ import annotations

from fdiff.config import PARTS
from fdiff.model.buckets import Buckets, Slot, arena_order, layout_of, part_sizes
from fdiff.model.building import (
    build_model,
    check_forward,
    check_model,
    describe_model,
    frozen_parts,
    parts_of,
    sizes_of,
)
from fdiff.model.diffusion import alphas_cumprod
from fdiff.model.labels import drop_labels, no_class, unconditional
from fdiff.model.unet import Encoder, LinearAttention, UNet
