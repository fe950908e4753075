"""The plain PyTorch version beside the package: a round of each of its methods gives the same numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fdiff import seeds
from fdiff.comm import SoloCommunicator
from fdiff.config import (
    Config,
    DataConfig,
    FederationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    SampleConfig,
)
from fdiff.data import normalise, open_source, split_source
from fdiff.federation import open_checkpoint, run
from fdiff.model import build_model

FILE = Path(__file__).parents[2] / "launch" / "plain_fedavg.py"
SPEC = importlib.util.spec_from_file_location("plain_fedavg", FILE)
plain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain)
CONFIG = Config(
    federation=FederationConfig(clients=3, rounds=1, local_epochs=2),
    data=DataConfig(image_side=8, channels=1, limit=90, partition="quantity-skew", beta=5),
    model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
    optim=OptimConfig(lr=1e-3, batch_size=16),
    sample=SampleConfig(every=0),
    runtime=RuntimeConfig(precision="float64", threads=1),
)


def steps(sizes: list[int], shape: tuple[int, ...]):
    """The batches, timesteps and noise of a client's round, as the package draws them."""

    def of(client: int, round: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        shuffling = seeds.torch_stream(CONFIG.run.seed, "shuffling", client, round)
        noise = seeds.torch_stream(CONFIG.run.seed, "noise", client, round)
        for _ in range(CONFIG.federation.local_epochs):
            for batch in torch.randperm(sizes[client], generator=shuffling).split(CONFIG.optim.batch_size):
                t = torch.randint(CONFIG.diffusion.timesteps, (len(batch),), generator=noise)
                yield batch, t, torch.randn(len(batch), *shape, generator=noise).double()

    return of


def pairing(round: int):
    """The random numbers that pair, behind those that select."""
    stream = seeds.numpy_stream(CONFIG.run.seed, "plan", round=round)
    stream.permutation(CONFIG.federation.clients)
    return stream


@pytest.mark.parametrize("method", ["full", "udec", "usplit"])
def test_a_round_is_the_packages_in_float64(tmp_path, method):
    config = replace(CONFIG, method=method, run=RunConfig(dir=str(tmp_path / "run")))
    run(config, SoloCommunicator(), torch.device("cpu"))
    source = open_source(config.data, "train")
    images = [normalise(source.images(rows), torch.float64) for rows in split_source(source, config.data, 3)]
    sizes = [len(own) for own in images]
    assert len(set(sizes)) > 1
    model, of = build_model(config).double(), steps(sizes, config.data.shape)
    clients = plain.federate(model, images, of, method, 1, pairing, 1e-3)
    saved = open_checkpoint(tmp_path / "run")
    for client, model in enumerate(clients):
        mine = saved.parameters(client if method == "udec" else None, ema=False)
        theirs = torch.cat([p.detach().reshape(-1) for part in plain.PARTS for p in getattr(model, part).parameters()])
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12), (mine - theirs).abs().max()
        assert not torch.equal(theirs, torch.cat([p.reshape(-1) for p in build_model(config).double().parameters()]))
