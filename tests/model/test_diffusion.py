"""Schedule, loss and samplers against the formulas of Ho et al. (2020) and Song et al. (2021); the noise."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from fdiff.config import DiffusionConfig, SampleConfig
from fdiff.model import diffusion
from fdiff.model.noise import _box_muller, normal, philox

DOUBLE = torch.float64
T20 = DiffusionConfig(timesteps=20, beta_start=1e-3, beta_end=0.2)
IMAGES = torch.arange(3)
SHAPE = (1, 4, 4)


def betas(config: DiffusionConfig) -> list[float]:
    first, last, steps = config.beta_start, config.beta_end, config.timesteps
    return [first + (last - first) * t / (steps - 1) for t in range(steps)]


def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Any function of image and timestep that a wrong step, timestep or order would show in."""
    return torch.tanh(x * 0.7 + 0.1) + (t.to(x) * 0.05).cos().view(-1, 1, 1, 1) * 0.3


# --- the forward process


def test_schedule_ends():
    ac = diffusion.alphas_cumprod(DiffusionConfig())
    assert ac.shape == (1000,) and ac.dtype == DOUBLE
    assert ac[0].item() == pytest.approx(1 - 1e-4, rel=1e-14)
    assert (1 - ac[1] / ac[0]).item() == pytest.approx(1e-4 + (0.02 - 1e-4) / 999, rel=1e-10)
    assert (1 - ac[-1] / ac[-2]).item() == pytest.approx(0.02, rel=1e-12)  # the end is included
    assert ac[-1].item() == pytest.approx(math.prod(1 - b for b in betas(DiffusionConfig())), rel=1e-12)


def test_schedule_is_rounded_once():
    config = DiffusionConfig()
    ac = diffusion.alphas_cumprod(config)
    schedule = diffusion.make_schedule(config, torch.float32, "cpu")
    assert schedule.timesteps == 1000
    assert torch.equal(schedule.sqrt_ac, ac.sqrt().float())
    assert torch.equal(schedule.sqrt_one_minus_ac, (1 - ac).sqrt().float())


def test_posterior_variances_are_the_known_ones():
    """The values that the DDPM schedulers of other libraries are held against."""
    sampler = diffusion.make_sampler(DiffusionConfig(), SampleConfig(sampler="ddpm"))
    assert sampler.t.tolist() == list(range(999, -1, -1))
    variance = dict(zip(sampler.t.tolist(), sampler.s.square().tolist(), strict=True))
    assert variance[0] == 0
    assert variance[487] == pytest.approx(0.00979, abs=1e-5)
    assert variance[999] == pytest.approx(0.02, abs=1e-5)


def test_noisy_images_have_the_moments_of_eq_4():
    schedule = diffusion.make_schedule(DiffusionConfig(), DOUBLE, "cpu")
    x0, n = 0.7, 200_000
    random = torch.Generator().manual_seed(0)
    for t in (0, 300, 999):
        expected = math.prod(1 - b for b in betas(DiffusionConfig())[: t + 1])
        noise = torch.randn((n, 1, 1, 1), generator=random, dtype=DOUBLE)
        x = diffusion.add_noise(schedule, torch.full_like(noise, x0), torch.full((n,), t), noise)
        spread = math.sqrt(1 - expected)
        assert x.mean().item() == pytest.approx(math.sqrt(expected) * x0, abs=5 * spread / math.sqrt(n))
        assert x.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * n))


def test_each_image_meets_its_own_timestep():
    schedule = diffusion.make_schedule(T20, DOUBLE, "cpu")
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, 3, *SHAPE), generator=random, dtype=DOUBLE)
    t = torch.tensor([0, 7, 19])
    x = diffusion.add_noise(schedule, x0, t, noise)
    for i in range(3):
        product = math.prod(1 - b for b in betas(T20)[: t[i] + 1])
        by_hand = math.sqrt(product) * x0[i] + math.sqrt(1 - product) * noise[i]
        torch.testing.assert_close(x[i], by_hand, rtol=1e-13, atol=1e-14)


def test_loss_is_quadratic_below_one_and_linear_above():
    schedule = diffusion.make_schedule(T20, DOUBLE, "cpu")
    noise = torch.zeros((2, 1, 1, 2), dtype=DOUBLE)
    errors = torch.tensor([[0.5, -0.2], [3.0, -1.0]], dtype=DOUBLE).view(2, 1, 1, 2)
    got = diffusion.loss(lambda x, t, labels: errors, schedule, noise, torch.tensor([3, 4]), noise)
    assert got.item() == pytest.approx((0.5 * 0.25 + 0.5 * 0.04 + 2.5 + 0.5) / 4, rel=1e-14)


def test_loss_shows_the_model_the_noisy_image_and_its_label():
    schedule = diffusion.make_schedule(T20, DOUBLE, "cpu")
    x0, noise = torch.full((2, *SHAPE), 0.5, dtype=DOUBLE), torch.ones((2, *SHAPE), dtype=DOUBLE)
    t, labels, seen = torch.tensor([2, 9]), torch.tensor([1, 0]), []

    def model(*arguments: Tensor) -> Tensor:
        seen.append(arguments)
        return noise

    assert diffusion.loss(model, schedule, x0, t, noise, labels).item() == 0
    [(x, seen_t, seen_labels)] = seen
    assert torch.equal(x, diffusion.add_noise(schedule, x0, t, noise))
    assert torch.equal(seen_t, t) and torch.equal(seen_labels, labels)


