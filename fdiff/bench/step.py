"""Local training, images/s, beside the loop that everybody writes and beside the roofline; and the loss they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import mean

import numpy as np
import torch

from fdiff.bench.baseline import Baseline, as_plain
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.bench.roofline import NOTE, ceilings, dtype_of, step_work
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.data import Shard, open_source
from fdiff.federation import Client, Trainer

__all__ = ["NOTE", "client_of", "epochs_of", "limit_of", "pixels", "run", "same_loss", "speed", "title"]

REPEATS = 5
STEPS = {"cpu": 2, "cuda": 50}  # in a timed span, an epoch
LOSS_STEPS, LOSS_EPOCH, LOSS_BATCH = 200, 10, 8  # the loss is the mean of the last epoch, of so many steps
LOSS_BAND = {"float32": 1e-4, "tf32": 1e-2, "bf16": 2e-2, "float64": 1e-4}


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Training as it is configured: an epoch's images/s of each rank, and the loss after 200 steps."""
    config = as_plain(config)
    return [*speed(config, comm, device), same_loss(config, device)]


def speed(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Images/s beside the baseline in float32, and beside the roofline of the precision in use."""
    epoch, images = epochs_of(config, device)
    with Baseline(config, device, pixels(config, images)) as baseline:
        actions = {"ours": epoch, "baseline": lambda: baseline.call("train", 1, 1)}
        taken = in_turns(actions, comm, device, REPEATS, warmup=2)
    ours, plain = ([images / s for s in taken[name]] for name in actions)
    return [
        compare(title(config), ours, plain, "baseline", "images/s"),
        compare(f"{title(config)}, roofline", ours, [limit_of(config, device)], "bound", "images/s"),
    ]


def title(config: Config) -> str:
    """What is measured, in a result's name: what is left to itself is not named."""
    runtime = config.runtime
    chosen = [how for how in (runtime.execution, runtime.layout) if how != "auto"]
    return ", ".join([f"train, dim {config.model.dim}, B {config.optim.batch_size}, {runtime.precision}", *chosen])


def epochs_of(config: Config, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that trains a client for an epoch, another one each time, and the images of an epoch."""
    config = replace(config, federation=replace(config.federation, local_epochs=1))
    client = client_of(config, STEPS[device.type] * config.optim.batch_size, device)
    trainer, rounds = Trainer(config, device), count(1)

    def epoch() -> None:
        trainer.prepare(client, 1)
        trainer.train(client, next(rounds))

    return epoch, len(client.shard)


def limit_of(config: Config, device: torch.device) -> float:
    """The roofline of a step, images/s, from ceilings that are measured now, in the arithmetic that is set."""
    work = step_work(config)
    return config.optim.batch_size / ceilings(device, dtype_of(config.runtime.precision), work).seconds(work)


def same_loss(config: Config, device: torch.device) -> Result:
    """The loss after 200 steps from one seed, beside the baseline's; the name says how near they have to be."""
    fed = replace(config.federation, local_epochs=LOSS_STEPS // LOSS_EPOCH)
    config = replace(config, federation=fed, optim=replace(config.optim, batch_size=LOSS_BATCH))
    client, trainer = client_of(config, LOSS_EPOCH * LOSS_BATCH, device), Trainer(config, device)
    trainer.prepare(client, 1)
    ours = trainer.train(client, 1).losses[-1]
    with Baseline(config, device, pixels(config, len(client.shard))) as baseline:
        plain = mean(baseline.call("train", fed.local_epochs, 1)[-LOSS_EPOCH:])
    band = LOSS_BAND[config.runtime.precision]
    return compare(f"loss after {LOSS_STEPS} steps, equal to {band:g}", [ours], [plain], "baseline", "Huber")


def client_of(config: Config, images: int, device: torch.device) -> Client:
    """A client with so many images, the source's first ones, again from the start where it has fewer."""
    source = open_source(config.data, "train")
    return Client(0, Shard(source, np.arange(images) % len(source.labels), device, in_memory="always"))


def pixels(config: Config, images: int) -> np.ndarray:
    """The images of that client, uint8 (n, C, S, S)."""
    source = open_source(config.data, "train")
    return source.images(np.arange(images) % len(source.labels)).numpy()
