"""The configurations of the steps: the paper's on a GPU, tiny ones for a dry run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig, OptimConfig, SampleConfig, fmnist
from fdiff.data.fashion_mnist import DEBIAN_ROOT

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting

DRY = Config(
    federation=FederationConfig(clients=2, rounds=2, local_epochs=1),
    data=DataConfig(image_side=8, limit=40, test_limit=100),
    model=ModelConfig(dim=8, dim_mults=(1,), heads=1, head_dim=4),
    optim=OptimConfig(batch_size=16),
    sample=SampleConfig(sampler="ddim", steps=2, batch_size=98, images=4),
)


def paper(setting: Setting) -> Config:
    """Fashion-MNIST as in the paper, UDEC, K = 5, R = 15, E = 5; grids by DDIM. Without its files the excerpt."""
    if setting.dry:
        return replace(DRY, method="udec")
    config = replace(fmnist(), method="udec", sample=SampleConfig(sampler="ddim", steps=50, batch_size=500))
    if setting.data is not None:
        return replace(config, data=replace(config.data, root=str(setting.data)))
    return config if DEBIAN_ROOT.is_dir() else replace(config, data=DataConfig())
