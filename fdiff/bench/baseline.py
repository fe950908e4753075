"""The loop that everybody writes, plain and honest: what local training and sampling are held against.

An eager model in torch's default layout, Adam over separate parameters, a DataLoader with PIL transforms, `.item()`
after each step; a sampling loop that gathers the schedule on the host. It runs in a process of its own, which none of
our settings (memory, threads' layout, arithmetic) reaches; weights, batches and noise are those of our training.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fdiff import seeds
from fdiff.config import Config
from fdiff.errors import RunError, UserError
from fdiff.model import Encoder, LinearAttention, UNet, alphas_cumprod, build_model, unconditional


class Pictures(Dataset):
    """uint8 images (n, C, S, S) as PIL pictures, transformed one by one: floats in [-1, 1]."""

    def __init__(self, images: np.ndarray) -> None:
        grey = images.shape[1] == 1
        self.pictures = [Image.fromarray(i[0] if grey else np.moveaxis(i, 0, -1)) for i in images]
        middle = (0.5,) * images.shape[1]
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(middle, middle)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.pictures[index])


def as_plain(config: Config) -> Config:
    """The configuration without what the plain loop knows nothing of.

    These are labels, mirrored images, weight decay, warm-ups and clipped gradients.
    """
    optim = replace(config.optim, warmup_steps=0, grad_clip=None, weight_decay=0.0, ema_warmup=False)
    return replace(unconditional(config), optim=optim, data=replace(config.data, flip=False))


def check_plain(config: Config) -> None:
    """UserError for a model of which nobody has written the plain loop."""
    if config.model.kind != "unet":
        raise UserError(f"model.kind: the loop that everybody writes is there for unet, not for {config.model.kind}")


def plain_unet(config: Config) -> UNet:
    """The model with the same initial weights and without our layout and our order of products."""
    check_plain(config)
    model = build_model(config)
    assert isinstance(model, UNet)
    model.encoder.forward = MethodType(_encode, model.encoder)
    for module in model.modules():
        if isinstance(module, LinearAttention):
            module.forward = MethodType(_attend, module)
    return model


def _encode(self: Encoder, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
    time = self.time[1:](self.time[0](t).to(x.dtype))
    h, skips = self.stem(x), []
    for stage in self.stages:
        h, skip = stage(h, time)
        skips.append(skip)
    return h, skips[1:], time


def _attend(self: LinearAttention, x: Tensor) -> Tensor:
    b, _, height, width = x.shape
    q, k, v = (
        part.reshape(b, self.heads, self.head_dim, height * width) for part in self.qkv(x).chunk(3, dim=1)
    )
    q = q.softmax(dim=-2) * self.head_dim**-0.5
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q)
    return self.out(out.reshape(b, -1, height, width))


class Loop:
    """The plain training and sampling of one client's model on a device."""

    def __init__(self, config: Config, device: torch.device, images: np.ndarray) -> None:
        self.config, self.device = config, device
        self.data = Pictures(images)
        self.model = plain_unet(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.optim.lr)
        ac = alphas_cumprod(config.diffusion)
        self.ac = ac
        self.predicts_v = config.diffusion.objective == "v"
        self.signal, self.noise = ac.sqrt().float().to(device), (1 - ac).sqrt().float().to(device)

    def train(self, epochs: int, round: int) -> list[float]:
        """Each step's loss, in batches and with noise that derive from (seed, client 0, round)."""
        shuffling = seeds.torch_stream(self.config.run.seed, "shuffling", 0, round)
        noise = seeds.torch_stream(self.config.run.seed, "noise", 0, round, self.device)
        losses = []
        for _ in range(epochs):
            order = torch.randperm(len(self.data), generator=shuffling).tolist()
            for images in DataLoader(self.data, self.config.optim.batch_size, sampler=order):
                losses.append(self._step(images.to(self.device), noise))
        return losses

    def _step(self, x0: Tensor, stream: torch.Generator) -> float:
        t = torch.randint(len(self.signal), (len(x0),), generator=stream, device=self.device)
        epsilon = torch.randn(x0.shape, generator=stream, device=self.device)
        signal, noise = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        x = signal * x0 + noise * epsilon
        self.optimizer.zero_grad()
        loss = F.smooth_l1_loss(self.model(x, t), signal * epsilon - noise * x0 if self.predicts_v else epsilon)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def sample(self, images: int, times: list[int], steps: int, ddpm: bool) -> None:
        """The first `steps` steps down the descending timesteps `times`: DDPM's, or DDIM's with η = 0."""
        data = self.config.data
        x = torch.randn(images, *data.shape, device=self.device)
        previous = [*times[1:], None]
        for now, before in list(zip(times, previous, strict=True))[:steps]:
            ac = self._gather(now, images)
            ac_before = torch.ones_like(ac) if before is None else self._gather(before, images)
            epsilon = self.model(x, torch.full((images,), now, device=self.device))
            if self.predicts_v:
                epsilon = (1 - ac).sqrt() * x + ac.sqrt() * epsilon
            x0 = (x - (1 - ac).sqrt() * epsilon) / ac.sqrt()
            if ddpm:
                beta = 1 - ac / ac_before
                mean = (ac_before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ac_before) * x) / (1 - ac)
                x = mean + (beta * (1 - ac_before) / (1 - ac)).sqrt() * torch.randn_like(x)
            else:
                x = ac_before.sqrt() * x0 + (1 - ac_before).sqrt() * epsilon
        x.sum().item()

    def _gather(self, t: int, images: int) -> Tensor:
        """ᾱ_t for each image, (B, 1, 1, 1): looked up on the host, as in the loop that everybody copies."""
        return self.ac.gather(-1, torch.full((images,), t)).float().view(-1, 1, 1, 1).to(self.device)


class Baseline:
    """A `Loop` in a process of its own, with as many threads and the same images (n, C, S, S); a context manager."""

    def __init__(self, config: Config, device: torch.device, images: np.ndarray) -> None:
        check_plain(config)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, config, device, images, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        """What that method of the loop returns. RunError if the process has ended."""
        try:
            self._pipe.send((method, arguments))
            return self._pipe.recv()
        except (EOFError, OSError):
            raise RunError("bench: the baseline's process has ended before its answer") from None


def _serve(pipe: Connection, config: Config, device: torch.device, images: np.ndarray, threads: int) -> None:
    torch.set_num_threads(threads)
    loop = Loop(config, device, images)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the other end has what it wanted
            return
        pipe.send(getattr(loop, method)(*arguments))
