"""The configuration of the GPU tests: small enough that none takes seconds to capture, large enough to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fdiff import config as cfg
from fdiff.comm import Communicator, SoloCommunicator
from fdiff.config import Config
from fdiff.federation import federator, rounds

SMALL = Config(
    method="udec",
    federation=cfg.FederationConfig(clients=5, rounds=2, local_epochs=1),
    data=cfg.DataConfig(image_side=8, limit=60),
    model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=8),
    diffusion=cfg.DiffusionConfig(timesteps=50),
    optim=cfg.OptimConfig(batch_size=4),
    sample=cfg.SampleConfig(sampler="ddim", steps=5, images=2, every=2),
)


def on(device: torch.device, config: Config = SMALL, **runtime: Any) -> Config:
    """The configuration for a device; steps are captured on a GPU and not compiled, which would take the longest."""
    how = {"execution": "captured" if device.type == "cuda" else "eager", "threads": 1, **runtime}
    return replace(config, runtime=replace(config.runtime, device=device.type, **how))


def play(
    config: Config, device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch, resume: bool = False,
    comm: Communicator | None = None,
) -> Path:  # fmt: skip
    """A run in this process; its folder."""
    monkeypatch.setattr(federator, "lock", lambda path: 0)  # which a process holds for life
    config = replace(config, run=replace(config.run, dir=str(folder)))
    return rounds.run(config, comm or SoloCommunicator(), device, resume)
