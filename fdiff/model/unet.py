"""The paper's UNet with ConvNeXt blocks, cut into the three parts that the methods share or keep.

`encoder` (stem, time MLP, down stages), `bottleneck` (middle blocks) and `decoder` (up stages, head) are submodules:
a parameter's part is where it lives. The widths and the order of operations are those of FedDiffuse
(arXiv 2406.12575), which follows Ho et al. (2020) with the blocks of Liu et al. (2022).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdiff.config import PARTS


class UNet(nn.Module):
    """Predicts the noise (or v) in images of any side that the stages can halve evenly.

    `channels` is 1 or 3; stage i has dim × dim_mults[i] channels. With `classes` > 0 the embedding of one of so many
    labels is added to the time vector. For dim 28, one channel and (1, 2, 4) it has 2,996,315 parameters: 1,280,642 in
    the encoder, 999,376 in the bottleneck and 716,297 in the decoder. What begins with `bottleneck_` is `Bottleneck`'s.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        dim_mults: tuple[int, ...],
        heads: int = 4,
        head_dim: int = 32,
        classes: int = 0,
        bottleneck_width: float = 1.0,
        bottleneck_blocks: int = 2,
        bottleneck_attention: str = "softmax",
        bottleneck_select: float = 1.0,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in dim_mults]
        self.encoder = Encoder(channels, dim, widths, heads, head_dim, classes)
        self.bottleneck = Bottleneck(
            widths[-1],
            4 * dim,
            heads,
            head_dim,
            bottleneck_width,
            bottleneck_blocks,
            bottleneck_attention,
            bottleneck_select,
        )
        self.decoder = Decoder(channels, dim, widths, heads, head_dim)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """The three parts, in order."""
        return {part: [self.get_submodule(part)] for part in PARTS}

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy images x (B, C, S, S), t (B,) from 0, labels (B,) or None → predicted noise, or v (B, C, S, S)."""
        h, skips, time = self.encoder(x, t, labels)
        return self.decoder(self.bottleneck(h, time), skips, time)


class Encoder(nn.Module):
    """Stem, time MLP and down stages: (B, C, S, S), (B,) → (B, w, s, s), the skips, the time vector (B, 4·dim)."""

    layout = "auto"  # of activations, as `runtime.layout`: set it where the model is to run

    def __init__(
        self, channels: int, dim: int, widths: list[int], heads: int, head_dim: int, classes: int
    ) -> None:
        super().__init__()
        stem = 2 * (dim // 3)
        self.stem = nn.Conv2d(channels, stem, 7, padding=3)
        self.time = nn.Sequential(
            SinusoidalEmbedding(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)
        )
        self.label = nn.Embedding(classes, 4 * dim) if classes else None
        last = len(widths) - 1
        self.stages = nn.ModuleList(
            DownStage(w_in, w_out, 4 * dim, heads, head_dim, downsample=i < last)
            for i, (w_in, w_out) in enumerate(zip([stem, *widths[:-1]], widths, strict=True))
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        embedding, *mlp = self.time
        time = embedding(t).to(x.dtype)
        for layer in mlp:
            time = layer(time)
        if self.label is not None:
            time = time + self.label(labels)
        h, skips = self._laid_out(self.stem(x)), []
        for stage in self.stages:
            h, skip = stage(h, time)
            skips.append(skip)
        return h, skips[1:], time  # the first stage's skip has no consumer

    def _laid_out(self, h: Tensor) -> Tensor:
        """In `layout`, which all that follows keeps; by itself channels last on a CPU.

        There it makes convolutions up to six times as fast, backwards above all.
        """
        last = h.device.type == "cpu" if self.layout == "auto" else self.layout == "channels-last"
        return h.contiguous(memory_format=torch.channels_last) if last else h


class Bottleneck(nn.Module):
    """Block, softmax attention, block, all at the last width; or a variant: (B, w, s, s), (B, 4·dim) → (B, w, s, s).

    `select`: only ⌈select · w⌉ of the maps enter, those with the highest of w learned scores; the others are zero.
    `multiple`: inside there are multiple · w maps, to the nearest whole number (of a half: the even one), at least 1;
    if these are not w, 1×1 convolutions lead in and out. `attention`, one of `ATTENTIONS` or "none", follows the first
    half of the `blocks` (the larger half). Without selection there are no scores.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        heads: int,
        head_dim: int,
        multiple: float = 1.0,
        blocks: int = 2,
        attention: str = "softmax",
        select: float = 1.0,
    ) -> None:
        super().__init__()
        inner, before = max(1, round(multiple * width)), (blocks + 1) // 2
        self.selected = max(1, math.ceil(select * width - 1e-9))  # 0.07 of 100 is 7, whatever 0.07 is in binary
        # Equal at first, so that the first steps choose: no map of a fresh encoder is better than another.
        self.scores = nn.Parameter(torch.zeros(width)) if self.selected < width else None
        # `forward` runs the modules in the order in which they come into being.
        if inner != width:
            self.enter = nn.Conv2d(width, inner, 1)
        for i in range(1, before + 1):
            self.add_module(f"block{i}", ConvNextBlock(inner, inner, time_dim))
        if attention != "none":
            self.attention = PreNormResidual(inner, ATTENTIONS[attention](inner, heads, head_dim))
        for i in range(before + 1, blocks + 1):
            self.add_module(f"block{i}", ConvNextBlock(inner, inner, time_dim))
        if inner != width:
            self.leave = nn.Conv2d(inner, width, 1)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        if self.scores is not None:
            h = h * gates(self.scores, self.selected).to(h.dtype)[:, None, None]
        for module in self.children():
            h = module(h, time) if isinstance(module, ConvNextBlock) else module(h)
        return h


