"""The diffusion process in the symbols of the papers: schedule, forward noising, loss, and the samplers.

Ho et al. (2020) for the process and its ancestral sampling, Song et al. (2021) for DDIM; the settings (linear β,
Huber loss, fixed posterior variance) are FedDiffuse's (arXiv 2406.12575). Not in that paper: the cosine β of Nichol
and Dhariwal (2021), v of Salimans and Ho (2022), guidance of Ho and Salimans (2021). What the model predicts, noise or
v, is asked in two places: `target` for training, `_to_x0` for sampling. Nothing here knows of clients or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiff.config import DiffusionConfig, SampleConfig
from fdiff.model.capture import Graph
from fdiff.model.noise import normal

# (x (B, C, S, S), t (B,), labels (B,) | None) -> the predicted noise, or v, (B, C, S, S)
Denoiser = Callable[..., Tensor]
LARGEST_BETA = 0.999  # of the cosine schedule


@dataclass(frozen=True)
class Schedule:
    """Square roots of ᾱ_t and 1 - ᾱ_t, (T,) each, on one device; computed in float64, then rounded once.

    `objective` is what is predicted of an image at t: "noise" or "v".
    """

    sqrt_ac: Tensor
    sqrt_one_minus_ac: Tensor
    objective: str = "noise"

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.sqrt_ac)


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """ᾱ_t = Π (1 - β_s) for a linear β with both ends included, or the cosine one; (T,) float64."""
    if config.schedule == "cosine":
        betas = _cosine_betas(config.timesteps)
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, dim=0)


def _cosine_betas(steps: int) -> Tensor:
    """β_t = min(1 - f(t + 1) / f(t), 0.999) with f(t) = cos²((t/T + 0.008) / 1.008 · π/2), t from 0; (T,) float64.

    Nichol and Dhariwal, eq. 17. The product of 1 - β is not f at the last step, where β is capped.
    """
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = [min(1 - after / before, LARGEST_BETA) for before, after in zip(f, f[1:], strict=False)]
    return torch.tensor(betas, dtype=torch.float64)


def make_schedule(config: DiffusionConfig, dtype: torch.dtype, device: torch.device | str) -> Schedule:
    """The schedule's tensors in the given dtype on the device."""
    ac = alphas_cumprod(config)
    return Schedule(ac.sqrt().to(device, dtype), (1.0 - ac).sqrt().to(device, dtype), config.objective)


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε for x0 and ε (B, C, S, S) and t (B,) int64 in [0, T) (Ho et al., eq. 4)."""
    shape = (-1, 1, 1, 1)
    return schedule.sqrt_ac[t].view(shape) * x0 + schedule.sqrt_one_minus_ac[t].view(shape) * noise


def loss(
    model: Denoiser, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Mean Huber loss (threshold 1) between the true and the predicted noise, or v; a tensor without dimensions."""
    return F.smooth_l1_loss(model(add_noise(schedule, x0, t, noise), t, labels), target(schedule, x0, t, noise))