# --- the samplers


def ancestral(config: DiffusionConfig, key: int, clip: bool) -> Tensor:
    """Ho et al., algorithm 2, with eq. 6 and 7 where x̂0 is clamped; t counts from 1 as there."""
    beta = [math.nan, *betas(config)]
    bar = [math.prod(1 - b for b in beta[1 : t + 1]) for t in range(config.timesteps + 1)]
    x = normal(key, IMAGES, 0, SHAPE).double()
    for t in range(config.timesteps, 0, -1):
        alpha = 1 - beta[t]
        epsilon = denoiser(x, torch.full((len(x),), t - 1), None)
        if clip:
            x0 = ((x - math.sqrt(1 - bar[t]) * epsilon) / math.sqrt(bar[t])).clamp(-1, 1)
            mean = math.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t]) * x0
            mean = mean + math.sqrt(alpha) * (1 - bar[t - 1]) / (1 - bar[t]) * x
        else:
            mean = (x - beta[t] / math.sqrt(1 - bar[t]) * epsilon) / math.sqrt(alpha)
        sigma = math.sqrt((1 - bar[t - 1]) / (1 - bar[t]) * beta[t])
        step = config.timesteps - t + 1  # noise 0 made the image, noise i is that of the i-th step
        x = mean + (sigma * normal(key, IMAGES, step, SHAPE).double() if t > 1 else 0)
    return x


def implicit(config: DiffusionConfig, key: int, times: list[int], clip: bool) -> Tensor:
    """Song et al., eq. 12 with σ = 0, over the given timesteps (from 0), the last one first."""
    bar = [math.prod(1 - b for b in betas(config)[: t + 1]) for t in range(config.timesteps)]
    x = normal(key, IMAGES, 0, SHAPE).double()
    for i in range(len(times) - 1, -1, -1):
        now, before = bar[times[i]], bar[times[i - 1]] if i else 1.0
        epsilon = denoiser(x, torch.full((len(x),), times[i]), None)
        x0 = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        if clip:
            x0 = x0.clamp(-1, 1)
            epsilon = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * epsilon
    return x


