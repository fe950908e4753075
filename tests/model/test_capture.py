"""Captured steps: on a GPU as they are, elsewhere with a stand-in that warms up, captures and replays by calling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from called_graph import Called, use_called_graphs
from small_datasets import needs_gpu

from fdiff.config import Config, DiffusionConfig, ModelConfig, OptimConfig, RuntimeConfig, SampleConfig
from fdiff.data import Shard, open_source
from fdiff.federation.client import Client, Trainer
from fdiff.federation.host import Host
from fdiff.federation.sampling import Batch, draw
from fdiff.model import capture, diffusion
from fdiff.model.unet import ConvNextBlock
from fdiff.presets import mini

CPU = torch.device("cpu")
TINY = ModelConfig(dim=4, dim_mults=(1,), heads=1, head_dim=4)
CONFIG = replace(mini(), optim=OptimConfig(batch_size=8, ema=0.9))
OPTIONS = replace(
    CONFIG,
    data=replace(CONFIG.data, flip=True),
    model=replace(CONFIG.model, classes=10, class_dropout=0.3),
    optim=replace(CONFIG.optim, warmup_steps=7, grad_clip=0.5, weight_decay=0.1, ema_warmup=True),
    diffusion=DiffusionConfig(schedule="cosine", objective="v"),
    sample=SampleConfig(guidance=2.0),
)


@pytest.fixture
def called(monkeypatch):
    use_called_graphs(monkeypatch)


def trained(
    device: torch.device = CPU, config: Config = CONFIG
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """Parameters, moving average and losses after two rounds of epochs whose last batch is short."""
    trainer = Trainer(replace(config, federation=replace(config.federation, local_epochs=2)), device)
    client = Client(0, Shard(open_source(config.data, "train"), range(20), device))
    losses: tuple[float, ...] = ()
    for round in (1, 2):
        trainer.prepare(client, round)
        losses += trainer.train(client, round).losses
    return trainer.buckets.flat.cpu(), trainer.working["ema"].cpu(), losses


def drawn(sampler: str, device: torch.device = CPU, config: Config = CONFIG) -> torch.Tensor:
    """Two batches, the second one after the parameters have changed, and a short one."""
    sample = replace(config.sample, sampler=sampler, steps=5, clip=True, batch_size=3)
    config = replace(config, diffusion=replace(config.diffusion, timesteps=12), sample=sample)
    trainer = Trainer(config, device)
    drawn = []
    for first, last in ((0, 3), (3, 6), (6, 8)):
        drawn.append(draw(trainer, config, Batch(None, first, last, 0), 1).cpu())
        trainer.buckets.flat.mul_(0.5)
    return torch.cat(drawn)


@pytest.mark.parametrize("config", [CONFIG, OPTIONS], ids=["plain", "options"])
def test_a_captured_training_step_computes_what_the_plain_one_does(request, config):
    plain = trained(config=config)
    request.getfixturevalue("called")
    captured = trained(config=config)
    assert Called.replays == 2 * 2 * 2  # rounds, epochs, whole batches
    assert torch.equal(plain[0], captured[0]) and torch.equal(plain[1], captured[1]) and plain[2] == captured[2]


@pytest.mark.parametrize(
    "sampler, steps, config", [("ddpm", 12, CONFIG), ("ddim", 5, CONFIG), ("ddpm", 12, OPTIONS)]
)
def test_a_captured_sampling_step_computes_what_the_plain_one_does(request, sampler, steps, config):
    plain = drawn(sampler, config=config)
    request.getfixturevalue("called")
    assert torch.equal(plain, drawn(sampler, config=config))
    assert Called.replays == 3 * steps  # captured once a size, replayed for every batch


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_captured_step_does_not_keep_the_weights_of_its_first_batch(precision):
    trainer = Trainer(replace(CONFIG, runtime=RuntimeConfig(precision=precision)), CPU)
    with trainer.autocast():
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())


# --- compiled --------------------------------------------------------------------------------------------------------


def compiling(monkeypatch, **choices: str) -> tuple[Config, torch._dynamo.testing.CompileCounterWithBackend]:
    """A configuration that compiles as a GPU does, and the count of what its compiler is given."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    runtime = RuntimeConfig(execution="compiled", layout="channels-first", **choices)
    return replace(CONFIG, model=TINY, runtime=runtime), counter


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.rare)])  # one graph either way
def test_rounds_clients_and_short_batches_compile_the_step_once(monkeypatch, precision):
    config, counter = compiling(monkeypatch, precision=precision)
    trainer = Trainer(replace(config, federation=replace(config.federation, local_epochs=1)), CPU)
    clients = [Client(i, Shard(open_source(config.data, "train"), range(8 + i), CPU)) for i in range(3)]
    host = Host(trainer, clients)
    for round in (1, 2):
        for client in clients:
            host.enter(client)
            trainer.prepare(client, round)
            trainer.train(client, round)
    trainer.buckets.check_shared()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_models_and_batches_compile_the_sampling_step_once(monkeypatch):
    config, counter = compiling(monkeypatch)
    eager = replace(config, runtime=replace(config.runtime, execution="eager"))
    plain = drawn("ddim", config=eager)
    torch.testing.assert_close(drawn("ddim", config=config), plain, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_the_step_is_one_graph_to_the_compiler():
    """Without a break, and with a backward pass: what `torch.compile` needs of the model, in the layout of a GPU."""
    trainer = Trainer(replace(CONFIG, model=TINY, runtime=RuntimeConfig(layout="channels-first")), CPU)
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


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_the_layout_is_kept_from_block_to_block(layout):
    trainer = Trainer(replace(CONFIG, runtime=RuntimeConfig(layout=layout)), CPU)
    kept = []
    for block in trainer.model.modules():
        if isinstance(block, ConvNextBlock):
            block.register_forward_hook(lambda _, inputs, out: kept.append(out.is_contiguous()))
    trainer.model(torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64))
    assert set(kept) == {layout == "channels-first"}


