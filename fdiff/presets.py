"""The configurations that have a name: the paper's, those of other data sets, and one for two cores."""

from __future__ import annotations

import re
from dataclasses import replace

from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig, OptimConfig, SampleConfig
from fdiff.errors import UserError

_VARIANTS = re.compile(
    r"(fmnist|celeba|cifar10|folder|mini)((?:-k\d+)?(?:-e\d+)?(?:-label-skew|-quantity-skew|-label-count)?)"
)
PRESETS = (
    "fmnist, celeba, cifar10, folder or mini, each also with -kK, -eE, and -label-skew, -quantity-skew or "
    "-label-count behind it, in this order (fmnist-k10-e5-label-skew)"
)


def preset(name: str) -> Config:
    """The configuration of that name, e.g. `fmnist`, `fmnist-k10-e1-label-skew`, `cifar10`, `mini`."""
    match = _VARIANTS.fullmatch(name)
    if not match:
        raise UserError(f"--preset: {name!r} is not a preset; there are {PRESETS}")
    config = {"fmnist": fmnist, "celeba": celeba, "cifar10": cifar10, "folder": folder, "mini": mini}[match[1]]()
    variant = match[2]
    fed = config.federation
    if k := re.search(r"-k(\d+)", variant):
        fed = replace(fed, clients=int(k[1]))
    if e := re.search(r"-e(\d+)", variant):
        fed = replace(fed, local_epochs=int(e[1]))
    split = re.search(r"(label|quantity)-(skew|count)", variant)
    return replace(config, federation=fed, data=replace(config.data, partition=split[0]) if split else config.data)


def fmnist() -> Config:
    """The paper's Fashion-MNIST: 60,000 images of 28×28×1, R = 15, K = 5, E = 5, B = 128, dim 28."""
    return Config(data=DataConfig(dataset="fashion-mnist", image_side=28, channels=1))


def celeba() -> Config:
    """The paper's CelebA: 64×64×3, R = 30, K = 5, E = 5, B = 64, dim 64."""
    return Config(
        federation=FederationConfig(rounds=30),
        data=DataConfig(dataset="celeba", image_side=64, channels=3),
        model=ModelConfig(dim=64),
        optim=OptimConfig(batch_size=64),
    )


def cifar10() -> Config:
    """CIFAR-10, 32×32×3, with the paper's settings for CelebA."""
    return replace(celeba(), data=DataConfig(dataset="cifar10", image_side=32, channels=3))


def folder() -> Config:
    """A folder of images as they are, with the paper's settings for CelebA; its root is still to be given."""
    return replace(celeba(), data=DataConfig(dataset="folder"))


def mini() -> Config:
    """Two cores, under three minutes, clothes instead of noise: the embedded images at 16×16, 2 clients, UDEC."""
    return Config(
        method="udec",
        federation=FederationConfig(clients=2, rounds=14, local_epochs=3, keep_optimizer=True),
        data=DataConfig(image_side=16, channels=1),
        model=ModelConfig(dim=16, head_dim=8),
        optim=OptimConfig(lr=2e-3, batch_size=64, ema=0.98),
        sample=SampleConfig(sampler="ddim", clip=True),
    )
