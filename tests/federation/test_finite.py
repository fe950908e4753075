"""Numbers that are not finite: refused before training, seen after the last step, never committed, drawn or scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import TINY, fdiff
from small_datasets import refusal

from fdiff.config import Config, DataConfig, DiffusionConfig, FederationConfig, ModelConfig, OptimConfig
from fdiff.data import Shard, open_source
from fdiff.errors import RunError
from fdiff.federation import Client, Trainer, sampling
from fdiff.federation.host import Host

CPU = torch.device("cpu")
SMALL = Config(
    data=DataConfig(image_side=8, channels=1, limit=16),
    federation=FederationConfig(clients=1, rounds=1, local_epochs=1),
    model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
    diffusion=DiffusionConfig(timesteps=10),
    optim=OptimConfig(batch_size=16),
)


@pytest.mark.parametrize(
    "fields",
    [{"timesteps": 20_000}, {"beta_start": 0.9, "beta_end": 0.99}, {"timesteps": 100_000, "beta_end": 0.01}],
)
def test_a_schedule_that_leaves_nothing_of_an_image_is_refused(fields: dict) -> None:
    refusal(lambda: Config(diffusion=DiffusionConfig(**fields)), "diffusion.timesteps", "ᾱ_T", "float32")


def test_the_papers_schedule_and_longer_ones_are_taken() -> None:
    for fields in ({}, {"timesteps": 4000, "beta_end": 0.02}, {"timesteps": 8000, "beta_end": 0.02}):
        assert Config(diffusion=DiffusionConfig(**fields))


def trained(lr: float, **fields: object) -> Trainer:
    """One step, the round's last one."""
    config = replace(SMALL, optim=replace(SMALL.optim, lr=lr), **fields)
    trainer = Trainer(config, CPU)
    client = Client(0, Shard(open_source(config.data, "train"), np.arange(16), CPU))
    Host(trainer, [client]).enter(client)
    trainer.prepare(client, 1)
    trainer.train(client, 1, lambda: None)
    return trainer


@pytest.mark.parametrize("lr", [1e20, 1e30])
def test_a_divergence_in_the_last_step_is_seen(lr: float) -> None:
    """Its own loss was still finite, and so are the weights."""
    with pytest.raises(RunError, match="after the last step .* is not a finite number; use a smaller optim.lr"):
        trained(lr)


def test_the_last_look_changes_no_result() -> None:
    a, b = trained(1e-3), trained(1e-3)
    assert torch.equal(a.buckets.flat, b.buckets.flat) and a.buckets.flat.isfinite().all()


@pytest.mark.parametrize("client", [None, 3])
def test_images_that_are_not_finite_are_an_error_that_names_model_and_round(client: int | None) -> None:
    trainer = trained(1e-3)
    trainer.buckets.flat.fill_(1e30)
    whose = "the global model" if client is None else "client 3"
    with pytest.raises(RunError, match=f"{whose}, round 7: a drawn image is not a finite number"):
        sampling.draw(trainer, SMALL, sampling.Batch(client, 0, 2, 0), 7)


def test_nothing_of_it_is_committed(tmp_path: Path) -> None:
    one_step = ["--federation.rounds", 1, "--optim.batch_size", 64, "--optim.lr", "1e30"]
    done = fdiff("train", *TINY, *one_step, "--run.dir", "run", cwd=tmp_path)
    assert done.status == 1 and "client 0, round 1: after the last step the loss is not a finite number" in done.err
    assert not list((tmp_path / "run" / "checkpoints").glob("round-*"))
