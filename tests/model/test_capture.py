"""Captured steps: on a GPU as they are, elsewhere with a stand-in that warms up, captures and replays by calling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from called_graph import Called, use_called_graphs

from fdiff.config import OptimConfig, SampleConfig, mini
from fdiff.data import Shard, open_source
from fdiff.federation.client import Client, Trainer
from fdiff.model import capture, diffusion, unet

CPU = torch.device("cpu")
CONFIG = replace(mini(), optim=OptimConfig(batch_size=8, ema=0.9))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def called(monkeypatch):
    use_called_graphs(monkeypatch)


def trained(device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """Parameters, moving average and losses after two rounds of epochs whose last batch is short."""
    trainer = Trainer(replace(CONFIG, federation=replace(CONFIG.federation, local_epochs=2)), device)
    client = Client(0, Shard(open_source(CONFIG.data, "train"), range(20), device))
    losses: tuple[float, ...] = ()
    for round in (1, 2):
        trainer.prepare(client, round)
        losses += trainer.train(client, round).losses
    return trainer.buckets.flat.cpu(), trainer.working["ema"].cpu(), losses


def drawn(sampler: str, device: torch.device = CPU) -> torch.Tensor:
    trainer = Trainer(CONFIG, device)
    table = diffusion.make_sampler(
        replace(CONFIG.diffusion, timesteps=12), SampleConfig(sampler=sampler, steps=5, clip=True)
    )
    images = torch.arange(3, device=device)
    return diffusion.sample(trainer.denoiser, table, 7, images, (1, 16, 16)).cpu()


def test_a_captured_training_step_computes_what_the_plain_one_does(request):
    plain = trained()
    request.getfixturevalue("called")
    captured = trained()
    assert Called.replays == 2 * 2 * 2  # rounds, epochs, whole batches
    assert torch.equal(plain[0], captured[0]) and torch.equal(plain[1], captured[1]) and plain[2] == captured[2]


@pytest.mark.parametrize("sampler, steps", [("ddpm", 12), ("ddim", 5)])
def test_a_captured_sampling_step_computes_what_the_plain_one_does(request, sampler, steps):
    plain = drawn(sampler)
    request.getfixturevalue("called")
    assert torch.equal(plain, drawn(sampler))
    assert Called.replays == steps


@pytest.mark.slow
def test_the_step_is_one_graph_to_the_compiler(monkeypatch):
    """Without a break, and with a backward pass: what `torch.compile` needs of the model, in the layout of a GPU."""
    monkeypatch.setattr(unet, "_faster_layout", lambda h: h)
    trainer = Trainer(CONFIG, CPU)
    loss = torch.compile(diffusion.loss, backend="aot_eager", fullgraph=True, dynamic=False)
    x, t = torch.randn(4, 1, 16, 16), torch.tensor([0, 3, 500, 999])
    noise = torch.randn(4, 1, 16, 16)
    plain = diffusion.loss(trainer.model, trainer.schedule, x, t, noise)
    plain.backward()
    expected = trainer.buckets.grad.clone()
    trainer.buckets.grad.zero_()
    value = loss(trainer.model, trainer.schedule, x, t, noise)
    value.backward()
    trainer.buckets.check_shared()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(trainer.buckets.grad, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_captured_or_compiled_without_a_gpu():
    assert not capture.can_capture(CPU)
    assert capture.compiled(diffusion.loss, CPU) is diffusion.loss


@needs_gpu
def test_on_a_gpu_the_captured_steps_agree_with_the_plain_ones(monkeypatch):
    gpu = torch.device("cuda", 0)
    captured, images = trained(gpu), drawn("ddpm", gpu)
    for module in (capture, diffusion):
        monkeypatch.setattr(module, "can_capture", lambda device: False)
    monkeypatch.setattr(capture, "compiled", lambda function, device: function)
    plain = trained(gpu)
    assert captured[2] == pytest.approx(plain[2], rel=1e-4)
    torch.testing.assert_close(images, drawn("ddpm", gpu), rtol=1e-3, atol=1e-3)
