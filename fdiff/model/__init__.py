"""The model and the arithmetic of diffusion: a UNet in three parts, in flat buckets, on one device.

Open `unet.py` first (the paper's network), then `diffusion.py` (the schedule, the loss, sampling) and `buckets.py`
(each part's parameters as one flat tensor). Knows no ranks and no files.
"""

from __future__ import annotations

from fdiff.model.buckets import Buckets, Slot, layout_of, part_sizes
from fdiff.model.diffusion import alphas_cumprod
from fdiff.model.unet import PARTS, Encoder, LinearAttention, UNet
