"""FedDiffuse (arXiv 2406.12575) in plain PyTorch, one process, to be read beside the package: FULL, UDEC and USPLIT.

It uses nothing of fdiff. The caller gives the model, the clients' images, and for every step the timesteps and the
noise, so that a round can be held against another implementation of it, number by number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("encoder", "bottleneck", "decoder")  # submodules of the model
SHARED = {"full": PARTS, "usplit": PARTS, "udec": ("decoder",)}

Step = tuple[Tensor, Tensor, Tensor]  # indices (b,) into the client's images, timesteps (b,), noise (b, C, S, S)
Reporters = dict[str, list[int]]  # part: the clients that report it


def federate(
    model: nn.Module,
    images: Sequence[Tensor],
    steps: Callable[[int, int], Iterable[Step]],
    method: str,
    rounds: int,
    pairing: Callable[[int], np.random.Generator],
    lr: float = 1e-4,
    timesteps: int = 1000,
) -> list[nn.Module]:
    """Algorithm 1: rounds of local training and averaging; returns the clients' models.

    `images` has a float tensor (n_k, C, S, S) in [-1, 1] for each client, `steps(client, round)` gives the steps of its
    E epochs, `pairing(round)` the random numbers that pair the clients of USPLIT.
    """
    clients = [copy.deepcopy(model) for _ in images]
    signal, sigma = schedule(timesteps, images[0].dtype)
    for round in range(1, rounds + 1):
        for client, own in enumerate(clients):
            train(own, images[client], steps(client, round), signal, sigma, lr)
        reporters = who_reports(method, len(clients), pairing(round))
        average(clients, [len(own) for own in images], reporters)
    return clients


def schedule(timesteps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 - ᾱ_t), (T,) each, of a linear β from 1e-4 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0)
    return alphas.sqrt().to(dtype), (1 - alphas).sqrt().to(dtype)


def train(
    model: nn.Module, images: Tensor, steps: Iterable[Step], signal: Tensor, sigma: Tensor, lr: float
) -> None:
    """Local training: all parameters, a fresh Adam, Huber loss of the predicted noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for indices, t, noise in steps:
        x0 = images[indices]
        x = signal[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise
        loss = F.smooth_l1_loss(model(x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def who_reports(method: str, clients: int, random: np.random.Generator) -> Reporters:
    """FULL and UDEC: every client reports all shared parts. USPLIT: a half of the clients reports each end."""
    if method == "usplit":
        return split(clients, random)
    return {part: list(range(clients)) for part in SHARED[method]}


def split(clients: int, random: np.random.Generator) -> Reporters:
    """Pairs at random: one client reports the encoder, the other the decoder, one of the two also the bottleneck.

    A client without a partner reports the bottleneck and one of the other two; one that is alone reports all.
    """
    order = [int(client) for client in random.permutation(clients)]
    if clients == 1:
        return {part: order for part in PARTS}
    reporters: Reporters = {part: [] for part in PARTS}
    for first, second in zip(order[0::2], order[1::2], strict=False):
        reporters["encoder"].append(first)
        reporters["decoder"].append(second)
        reporters["bottleneck"].append((first, second)[random.integers(2)])
    if clients % 2:
        reporters["bottleneck"].append(order[-1])
        reporters[("encoder", "decoder")[random.integers(2)]].append(order[-1])
    return {part: sorted(those) for part, those in reporters.items()}


@torch.no_grad()
def average(clients: Sequence[nn.Module], sizes: Sequence[int], reporters: Reporters) -> None:
    """Every client's shared parts become Σ n_k θ_k / Σ n_k over those that report them; the others stay its own."""
    for part, those in reporters.items():
        total = sum(sizes[client] for client in those)
        reported = [dict(clients[client].get_submodule(part).named_parameters()) for client in those]
        mean = {
            name: sum(sizes[client] / total * own[name] for client, own in zip(those, reported, strict=True))
            for name in reported[0]
        }
        for model in clients:
            for name, parameter in model.get_submodule(part).named_parameters():
                parameter.copy_(mean[name])
