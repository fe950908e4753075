"""Drawing images with DDPM and with DDIM, images/s, beside the plain loop in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from fdiff.bench.baseline import Baseline, as_plain
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.federation import Trainer, sampling
from fdiff.model import diffusion

REPEATS = 5
STEPS = {"cpu": 5, "cuda": 50}  # timed of each sampler's: each step costs the same, and 1000 of them minutes


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """DDPM over all timesteps and DDIM over 50 of them; every rank draws a batch, nothing travels but the gather."""
    config = as_plain(config)
    trainer = Trainer(config, device)
    empty = np.empty((0, config.data.shape[0], 1, 1), dtype=np.uint8)
    with Baseline(config, device, empty) as baseline:
        return [_measure(config, name, trainer, baseline, comm) for name in ("ddpm", "ddim")]


def _measure(config: Config, sampler: str, trainer: Trainer, baseline: Baseline, comm: Communicator) -> Result:
    config = replace(config, sample=replace(config.sample, sampler=sampler))
    times = diffusion.make_sampler(config.diffusion, config.sample).t.tolist()
    steps = min(STEPS[trainer.device.type], len(times))
    images = config.sample.batch_size
    cut = sampling.batches([None], images * comm.size, config.sample, lambda _: 0, comm.size)
    mine = next(b for b in cut if b.rank == comm.rank)

    def first(all_steps: Iterable[int]) -> Iterator[int]:
        return islice(all_steps, steps)

    def ours() -> None:
        drawn = sampling.draw(trainer, config, mine, 0, first)
        sampling.gather_images(comm, cut, [drawn], sampling.empty_images(config, trainer.device))

    actions = {"ours": ours, "baseline": lambda: baseline.call("sample", images, times, steps, sampler == "ddpm")}
    taken = in_turns(actions, comm, trainer.device, REPEATS)
    speeds = [[images * comm.size * steps / len(times) / s for s in taken[name]] for name in actions]
    timed = "" if steps == len(times) else f", {steps} steps timed"
    name = f"{sampler}-{len(times)}, dim {config.model.dim}, {images} images a rank{timed}"
    return compare(name, *speeds, "baseline", "images/s")
