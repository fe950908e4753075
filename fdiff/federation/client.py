"""One client's local training: E epochs of Adam on the Huber loss of the predicted noise, or v (paper, algorithm 1).

A rank has one `Trainer`, its working memory, through which the clients that it hosts pass in turn. What a client
keeps between rounds (private parts, moving average, Adam moments, number of steps) is a dict of tensors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdiff import seeds
from fdiff.config import Config
from fdiff.data import Shard, normalise
from fdiff.errors import RunError, UserError
from fdiff.federation.local_optimizer import STEPS, LocalOptimizer, decay_at
from fdiff.model import (
    Buckets,
    UNet,
    build_model,
    capture,
    check_forward,
    diffusion,
    drop_labels,
    frozen_parts,
    layout_of,
    no_class,
    part_sizes,
)
from fdiff.plan import is_first, private_parts, shared_parts

DRAWINGS_KEPT = 2  # of whole batches, and of a last, short one
REMEDY = "not a finite number; use a smaller optim.lr"


@dataclass
class Client:
    """A client: its images, and its state as it was parked on the host.

    What is `lent` is being written, and left alone: the client is then parked in its `spare` memory.
    """

    index: int
    shard: Shard
    parked: dict[str, Tensor] = field(default_factory=dict)
    spare: dict[str, Tensor] = field(default_factory=dict)
    lent: bool = False
    trained: Tensor | None = None  # its shared parts as it last trained them, where the run keeps them


@dataclass(frozen=True)
class Report:
    """What a client says of its training in a round: the mean loss of each epoch, images seen, seconds taken."""

    client: int
    losses: tuple[float, ...]
    images: int
    seconds: float


class Trainer:
    """A model in flat buckets, Adam on the whole arena, and the diffusion schedule, all on one device.

    `working` names the tensors in which a client's state lives while it trains: `ema` (P,) with a moving average,
    `exp_avg` and `exp_avg_sq` (P,) and `step` () with a kept optimizer, `steps-taken` () int64 with a warm-up,
    `left-out` (n,) of the shared parts with error feedback. Parameters themselves are in `buckets`, the shared parts
    behind the private ones. `anchor` (n,) are, with FedProx, the shared parts with which the round began.
    """

    def __init__(self, config: Config, device: torch.device, weights: Mapping[str, Tensor] | None = None) -> None:
        """Parameters are those of the seed, or with `weights` these, by their names."""
        self.config, self.device = config, device
        self.dtype = torch.float64 if config.runtime.precision == "float64" else torch.float32
        self.model = build_model(config)
        parts, execution = tuple(part_sizes(layout_of(self.model))), config.runtime.execution
        self.shared_parts = shared_parts(config.method, parts, frozen_parts(config))
        self.private_parts = private_parts(config.method, parts, frozen_parts(config))
        self.buckets = Buckets(self.model, self.shared_parts).to(device, self.dtype)
        if weights is not None:
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(weights[name])
        self._lay_out(config.runtime.layout)
        self.schedule = diffusion.make_schedule(config.diffusion, self.dtype, device)
        self.working: dict[str, Tensor] = {}
        if config.optim.ema:
            self.working["ema"] = self.buckets.flat.clone()
        if config.compression.feeds_back:
            span = self.buckets.span(self.shared_parts)
            self.working["left-out"] = torch.zeros_like(self.buckets.flat[span])
        if config.optim.counts_steps:
            self.working[STEPS] = torch.zeros((), dtype=torch.int64, device=device)
        self._optimizer = LocalOptimizer(config.optim, self.buckets, self.working.get(STEPS))
        self._moments = self._optimizer.moments
        if config.federation.keep_optimizer:
            self.working |= self._moments
        self._shared = self.buckets.span(self.shared_parts)
        self.anchor = torch.zeros_like(self.buckets.flat[self._shared]) if config.federation.proximal_mu else None
        self._noise = torch.Generator(device)
        self._dropout = 0
        self._loss = capture.compiled(diffusion.loss, device, execution)
        self._denoiser = capture.compiled(self.model, device, execution)
        self._captures = capture.captures(device, execution)
        self._drawings: dict[Hashable, diffusion.Drawing] = {}
        self._graph: capture.Graph[Tensor] | None = None

    def _lay_out(self, layout: str) -> None:
        """Have the activations in this layout; a model of the user's own has them as it makes them, and is tried."""
        if not isinstance(self.model, UNet):
            if layout != "auto":
                raise UserError(f"runtime.layout: {layout!r} is for model.kind unet; use auto, or do it in your model")
            check_forward(self.model, self.config)
            return
        # The compiler has ideas of its own.
        by_compiler = layout == "auto" and capture.compiles(self.device, self.config.runtime.execution)
        self.model.encoder.layout = "channels-first" if by_compiler else layout

    def prepare(self, client: Client, round: int) -> None:
        """Make ready what a client that has entered carries from step to step: its moving average, Adam's moments."""
        fed = self.config.federation
        if self.config.optim.ema and is_first(
            fed.clients, round, self.config.run.seed, fed.fraction, client.index
        ):
            self.working["ema"].copy_(self.buckets.flat)  # a client selected late starts from what it received
        if not fed.keep_optimizer:
            for moment in self._moments.values():
                moment.zero_()

    def train(self, client: Client, round: int, tick: Callable[[], object] = lambda: None) -> Report:
        """Train all parameters for E epochs, after `prepare`; `tick` is called after each step.

        The shuffling and the noise derive from (seed, client, round). RunError if a loss is not finite; it names the
        step, counted from 1 in the round; and if what the last step left is not, or gives the last batch a loss that
        is not. The device is not waited for inside an epoch.
        """
        started = time.perf_counter()
        shuffling = seeds.torch_stream(self.config.run.seed, "shuffling", client.index, round)
        self._dropout = seeds.derive(self.config.run.seed, "dropout", client.index, round)
        torch.manual_seed(self._dropout)  # of models that have some
        # The same generator each time: a captured step draws from the one that it was captured with.
        self._noise.manual_seed(seeds.derive(self.config.run.seed, "noise", client.index, round))
        epochs: list[float] = []
        for epoch in range(self.config.federation.local_epochs):
            losses, sizes = [], []
            for images, labels in self._batches(client.shard, shuffling):
                losses.append(self.step(images, labels))
                sizes.append(len(images))
                tick()
            epochs.append(_mean_loss(torch.stack(losses), sizes, epoch * len(losses)))
        if diverged := self._find_diverged(images, labels):
            raise RunError(f"after the last step {diverged} is {REMEDY}")
        images_seen = len(client.shard) * len(epochs)
        return Report(client.index, tuple(epochs), images_seen, time.perf_counter() - started)

    def steps(self, clients: Sequence[Client]) -> int:
        """Optimizer steps that these clients take in a round."""
        batch = self.config.optim.batch_size
        return self.config.federation.local_epochs * sum(-(-len(c.shard) // batch) for c in clients)

    def _batches(self, shard: Shard, shuffling: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(shard), generator=shuffling)
        return shard.batches(order, self.config.optim.batch_size)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam on images (b, C, S, S), uint8 or in [-1, 1]; returns the loss, still on the device.

        On a GPU a replay of the captured step, but for short batches, which are neither captured nor compiled.
        """
        if len(images) != self.config.optim.batch_size or not self._captures:
            return self._step(images, labels)
        if self._graph is None:
            self._batch = images.clone(), labels.clone()
            state = [self.buckets.flat, *self._moments.values(), *self.working.values()]
            self._graph = capture.Graph(lambda: self._step(*self._batch), state, self._noise)
            torch.manual_seed(self._dropout)  # it is a client's first step, and the capture has drawn of dropout
        for memory, values in zip(self._batch, (images, labels), strict=True):
            memory.copy_(values)
        return self._graph.replay().clone()

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        noised = self._noised(images)
        if self.config.model.class_dropout:
            labels = drop_labels(labels, self.config.model, self._noise)
        return self.descend(*noised, labels)

    def _noised(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0 (b, C, S, S) of images, and the next timesteps (b,) and noise (b, C, S, S) of the client's round.

        With `data.flip` that also draws which of the images are mirrored, first.
        """
        x0 = normalise(images, self.dtype)
        if self.config.data.flip:
            mirrored = torch.rand(len(x0), generator=self._noise, device=self.device) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        t = torch.randint(self.schedule.timesteps, (len(x0),), generator=self._noise, device=self.device)
        # Drawn in float32 whatever the precision, so that a float64 run sees the same noise.
        epsilon = torch.randn(x0.shape, generator=self._noise, device=self.device).to(self.dtype)
        return x0, t, epsilon

    def descend(self, x0: Tensor, t: Tensor, epsilon: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam with these timesteps (b,) and this noise (b, C, S, S); the loss, still on the device.

        The loss is without FedProx's term (Li et al. 2020, eq. 2), which only its gradient knows of. `optim.grad_clip`
        is of that gradient: what is clipped is what Adam is given.
        """
        self.buckets.grad.zero_()
        whole = len(x0) == self.config.optim.batch_size
        loss_of = self._loss if whole else diffusion.loss
        with self.autocast():
            loss = loss_of(self.model, self.schedule, x0, t, epsilon, self.labels(labels))
        loss.backward()
        if self.anchor is not None:  # the gradient of μ/2 ‖θ - θ_start‖²
            away = self.buckets.flat[self._shared] - self.anchor
            self.buckets.grad[self._shared].add_(away, alpha=self.config.federation.proximal_mu)
        self._optimizer.step()
        if self.config.optim.ema:
            self._average()
        if self.config.optim.counts_steps:
            self.working[STEPS].add_(1)
        return loss.detach()

    def _average(self) -> None:
        """Take the step that was made into the client's moving average."""
        optim, ema = self.config.optim, self.working["ema"]
        if optim.ema_warmup:
            ema.lerp_(self.buckets.flat, (1 - decay_at(optim, self.working[STEPS])).to(ema.dtype))
        else:
            ema.lerp_(self.buckets.flat, 1 - optim.ema)

    @torch.no_grad()
    def _find_diverged(self, images: Tensor, labels: Tensor) -> str | None:
        """What is not finite after a client's last step: its state, or the loss of that step's batch; None if all is.

        No step of the round would see it otherwise. The host waits for the device once.
        """
        with self.autocast():
            loss = diffusion.loss(self.model, self.schedule, *self._noised(images), self.labels(labels))
        left = {"the loss": loss, "a parameter": self.buckets.flat}
        left |= {f"a value of {name}": tensor for name, tensor in self.working.items()}
        finite = torch.stack([tensor.isfinite().all() for tensor in left.values()]).cpu().tolist()
        return next((what for what, good in zip(left, finite, strict=True) if not good), None)

    def drawing(self, config: Config, count: int) -> diffusion.Drawing:
        """What draws batches of so many images from the model, whatever its parameters; kept for the next batch.

        Of other sizes than the configured one nothing is compiled.
        """
        wanted = (config.sample, config.diffusion, config.run.seed, count)
        if wanted not in self._drawings:
            if len(self._drawings) >= DRAWINGS_KEPT:
                self._drawings.pop(next(iter(self._drawings)))
            data, whole = config.data, count == config.sample.batch_size
            denoiser = self._denoiser if whole else self.model
            if (guidance := config.sample.guidance) != 1:
                denoiser = diffusion.guided(denoiser, guidance, no_class(config.model))
            self._drawings[wanted] = diffusion.Drawing(
                denoiser,
                diffusion.make_sampler(config.diffusion, config.sample),
                seeds.derive(config.run.seed, "sampling"),
                count,
                data.shape,
                self.device,
                self.dtype,
                self._captures,
            )
        return self._drawings[wanted]

    def labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels, if the model is conditioned on them."""
        return labels if self.config.model.classes else None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 arithmetic under that precision; otherwise nothing.

        Without autocast's cache of weights: a captured step would go on with those that it was captured with.
        """
        if self.config.runtime.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


def _mean_loss(losses: Tensor, sizes: list[int], steps_before: int) -> float:
    """Mean over the images of an epoch's step losses (steps,), copied to the host once; RunError if one is no number.

    It names the first that is not finite.
    """
    on_host = losses.cpu()
    finite = on_host.isfinite()
    if not finite.all():
        step = int(finite.int().argmin())
        raise RunError(f"step {steps_before + step + 1}: the loss is {on_host[step].item()}, {REMEDY}")
    weights = torch.tensor(sizes, dtype=torch.float64)
    return float((on_host.double() * weights).sum() / weights.sum())
