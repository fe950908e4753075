"""A run of diffusers' UNet as a folder for diffusers: its own pipeline, from that folder, draws fdiff's images."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fdiff import seeds
from fdiff.comm import SoloCommunicator
from fdiff.commands.main import main
from fdiff.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    FederationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
)
from fdiff.federation import Trainer, model_of, open_checkpoint, run, sampling, save_model, save_pipeline
from fdiff.federation.export_diffusers import scheduler_settings
from fdiff.model import alphas_cumprod, diffusion
from fdiff.model.noise import normal

CPU = torch.device("cpu")
IMAGES = 3
BASE = Config(
    federation=FederationConfig(clients=2, rounds=1, local_epochs=1),
    data=DataConfig(image_side=8, channels=1, limit=16),
    model=ModelConfig(kind="unet2d", dim=8, dim_mults=(1, 2), head_dim=4),
    diffusion=DiffusionConfig(timesteps=60),
    optim=OptimConfig(batch_size=8, lr=1e-3),
    sample=SampleConfig(every=0, clip=True, sampler="ddim", steps=5),
)


def trained(folder: Path, config: Config = BASE, **model: object) -> Path:
    made = replace(config, model=replace(config.model, **model), run=RunConfig(dir=str(folder)))
    run(made, SoloCommunicator(), CPU)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "clip")
    trained(folder / "free", replace(BASE, method="udec", sample=SampleConfig(every=0)))
    trained(folder / "classes", classes=10)
    trained(folder / "paper", replace(BASE, model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8)))
    return folder


def drawn_by_diffusers(unet: UNet2DModel, scheduler: DDPMScheduler, config: Config, labels: torch.Tensor | None = None):
    """Images (n, 1, 8, 8) by their unet and their scheduler, with the noise that `Drawing` meets."""
    key, images = seeds.derive(config.run.seed, "sampling"), torch.arange(IMAGES)
    x = normal(key, images, 0, config.data.shape)
    scheduler.set_timesteps(config.diffusion.timesteps)
    for step, t in enumerate(scheduler.timesteps):
        predicted = unet(x, t, labels).sample if labels is not None else unet(x, t).sample
        noise = normal(key, images, step + 1, config.data.shape)
        x = _step(scheduler, predicted, t, x, noise)
    return x


def _step(scheduler: DDPMScheduler, predicted, t, x, noise):
    """Their step, with this noise instead of what they would draw."""
    module = sys.modules[type(scheduler).__module__]
    theirs, module.randn_tensor = module.randn_tensor, lambda *_, **__: noise
    try:
        return scheduler.step(predicted, t, x).prev_sample
    finally:
        module.randn_tensor = theirs


@pytest.mark.parametrize(("name", "client"), [("clip", None), ("free", 1), ("classes", None)])
@torch.no_grad()
def test_the_same_noise_makes_the_same_images(runs, tmp_path, name, client):
    saved = open_checkpoint(runs / name)
    save_pipeline(tmp_path / "pipe", saved, client, ema=False)
    if name == "classes":
        assert not (tmp_path / "pipe" / "model_index.json").exists()
        unet = UNet2DModel.from_pretrained(tmp_path / "pipe", subfolder="unet")
        scheduler = DDPMScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler")
    else:
        pipe = DDPMPipeline.from_pretrained(tmp_path / "pipe")
        unet, scheduler = pipe.unet, pipe.scheduler
        assert pipe(batch_size=1, num_inference_steps=60, output_type="np").images.shape == (1, 8, 8, 1)
    labels = torch.arange(IMAGES) % 10 if name == "classes" else None
    theirs = drawn_by_diffusers(unet.eval(), scheduler, saved.config, labels)
    config = replace(saved.config, sample=replace(saved.config.sample, sampler="ddpm"))
    model = model_of(saved, client, ema=False).eval()
    sampler, key = diffusion.make_sampler(config.diffusion, config.sample), seeds.derive(config.run.seed, "sampling")
    ours = diffusion.sample(model, sampler, key, torch.arange(IMAGES), config.data.shape, labels=labels)
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-4 * max(1.0, float(ours.abs().max()))
    trainer = Trainer(config, CPU)
    saved.fill(trainer.buckets, client, False)
    shown = sampling.draw(trainer, config, sampling.Batch(client, 0, IMAGES, 0), 1)
    assert np.abs(diffusion.to_uint8(theirs).numpy().astype(int) - shown.numpy()).max() <= 1  # as fdiff sample writes


def test_the_scheduler_is_the_runs_own(runs, tmp_path):
    save_pipeline(tmp_path / "pipe", open_checkpoint(runs / "clip"), None, ema=False)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler")
    assert torch.allclose(scheduler.alphas_cumprod.double(), alphas_cumprod(BASE.diffusion), rtol=1e-5)
    assert scheduler.config.clip_sample and scheduler.config.prediction_type == "epsilon"
    told = json.loads((tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text())
    known = set(dict(DDPMScheduler().config)) | {"_class_name", "_diffusers_version"}
    assert set(told) <= known and told["_class_name"] == "DDPMScheduler"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_model_makes_the_same_bytes_and_they_are_its_owners(runs, tmp_path):
    saved = open_checkpoint(runs / "free")
    (tmp_path / "b").mkdir()  # an empty folder will do
    before = os.umask(0)
    try:
        for name in "ab":
            save_pipeline(tmp_path / name, saved, 0, ema=False)
        for number in range(6):
            save_model(tmp_path / f"{number}.safetensors", saved, 0, ema=False)
    finally:
        os.umask(before)
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 5
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(6)}) == 1
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert modes == {0o700, 0o600} and sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "b"]


def test_what_differs_is_said(runs, tmp_path, capsys):
    assert main(["export", str(runs / "clip"), str(tmp_path / "one"), "--format", "diffusers"]) == 0
    told, card = capsys.readouterr().out, (tmp_path / "one" / "README.md").read_text()
    for text in (told, card):
        assert "the run draws by ddim in 5 steps; the scheduler here is DDPM's, over all 60 steps" in text
    assert "num_inference_steps=60" in card
    assert main(["export", str(runs / "classes"), str(tmp_path / "two"), "--format", "diffusers"]) == 0
    assert "DDPMPipeline knows no classes" in capsys.readouterr().out
    assert main(["export", str(runs / "free"), str(tmp_path / "three"), "--format", "diffusers", "--client", "1"]) == 0
    assert (
        capsys.readouterr().out.count("\n") == 1
        and "What differs" not in (tmp_path / "three" / "README.md").read_text()
    )


def test_it_is_refused_in_one_line(runs, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, target, told in (
        ("paper", "new", "--format: diffusers has no class for model.kind unet of"),
        ("free", "new", "--client: with udec each client has its own model; say whose it is"),
        ("clip", "full", "is there already, and is no empty folder; name another"),
        ("clip", "file", "is there already, and is no empty folder; name another"),
        ("clip", "file/new", "cannot be written"),
    ):
        assert main(["export", str(runs / name), str(tmp_path / target), "--format", "diffusers"]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert files(tmp_path / "full") == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", ["noise", "v"])
def test_the_scheduler_has_the_runs_noise_and_what_it_predicts(schedule, objective):
    noise = DiffusionConfig(timesteps=60, schedule=schedule, objective=objective)
    settings = scheduler_settings(replace(BASE, diffusion=noise))
    scheduler = DDPMScheduler.from_config(settings)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas_cumprod(noise), rtol=1e-4, atol=1e-7)
    x, predicted = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    scheduler.set_timesteps(60)
    sampler = diffusion.make_sampler(noise, SampleConfig(clip=True))
    for i in (0, 30, 59):  # without the noise of the step, which is drawn
        x0 = (sampler.p[i] * x - sampler.q[i] * predicted).clamp(-1, 1).float()
        theirs = scheduler.step(predicted, int(sampler.t[i]), x, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(theirs.pred_original_sample, x0, rtol=1e-4, atol=1e-4)
