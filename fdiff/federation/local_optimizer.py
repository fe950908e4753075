"""A client's optimizer: Adam or AdamW on the whole arena, and what follows the steps a client has taken in the run.

All of it is arithmetic on device tensors, so that a captured step sees another rate and decay each time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdiff.config import OptimConfig
from fdiff.model import Buckets

STEPS = "steps-taken"  # what a client keeps under this name: the steps that it has taken over the whole run, () int64


def rate_at(optim: OptimConfig, steps: Tensor) -> Tensor:
    """The learning rate after so many steps () int64: lr · (steps + 1) / warmup_steps, at most lr; () float64.

    The first step has a rate already, unlike with diffusers, and step `warmup_steps` the whole one.
    """
    return optim.lr * ((steps.double() + 1) / optim.warmup_steps).clamp(max=1)


def decay_at(optim: OptimConfig, steps: Tensor) -> Tensor:
    """The moving average's decay after so many steps () int64: (1 + steps) / (10 + steps), at most ema; () float64.

    At a client's first step it is 0, as with diffusers' EMAModel: the average begins with what that step left.
    """
    rising = ((1 + steps.double()) / (10 + steps)).clamp(max=optim.ema)
    return rising.masked_fill(steps == 0, 0)


def clip(gradient: Tensor, longest: float) -> None:
    """Shorten the gradient (P,) in place if its norm is larger, as `torch.nn.utils.clip_grad_norm_` does.

    A gradient that is not finite becomes NaN, which the round finds, and not 0.
    """
    gradient.mul_((longest / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1))


class LocalOptimizer:
    """Adam, or with `optim.weight_decay` AdamW, on `buckets.flat`; with warm-up its rate follows `steps` () int64.

    Decoupled decay is of the whole arena: norms and biases as well, as torch has it by default. `moments` are
    `exp_avg` and `exp_avg_sq` (P,) and `step` (), Adam's own count, which a fresh Adam begins anew.
    """

    def __init__(self, optim: OptimConfig, buckets: Buckets, steps: Tensor | None) -> None:
        self._optim, self._steps, self._gradient = optim, steps, buckets.grad
        flat, device = nn.Parameter(buckets.flat), buckets.flat.device
        flat.grad = buckets.grad
        # On a CPU the fused kernel rounds the last few elements of a tensor otherwise than the rest, so one flat
        # tensor would train to other last bits than separate ones; the unfused costs little there.
        on_cpu = device.type == "cpu"
        how = {"fused": not on_cpu, "foreach": on_cpu, "capturable": not on_cpu}
        # A captured step reads its rate from the device; the unfused Adam of a CPU wants a number.
        self._rate = None if on_cpu else torch.zeros((), dtype=torch.float32, device=device)
        lr = optim.lr if self._rate is None or not optim.warmup_steps else self._rate
        if optim.weight_decay:
            self._adam: torch.optim.Optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=optim.weight_decay, **how)
        else:
            self._adam = torch.optim.Adam([flat], lr=lr, **how)
        self.moments = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(buckets.flat),
            "exp_avg_sq": torch.zeros_like(buckets.flat),
        }
        self._adam.state[flat].update(self.moments)

    def step(self) -> None:
        """One step with the gradient in the buckets, which is clipped in place."""
        if self._optim.grad_clip is not None:
            clip(self._gradient, self._optim.grad_clip)
        if self._optim.warmup_steps:
            self._set_rate()
        self._adam.step()

    def _set_rate(self) -> None:
        assert self._steps is not None
        rate = rate_at(self._optim, self._steps)
        if self._rate is None:
            self._adam.param_groups[0]["lr"] = rate.item()
        else:
            self._rate.copy_(rate)