def gates(scores: Tensor, count: int) -> Tensor:
    """1 at the `count` highest of the scores (C,), of equal ones the first, and 0 elsewhere: (C,), to the bit.

    Backwards it is the sigmoid of the scores, so that those left out learn as well (straight through).
    """
    # By rank: of equal values topk takes any, and may take others on another device.
    ranks = scores.argsort(descending=True, stable=True).argsort()
    soft = scores.sigmoid()
    return (ranks < count).to(scores.dtype) + (soft - soft.detach())


class Decoder(nn.Module):
    """Up stages, deepest first, and the head: (B, w, s, s), skips, (B, 4·dim) → (B, C, S, S)."""

    def __init__(self, channels: int, dim: int, widths: list[int], heads: int, head_dim: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            UpStage(deep, shallow, 4 * dim, heads, head_dim)
            for deep, shallow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.block = ConvNextBlock(widths[0], dim, None)
        self.out = nn.Conv2d(dim, channels, 1)

    def forward(self, h: Tensor, skips: list[Tensor], time: Tensor) -> Tensor:
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            h = stage(h, skip, time)
        return self.out(self.block(h, None))


class DownStage(nn.Module):
    """Two blocks, linear attention, then halving of the side unless it is the last stage."""

    def __init__(
        self, w_in: int, w_out: int, time_dim: int, heads: int, head_dim: int, downsample: bool
    ) -> None:
        super().__init__()
        self.block1 = ConvNextBlock(w_in, w_out, time_dim)
        self.block2 = ConvNextBlock(w_out, w_out, time_dim)
        self.attention = PreNormResidual(w_out, LinearAttention(w_out, heads, head_dim))
        self.down = nn.Conv2d(w_out, w_out, 4, stride=2, padding=1) if downsample else nn.Identity()

    def forward(self, h: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.attention(self.block2(self.block1(h, time), time))
        return self.down(skip), skip


class UpStage(nn.Module):
    """Concatenate the skip, two blocks, linear attention, then doubling of the side."""

    def __init__(self, w_deep: int, w_shallow: int, time_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.block1 = ConvNextBlock(2 * w_deep, w_shallow, time_dim)
        self.block2 = ConvNextBlock(w_shallow, w_shallow, time_dim)
        self.attention = PreNormResidual(w_shallow, LinearAttention(w_shallow, heads, head_dim))
        self.up = nn.ConvTranspose2d(w_shallow, w_shallow, 4, stride=2, padding=1)

    def forward(self, h: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        h = torch.cat((h, skip), dim=1)
        return self.up(self.attention(self.block2(self.block1(h, time), time)))


class ConvNextBlock(nn.Module):
    """Depthwise 7×7, plus the projected time vector, norm, 3×3 to twice the width, GELU, norm, 3×3, residual."""

    def __init__(self, w_in: int, w_out: int, time_dim: int | None) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.GELU(), nn.Linear(time_dim, w_in)) if time_dim else None
        self.depthwise = nn.Conv2d(w_in, w_in, 7, padding=3, groups=w_in)
        self.net = nn.Sequential(
            nn.GroupNorm(1, w_in),
            nn.Conv2d(w_in, 2 * w_out, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, 2 * w_out),
            nn.Conv2d(2 * w_out, w_out, 3, padding=1),
        )
        self.residual = nn.Conv2d(w_in, w_out, 1) if w_in != w_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        # The bias joins the time vector: the convolution's backward would sum for it over every pixel once more.
        width, bias = self.depthwise.weight.shape[0], self.depthwise.bias
        h = F.conv2d(x, self.depthwise.weight, padding=3, groups=width)
        shift = bias[None] if self.time is None else self.time(time) + bias
        return self.net(h + shift[:, :, None, None]) + self.residual(x)


class PreNormResidual(nn.Module):
    """x + fn(GroupNorm(x)) with one group."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class Attention(nn.Module):
    """Softmax attention over positions, scaled by head_dim^-1/2."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Conv2d(width, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.heads, self.head_dim, -1).transpose(-1, -2).unbind(1)  # (B, H, N, D)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(-1, -2).reshape(b, -1, height, width))


class LinearAttention(nn.Module):
    """Attention linear in the positions: softmax of q over features and of k over positions (Shen et al., 2021)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Conv2d(width, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Sequential(nn.Conv2d(heads * head_dim, width, 1), nn.GroupNorm(1, width))

    def forward(self, x: Tensor) -> Tensor:
        """softmax(q)·(softmax(k)ᵀ v) W, associated the other way round: x is narrower than the heads together.

        The values and the heads' outputs, which are as large as q and k, then never come into being.
        """
        b, width, *sides = x.shape
        w_q, w_k, w_v = self.qkv.weight.view(3, -1, width, 1, 1).unbind(0)
        proj, norm = self.out
        positions = x.flatten(2).transpose(1, 2)  # (B, N, C)
        q = _rows(F.conv2d(x, w_q)).unflatten(-1, (self.heads, self.head_dim)).softmax(dim=-1)  # (B, N, H, D)
        k = _rows(F.conv2d(x, w_k)).softmax(dim=1)  # (B, N, H·D)
        seen = (k.transpose(1, 2) @ positions).unflatten(1, (self.heads, -1))  # (B, H, D, C)
        context = seen @ w_v.view(self.heads, self.head_dim, width).transpose(1, 2)  # (B, H, D, D)
        w_out = proj.weight.view(width, self.heads, self.head_dim).permute(1, 2, 0) * self.head_dim**-0.5
        mixed = (context @ w_out).flatten(1, 2)  # (B, H·D, C)
        out = torch.baddbmm(proj.bias, q.flatten(2), mixed)  # (B, N, C)
        return norm(out.transpose(1, 2).unflatten(2, sides))


ATTENTIONS: dict[str, type[nn.Module]] = {"softmax": Attention, "linear": LinearAttention}


def _rows(h: Tensor) -> Tensor:
    """(B, C, S, S) → (B, S·S, C), a view where channels are last."""
    return h.flatten(2).transpose(1, 2)


class SinusoidalEmbedding(nn.Module):
    """t (B,) → (B, dim): sines and cosines of dim/2 geometric frequencies from 1 to 1/10000 (Vaswani et al., 2017)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        # Computed in float64 and kept out of the state: the same on every device, and a constant to a compiler. On
        # the CPU first: on the meta device this arithmetic would have torch import its compiler, for over a second.
        steps = torch.arange(half, dtype=torch.float64, device="cpu") / max(half - 1, 1)
        frequencies = torch.exp(-math.log(10_000) * steps).to(torch.get_default_device())
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
