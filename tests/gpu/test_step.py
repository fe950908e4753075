"""A training step on the GPU against the same on the CPU, with timesteps and noise handed in; captured and compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fdiff.config import SampleConfig
from fdiff.data import Shard, open_source
from fdiff.federation import Trainer
from fdiff.federation.client import Client
from fdiff.model import PARTS, diffusion
from fdiff.runtime import allow_tf32
from tests.gpu.small import SMALL, on

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
STEPS = 50
BANDS = {"float32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}  # of a step's loss, relative
# Parameters as in the README: 1e-5 of a tensor's largest value, or of 0.01. A fresh Adam steps by the learning rate
# wherever the sign of a gradient is a matter of rounding: elements with a first gradient under a hundredth of their
# tensor's root mean square are held to that alone, and of the others one in a thousand.
BOUND, SMALLEST_SCALE, FRAGILE, SHARE = 1e-5, 0.01, 1e-2, 1e-3


def batches(steps: int) -> list[tuple[torch.Tensor, ...]]:
    """Images in [-1, 1], timesteps, noise and labels of so many steps, drawn on the CPU."""
    drawn = torch.Generator().manual_seed(7)
    source = open_source(SMALL.data, "train")
    size, shape = SMALL.optim.batch_size, (1, SMALL.data.image_side, SMALL.data.image_side)
    made = []
    for step in range(steps):
        x0 = source.images(np.arange(size) + step % 10 * size).float() / 127.5 - 1
        t = torch.randint(SMALL.diffusion.timesteps, (size,), generator=drawn)
        made.append((x0, t, torch.randn(size, *shape, generator=drawn), torch.zeros(size, dtype=torch.int64)))
    return made


@cache
def descended(
    device: torch.device, steps: int, precision: str = "float32"
) -> tuple[list[float], torch.Tensor, Trainer]:
    """Losses, the gradient of the first step (P,), and the trainer after all."""
    allow_tf32(precision == "tf32")
    trainer = Trainer(on(device, execution="eager", precision=precision), device)
    losses, first = [], torch.empty(0)
    for step, batch in enumerate(batches(steps)):
        losses.append(trainer.descend(*(tensor.to(device) for tensor in batch)))
        first = trainer.buckets.grad.cpu().clone() if step == 0 else first
    return [loss.item() for loss in losses], first, trainer


@pytest.mark.parametrize("precision", BANDS)
def test_losses_are_the_cpus(precision, device, record_property):
    theirs = descended(CPU, STEPS)[0]
    ours = descended(device, STEPS, precision)[0]
    off = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    record_property("largest_relative_difference", off)
    assert off <= BANDS[precision]


def test_parameters_are_the_cpus(device, record_property):
    steps = 6
    _, first, theirs = descended(CPU, steps)
    ours = descended(device, steps)[2].buckets.flat.cpu()
    differences = []
    for slot, start in theirs.buckets._starts():
        here = slice(start, start + slot.numel)
        b, gradient = theirs.buckets.flat[here], first[here]
        off = (ours[here] - b).abs()
        fragile = gradient.abs() < FRAGILE * gradient.square().mean().sqrt()
        assert off.max() <= 2.1 * SMALL.optim.lr * steps
        differences.append(off[~fragile] / max(b.abs().max().item(), SMALLEST_SCALE))
    settled = torch.cat(differences)
    record_property("share_beyond", (settled > BOUND).double().mean().item())
    assert (settled > BOUND).double().mean() <= SHARE


def trained(device: torch.device, execution: str) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Parameters and losses after two epochs whose last batch is short."""
    config = on(device, execution=execution)
    trainer = Trainer(replace(config, federation=replace(config.federation, local_epochs=2)), device)
    client = Client(0, Shard(open_source(config.data, "train"), np.arange(18), device))
    trainer.prepare(client, 1)
    losses = trainer.train(client, 1).losses
    trainer.buckets.check_shared()
    return trainer.buckets.flat.cpu(), losses


def test_a_captured_step_is_the_uncaptured_one(gpu):
    (ours, losses), (theirs, expected) = trained(gpu, "captured"), trained(gpu, "eager")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_layouts_agree(layout, device):
    trainer = Trainer(on(device, execution="eager", layout=layout), device)
    x0, t, epsilon, _ = (tensor.to(device) for tensor in batches(1)[0])
    other = Trainer(on(device, execution="eager"), device)
    ours, theirs = (diffusion.loss(one.model, one.schedule, x0, t, epsilon) for one in (trainer, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert trainer.buckets.flat.is_cuda == (device.type == "cuda") and list(trainer.buckets.sizes) == list(PARTS)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_are_the_cpus(sampler, device, record_property):
    """The noise is a function of image and step, the same on every device."""
    sample = SampleConfig(sampler=sampler, steps=10, clip=True, batch_size=4)
    images, drawn = torch.arange(4), []
    for where in (CPU, device):
        config = replace(on(where), sample=sample)
        trainer = Trainer(config, where)
        drawn.append(trainer.drawing(config, 4).draw(images.to(where)).cpu())
    off = (drawn[0] - drawn[1]).abs().max().item()
    record_property("largest_difference", off)
    assert off <= 1e-3


def test_a_compiled_step_is_the_eager_one(gpu):
    pytest.importorskip("triton")
    (ours, losses), (theirs, expected) = trained(gpu, "compiled"), trained(gpu, "eager")
    assert losses == pytest.approx(expected, rel=1e-3)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