def target(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict: ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x0 (Salimans and Ho, appendix D); as `add_noise`."""
    if schedule.objective == "noise":
        return noise
    shape = (-1, 1, 1, 1)
    return schedule.sqrt_ac[t].view(shape) * noise - schedule.sqrt_one_minus_ac[t].view(shape) * x0


@dataclass(frozen=True)
class Sampler:
    """Every sampling step as one line: x ← a·x̂0 + b·x + s·z with x̂0 = p·x - q·m, clamped to [-1, 1] if `clip`.

    m is what the model predicts; its objective is in p and q alone, since ε̂ follows from x and x̂0. `t` and the
    coefficients are (S,) float64 on the CPU, in the order in which the steps are taken.
    """

    t: Tensor
    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    clip: bool


def make_sampler(diffusion: DiffusionConfig, sample: SampleConfig) -> Sampler:
    """The table of steps of DDPM's ancestral sampling (T steps) or of DDIM with η = 0 (`sample.steps`)."""
    ac = alphas_cumprod(diffusion)
    ddim = sample.sampler == "ddim"
    steps = sample.steps if ddim else diffusion.timesteps
    t = torch.linspace(diffusion.timesteps - 1, 0, steps, dtype=torch.float64).round().long()
    ac_t = ac[t]
    ac_prev = torch.cat((ac_t[1:], torch.ones(1, dtype=torch.float64)))
    coefficients = _ddim(ac_t, ac_prev) if ddim else _ddpm(ac_t, ac_prev)
    return Sampler(t, *_to_x0(ac_t, diffusion.objective), *coefficients, clip=sample.clip)


def _to_x0(ac: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """p and q of x̂0 = p·x - q·m: (x - √(1-ᾱ) ε̂) / √ᾱ, or √ᾱ x - √(1-ᾱ) v̂."""
    if objective == "noise":
        return ac.rsqrt(), ((1 - ac) / ac).sqrt()
    return ac.sqrt(), (1 - ac).sqrt()


def _ddpm(ac: Tensor, ac_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of q(x_{t-1} | x_t, x0) and its deviation, which is 0 at the last step (Ho et al., eq. 6 and 7)."""
    alpha = ac / ac_prev
    beta = 1 - alpha
    variance = beta * (1 - ac_prev) / (1 - ac)
    return ac_prev.sqrt() * beta / (1 - ac), alpha.sqrt() * (1 - ac_prev) / (1 - ac), variance.sqrt()


def _ddim(ac: Tensor, ac_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_{t-1} = √ᾱ' x̂0 + √(1-ᾱ') ε̂ with ε̂ = (x - √ᾱ x̂0) / √(1-ᾱ) (Song et al., eq. 12 with σ = 0)."""
    b = ((1 - ac_prev) / (1 - ac)).sqrt()
    return ac_prev.sqrt() - b * ac.sqrt(), b, torch.zeros_like(ac)


def guided(model: Denoiser, guidance: float, no_class: int) -> Denoiser:
    """A denoiser whose prediction is m_∅ + g (m_c - m_∅), from one batch of twice the images (Ho and Salimans, eq. 6).

    m_∅ is what the model predicts for the label `no_class`. For a given x, ε̂, v̂ and x̂0 are affine in each other, and
    the weights 1 - g and g sum to 1: so this is the same for noise and for v.
    """

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat((labels, torch.full_like(labels, no_class)))
        predicted = model(torch.cat((x, x)), torch.cat((t, t)), both).to(x.dtype)
        of_class, of_none = predicted.chunk(2)
        return of_none + guidance * (of_class - of_none)

    return predict


class Drawing:
    """Draws batches of one size from a model: the table of steps and the images under way, in memory of their own.

    `shape` is (C, S, S) of an image; labels, if the model takes them, come with each batch. With `captured` the step
    is captured at the first batch, and the others, for other parameters in the same memory too, are replays.
    """

    def __init__(
        self,
        model: Denoiser,
        sampler: Sampler,
        key: int,
        count: int,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        captured: bool = False,
    ) -> None:
        self._model, self._sampler, self._key, self._shape, self._captured = model, sampler, key, shape, captured
        self._times = sampler.t.to(device)
        coefficients = (sampler.p, sampler.q, sampler.a, sampler.b, sampler.s)
        self._table = torch.stack(coefficients, dim=1).to(device, dtype)
        self._stochastic = bool(sampler.s.any())
        self._images = torch.zeros(count, dtype=torch.int64, device=device)
        self._labels = torch.zeros_like(self._images)
        self._x = torch.zeros(count, *shape, dtype=dtype, device=device)
        self._i = torch.zeros(1, dtype=torch.int64, device=device)  # where a captured step can count
        self._graph: Graph[None] | None = None

    @torch.no_grad()
    def draw(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """The images with the given indices (B,) int64: (B, C, S, S), about [-1, 1], overwritten by the next batch.

        Image i starts from the noise of (key, i) and meets the same noise in any batch and on any rank.
        `progress` wraps the iteration over the steps, e.g. in a bar.
        """
        self._images.copy_(images)
        self._conditional = labels is not None
        if labels is not None:
            self._labels.copy_(labels)
        self._x.copy_(normal(self._key, self._images, 0, self._shape))
        self._i.zero_()
        if self._captured and self._graph is None:
            self._graph = Graph(self._step, (self._x, self._i))
        advance = self._step if self._graph is None else self._graph.replay
        for _ in progress(range(len(self._times))):
            advance()
        return self._x

    def _step(self) -> None:
        t = self._times.index_select(0, self._i)
        p, q, a, b, s = self._table.index_select(0, self._i).unbind(1)  # (1,) each
        predicted = self._model(self._x, t.expand(len(self._x)), self._labels if self._conditional else None)
        x0 = p * self._x - q * predicted
        mean = a * (x0.clamp(-1, 1) if self._sampler.clip else x0) + b * self._x
        if self._stochastic:
            mean = mean + s * normal(self._key, self._images, self._i + 1, self._shape).to(mean.dtype)
        self._x.copy_(mean)
        self._i.add_(1)


def sample(
    model: Denoiser,
    sampler: Sampler,
    key: int,
    images: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    labels: Tensor | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """One batch (B, C, S, S) on the device of `images` (B,) int64, as `Drawing.draw` has it; nothing is captured."""
    return Drawing(model, sampler, key, len(images), shape, images.device, dtype).draw(images, labels, progress)


def to_range(x: Tensor, low: float, high: float) -> Tensor:
    """Images in [-1, 1] (clamped) → float32, -1 as low and 1 as high, same shape."""
    share = (x.double().clamp(-1, 1) + 1) / 2
    return (low * (1 - share) + high * share).float()


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped) → uint8 0 to 255, same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
