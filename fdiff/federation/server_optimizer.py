"""A step of the federator's optimizer on the averaged update (Reddi et al. 2021, "Adaptive Federated Optimization").

Algorithm 2 there, with Δ_t the averaged update of the shared parts, which every rank has, so that no byte more is sent:

    momentum   m_t = β₁ m_{t-1} + Δ_t                                x_t = x_{t-1} + η m_t
    adam       m_t = β₁ m_{t-1} + (1 - β₁) Δ_t                       x_t = x_{t-1} + η m_t / (√v_t + τ)
               v_t = β₂ v_{t-1} + (1 - β₂) Δ_t²
    yogi       as adam, v_t = v_{t-1} - (1 - β₂) Δ_t² sign(v_{t-1} - Δ_t²)

m₀ = 0 and v₀ = τ², the least that Reddi et al. allow. As theirs, and unlike Flower's FedAdam, which multiplies η by
√(1 - β₂^{t+1}) / (1 - β₁^{t+1}), nothing is corrected for the start from zero. Flower's v₀ is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdiff.config import FederationConfig

MEAN, SQUARES = "server-mean", "server-squares"
RATES = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}  # measured: see README.md


def state_of(config: FederationConfig) -> dict[str, float]:
    """What the optimizer keeps for each value, with what it is at the start."""
    kept = {"average": (), "momentum": (MEAN,)}.get(config.server, (MEAN, SQUARES))
    return {name: config.server_tau**2 if name == SQUARES else 0.0 for name in kept}


def step(config: FederationConfig, start: Tensor, average: Tensor, state: Mapping[str, Tensor]) -> None:
    """Turn the average (n,), in place, into the parameters after the step from `start`; `state` goes on with it.

    With momentum, β₁ = 0 and η = 1 the average stays as it is, to the bit.
    """
    update, rate = average - start, config.server_lr or RATES[config.server]
    mean, beta1, beta2 = state[MEAN], config.server_beta1, config.server_beta2
    if config.server == "momentum":
        if rate != 1:
            average.add_(update, alpha=rate - 1)
        if beta1:
            average.add_(mean, alpha=rate * beta1)
        mean.mul_(beta1).add_(update)
        return
    squares = state[SQUARES]
    mean.lerp_(update, 1 - beta1)
    squared = update.square_()
    if config.server == "adam":
        squares.lerp_(squared, 1 - beta2)
    else:
        squares.sub_(squared * torch.sign(squares - squared), alpha=1 - beta2)
    average.copy_(start).addcdiv_(mean, squares.sqrt().add_(config.server_tau), value=rate)
