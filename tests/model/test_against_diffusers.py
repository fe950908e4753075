"""Schedules, what is predicted, and both samplers, step by step beside diffusers' own schedulers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fdiff.config import DiffusionConfig, SampleConfig
from fdiff.model import diffusion
from fdiff.model.noise import normal

diffusers = pytest.importorskip("diffusers")

DOUBLE = torch.float64
IMAGES, SHAPE, KEY = torch.arange(3), (1, 4, 4), 5
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
OBJECTIVES = {"noise": "epsilon", "v": "v_prediction"}
LINEAR = {"beta_start": 1e-3, "beta_end": 0.2}
KINDS = [
    ("linear", "noise", False),
    ("linear", "v", False),
    ("linear", "v", True),
    ("cosine", "noise", True),
    ("cosine", "v", False),
    ("cosine", "v", True),
]


def ours(schedule: str, objective: str = "noise", timesteps: int = 20) -> DiffusionConfig:
    return DiffusionConfig(timesteps=timesteps, schedule=schedule, objective=objective, **LINEAR)


def theirs(kind: type, config: DiffusionConfig, clip: bool = False, **more: object) -> object:
    """Their scheduler; its ᾱ, which it keeps in float32, are given in float64."""
    scheduler = kind(
        num_train_timesteps=config.timesteps,
        beta_schedule=SCHEDULES[config.schedule],
        prediction_type=OBJECTIVES[config.objective],
        clip_sample=clip,
        **LINEAR,
        **more,
    )
    ac = diffusion.alphas_cumprod(config)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ac, rtol=1e-4, atol=1e-7)
    scheduler.alphas_cumprod = ac
    return scheduler


def model(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Any function of image and timestep that a wrong step, timestep or order would show in."""
    return torch.tanh(x * 0.7 + 0.1) + (t.to(x) * 0.05).cos().view(-1, 1, 1, 1) * 0.3


def drawn(config: DiffusionConfig, sample: SampleConfig) -> Tensor:
    return diffusion.sample(model, diffusion.make_sampler(config, sample), KEY, IMAGES, SHAPE, DOUBLE)


@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_the_cosine_schedule_is_theirs(timesteps):
    theirs(diffusers.DDPMScheduler, config := ours("cosine", timesteps=timesteps))
    ac, f = diffusion.alphas_cumprod(config), lambda t: math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    assert ac[0].item() == pytest.approx(min(f(1) / f(0), 1), rel=1e-14) and ac.dtype == DOUBLE
    assert (ac[-1] / ac[-2]).item() == pytest.approx(1e-3, rel=1e-12)  # the last β is 0.999, and not 1
    assert ac[-2].item() == pytest.approx(f(timesteps - 1) / f(0), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_v_is_their_velocity(schedule):
    config = ours(schedule, "v")
    x0, noise, t = torch.randn(3, *SHAPE, dtype=DOUBLE), torch.randn(3, *SHAPE, dtype=DOUBLE), torch.tensor([0, 7, 19])
    expected = theirs(diffusers.DDPMScheduler, config).get_velocity(x0, noise, t)
    found = diffusion.target(diffusion.make_schedule(config, DOUBLE, "cpu"), x0, t, noise)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_loss_is_of_what_is_predicted():
    """A model that knows v has no loss with the objective v, and one with the objective noise."""
    x0, noise, t = torch.randn(3, *SHAPE, dtype=DOUBLE), torch.randn(3, *SHAPE, dtype=DOUBLE), torch.tensor([0, 7, 19])
    schedule = diffusion.make_schedule(ours("cosine", "v"), DOUBLE, "cpu")
    v = diffusion.target(schedule, x0, t, noise)
    assert diffusion.loss(lambda *_: v, schedule, x0, t, noise).item() == 0
    other = diffusion.make_schedule(ours("cosine", "noise"), DOUBLE, "cpu")
    assert diffusion.loss(lambda *_: v, other, x0, t, noise).item() > 0.01


@pytest.mark.parametrize(("schedule", "objective", "clip"), KINDS)
def test_ddpm_draws_what_theirs_draws_from_the_same_noise(schedule, objective, clip, monkeypatch):
    config = ours(schedule, objective)
    scheduler = theirs(diffusers.DDPMScheduler, config, clip, variance_type="fixed_small")
    steps = iter(range(1, config.timesteps))  # none at the last, as ours

    def same_noise(*_: object, **__: object) -> Tensor:
        return normal(KEY, IMAGES, next(steps), SHAPE).double()

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", same_noise)
    x = normal(KEY, IMAGES, 0, SHAPE).double()
    for t in range(config.timesteps - 1, -1, -1):
        x = scheduler.step(model(x, torch.full((3,), t)), t, x).prev_sample
    found = drawn(config, SampleConfig(sampler="ddpm", clip=clip))
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("schedule", "objective", "clip"), KINDS)
@pytest.mark.parametrize(("timesteps", "steps"), [(20, 20), (21, 6)])
def test_ddim_draws_what_theirs_draws(schedule, objective, clip, timesteps, steps):
    config = ours(schedule, objective, timesteps)
    scheduler = theirs(diffusers.DDIMScheduler, config, clip, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    scheduler.num_inference_steps = steps if steps == timesteps else steps - 1  # theirs goes on by a whole quotient
    x = normal(KEY, IMAGES, 0, SHAPE).double()
    for t in times:
        x = scheduler.step(model(x, torch.full((3,), t)), t, x, use_clipped_model_output=True).prev_sample
    found = drawn(config, SampleConfig(sampler="ddim", steps=steps, clip=clip))
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_in_float32_they_agree_as_well():
    """A thousand steps with nothing given to theirs, which rounds its ᾱ to float32."""
    config = DiffusionConfig(objective="v")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", beta_start=1e-4, clip_sample=True)
    scheduler.set_timesteps(1000)
    x = normal(KEY, IMAGES, 0, SHAPE)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model(x, torch.full((3,), t)), t, x, use_clipped_model_output=True).prev_sample
    sampler = diffusion.make_sampler(config, SampleConfig(sampler="ddim", steps=1000, clip=True))
    torch.testing.assert_close(diffusion.sample(model, sampler, KEY, IMAGES, SHAPE), x, rtol=0, atol=1e-3)