def test_what_is_captured_and_compiled_where():
    gpu = torch.device("cuda", 0)
    assert not capture.captures(CPU) and not capture.compiles(CPU) and capture.compiles(CPU, "compiled")
    assert capture.compiled(diffusion.loss, CPU) is diffusion.loss
    assert capture.captures(gpu) and capture.captures(gpu, "captured") and not capture.captures(gpu, "eager")
    assert not capture.compiles(gpu, "eager") and not capture.compiles(gpu, "captured")


@pytest.mark.rare  # the step and the drawing of `OPTIONS` are run captured by every run
def test_with_options_training_and_sampling_compile_once_each(monkeypatch):
    """Warm-ups change from step to step, and guidance doubles the batch: no graph has them as a number or a shape."""
    config, counter = compiling(monkeypatch)
    config = replace(OPTIONS, model=replace(TINY, classes=10, class_dropout=0.3), runtime=config.runtime)
    eager = replace(config, runtime=replace(config.runtime, execution="eager"))
    torch.testing.assert_close(trained(config=config)[0], trained(config=eager)[0], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch.testing.assert_close(drawn("ddim", config=config), drawn("ddim", config=eager), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@needs_gpu
def test_on_a_gpu_the_captured_steps_agree_with_the_plain_ones():
    gpu = torch.device("cuda", 0)
    eager = replace(CONFIG, runtime=RuntimeConfig(execution="eager"))
    captured, images = trained(gpu), drawn("ddpm", gpu)
    assert captured[2] == pytest.approx(trained(gpu, eager)[2], rel=1e-4)
    options = trained(gpu, OPTIONS)
    assert options[2] == pytest.approx(trained(gpu, replace(OPTIONS, runtime=eager.runtime))[2], rel=1e-4)
    torch.testing.assert_close(images, drawn("ddpm", gpu, eager), rtol=1e-3, atol=1e-3)