def draw(config: DiffusionConfig, sample: SampleConfig, key: int = 5, images: Tensor = IMAGES) -> Tensor:
    return diffusion.sample(denoiser, diffusion.make_sampler(config, sample), key, images, SHAPE, DOUBLE)


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_the_papers_loop(clip):
    got = draw(T20, SampleConfig(sampler="ddpm", clip=clip))
    torch.testing.assert_close(got, ancestral(T20, 5, clip), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(got, draw(T20, SampleConfig(sampler="ddpm", clip=not clip)), rtol=1e-3)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("steps", "times"),
    [(20, list(range(20))), (5, [0, 5, 10, 14, 19]), (2, [0, 19]), (1, [19])],
)
def test_ddim_is_the_papers_loop(steps, times, clip):
    got = draw(T20, SampleConfig(sampler="ddim", steps=steps, clip=clip))
    torch.testing.assert_close(got, implicit(T20, 5, times, clip), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_perfect_denoiser_returns_the_image(sampler):
    """Shown the noise that turns one known image into x, the sampler must arrive at that image."""
    x0 = torch.linspace(-0.9, 0.9, 16, dtype=DOUBLE).view(SHAPE)
    ac = diffusion.alphas_cumprod(DiffusionConfig())

    def knows(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        bar = ac[t].view(-1, 1, 1, 1)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    steps = diffusion.make_sampler(DiffusionConfig(), SampleConfig(sampler=sampler, steps=7))
    got = diffusion.sample(knows, steps, 0, IMAGES, SHAPE, DOUBLE)
    torch.testing.assert_close(got, x0.expand_as(got), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_is_the_same_in_any_batch(sampler):
    sample = SampleConfig(sampler=sampler, steps=5)
    together = draw(T20, sample, images=torch.tensor([4, 0, 17, 2]))
    for at, image in enumerate((4, 0, 17, 2)):
        assert torch.equal(draw(T20, sample, images=torch.tensor([image]))[0], together[at])
    assert len({tuple(x.flatten().tolist()) for x in together}) == 4
    assert not torch.equal(draw(T20, sample, key=6, images=torch.tensor([4]))[0], together[0])


def test_labels_and_progress_reach_the_model():
    seen, labels = [], torch.tensor([2, 0, 1])
    sampler = diffusion.make_sampler(T20, SampleConfig(sampler="ddim", steps=4))

    def model(x: Tensor, t: Tensor, given: Tensor | None) -> Tensor:
        assert torch.equal(given, labels) and x.dtype == torch.float32 and not torch.is_grad_enabled()
        assert t.tolist() == [t[0].item()] * 3
        seen.append(t[0].item())
        return torch.zeros_like(x)

    x = diffusion.sample(model, sampler, 0, IMAGES, SHAPE, labels=labels, progress=lambda s: list(s)[:3])
    assert seen == [19, 13, 6] and x.shape == (3, *SHAPE)


def test_pixels():
    x = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert diffusion.to_uint8(x).tolist() == [0, 0, 0, 128, 191, 255, 255]


# --- the noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The known-answer tests of philox4x32-10 that come with Random123; words are written low one first."""
    low, high = (int(word, 16) for word in key.split())
    got = philox(tuple(torch.tensor([int(word, 16)]) for word in counter.split()), high << 32 | low)
    assert " ".join(f"{word.item():08x}" for word in got) == words


def test_noise_is_normal():
    """Moments to five standard errors, and Kolmogorov-Smirnov's distance, of a million draws."""
    x = normal(12345, torch.arange(100), 3, (10_000,)).double().flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert x.pow(power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(variance / n)), power
    below = torch.special.ndtr(x.sort().values)
    ranks = torch.arange(n + 1, dtype=DOUBLE) / n
    distance = max((below - ranks[:-1]).max().item(), (ranks[1:] - below).max().item())
    assert distance < 1.95 / math.sqrt(n)  # exceeded by one sample in a thousand
    assert x.abs().max().item() == pytest.approx(-NormalDist().inv_cdf(0.5 / n), abs=1)


def test_noise_is_independent_of_its_neighbours():
    """No correlation between pixels of one Philox block, nor between neighbouring images, steps and keys."""
    n = 250_000
    x = normal(7, torch.arange(2), 1, (4, n)).double()
    columns = [x[0, 0], x[0, 1], x[0, 2], x[0, 3], x[1, 0]]
    for key, step in ((7, 2), (8, 1), (7 + 2**32, 1)):
        columns.append(normal(key, torch.tensor([0]), step, (n,))[0].double())
    for i, a in enumerate(columns):
        for b in columns[:i]:
            for f in (torch.Tensor.clone, torch.square, torch.sin):
                correlation = torch.corrcoef(torch.stack((f(a), f(b))))[0, 1]
                assert abs(correlation) < 5 / math.sqrt(n)


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 49])
def test_noise_of_any_size(numel):
    """Every pixel has its own value, and the same whether the step is a number or a tensor."""
    x = normal(1, torch.tensor([3, 2**32 - 1]), 9, (numel,))
    assert x.dtype == torch.float32 and x.shape == (2, numel) and len(x.unique()) == 2 * numel
    assert torch.equal(x, normal(1, torch.tensor([3, 2**32 - 1]), torch.tensor(9), (numel,)))


@pytest.mark.parametrize("config", [DiffusionConfig(timesteps=8600), DiffusionConfig(beta_start=1e-12, beta_end=1e-12)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_steps_at_the_limits_of_a_schedule_are_finite_in_float32(config, sampler):
    steps = diffusion.make_sampler(config, SampleConfig(sampler=sampler))
    assert all(values.float().isfinite().all() for values in (steps.p, steps.q, steps.a, steps.b, steps.s))
    assert steps.p.float()[0] * diffusion.make_schedule(config, torch.float32, "cpu").sqrt_ac[-1] == pytest.approx(1)


def test_noise_is_never_infinite():
    """The words at both ends of their range give finite numbers, out to what 24 bits allow: √(50 ln 2) = 5.89."""
    ends = torch.tensor([0, 255, 256, 2**32 - 1])
    a, b = (m.flatten() for m in torch.meshgrid(ends, ends, indexing="ij"))
    values = torch.stack(_box_muller(a, b))
    assert values.isfinite().all() and values.max().item() == pytest.approx(math.sqrt(50 * math.log(2)), rel=1e-4)


# --- guidance


def of_labels(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A model whose prediction depends on the image, the timestep and the label."""
    return denoiser(x, t, labels) + torch.sin(labels + 1.0).view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_is_the_combination_of_two_predictions(guidance):
    x, t, labels = torch.randn(3, *SHAPE, dtype=DOUBLE), torch.tensor([0, 9, 4]), torch.tensor([2, 0, 1])
    with_class, without = of_labels(x, t, labels), of_labels(x, t, torch.full((3,), 7))
    found = diffusion.guided(of_labels, guidance, 7)(x, t, labels)
    torch.testing.assert_close(found, without + guidance * (with_class - without), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(with_class, without)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guidance_of_v_is_guidance_of_the_noise(sampler):
    """The same model, asked for v or for the noise that goes with it, draws the same images."""
    ac = diffusion.alphas_cumprod(T20)

    def asked_for_v(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        bar = ac[t].view(-1, 1, 1, 1)
        return (of_labels(x, t, labels) - (1 - bar).sqrt() * x) / bar.sqrt()

    found = [
        diffusion.sample(
            diffusion.guided(asked, 2.0, 7),
            diffusion.make_sampler(replace(T20, objective=objective), SampleConfig(sampler=sampler, steps=6)),
            5,
            IMAGES,
            SHAPE,
            DOUBLE,
            torch.tensor([2, 0, 1]),
        )
        for asked, objective in ((of_labels, "noise"), (asked_for_v, "v"))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
