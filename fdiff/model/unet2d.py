"""diffusers' UNet2DModel, cut into the three parts that the methods share or keep. Imported where it is used: see
`building`.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn


class UNet2D(UNet2DModel):
    """Predicts the noise, or v; its parameters have diffusers' names.

    `encoder` is what meets the image first (convolution, embeddings of the timestep and of the class, down blocks),
    `bottleneck` the middle block, `decoder` the up blocks and the last convolution with its norm.
    """

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """The three parts, in order."""
        embeddings = [self.time_proj, self.time_embedding, self.class_embedding]
        return {
            "encoder": [self.conv_in, *(module for module in embeddings if module is not None), self.down_blocks],
            "bottleneck": [self.mid_block],
            "decoder": [self.up_blocks, self.conv_norm_out, self.conv_out],
        }

    def to(self, *args: Any, **kwargs: Any) -> UNet2D:
        """As any module's; diffusers' own warns of parameters to be kept in float32, of which there are none."""
        return nn.Module.to(self, *args, **kwargs)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy images x (B, C, S, S), t (B,) from 0, labels (B,) or None → predicted noise, or v (B, C, S, S)."""
        return super().forward(x, t, labels, return_dict=False)[0]
