"""Local training, images/s, beside the loop that everybody writes and beside the roofline; and the loss they reach."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from statistics import mean

import numpy as np
import torch

from fdiff.bench.baseline import Baseline
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.bench.roofline import ceilings, step_work
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.data import Shard, open_source
from fdiff.federation import Client, Trainer

REPEATS = 5
STEPS = {"cpu": 2, "cuda": 50}  # in a timed span, an epoch
LOSS_STEPS, LOSS_EPOCH, LOSS_BATCH = 200, 10, 8  # the loss is the mean of the last epoch, of so many steps
LOSS_BAND = {"float32": 1e-4, "tf32": 1e-2, "bf16": 2e-2, "float64": 1e-4}


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Training as it is configured: an epoch's images/s of each rank, and the loss after 200 steps."""
    config = replace(config, model=replace(config.model, classes=0))  # the plain loop knows no labels
    return [*speed(config, comm, device), same_loss(config, device)]


def speed(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """Images/s beside the baseline in float32, and beside the roofline of the precision in use."""
    steps, batch = STEPS[device.type], config.optim.batch_size
    config = replace(config, federation=replace(config.federation, local_epochs=1))
    client = client_of(config, steps * batch, device)
    trainer, rounds = Trainer(config, device), count(1)

    def epoch() -> None:
        trainer.prepare(client, 1)
        trainer.train(client, next(rounds))

    with Baseline(config, device, pixels(config, len(client.shard))) as baseline:
        actions = {"ours": epoch, "baseline": lambda: baseline.call("train", 1, 1)}
        taken = in_turns(actions, comm, device, REPEATS, warmup=2)
    ours, plain = ([len(client.shard) / s for s in taken[name]] for name in actions)
    dtype = {"bf16": torch.bfloat16, "float64": torch.float64}.get(config.runtime.precision, torch.float32)
    limit = batch / ceilings(device, dtype).seconds(step_work(config))
    name = f"train, dim {config.model.dim}, B {batch}, {config.runtime.precision}"
    return [
        compare(name, ours, plain, "baseline", "images/s"),
        compare(f"{name}, roofline", ours, [limit], "bound", "images/s"),
    ]


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
