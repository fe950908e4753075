"""Scores of a checkpoint's models, by all ranks together: each draws its share, rank 0 judges.

Every rank calls `Scoring` and `score`. What travels: moments and label histograms, summed by all-reduce; features of
generated images, to rank 0, where a metric needs them. Real images never do, nor their features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiff import evaluate
from fdiff.assembly import together
from fdiff.client import Trainer
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.data import Source, open_client_source, open_source
from fdiff.extractor import Extractor, load_extractor
from fdiff.judge import choose
from fdiff.plan import host_of, hosted_by, plan_round
from fdiff.reference import Seen, Tally, see_source
from fdiff.snapshot import Saved, private_parts

MOST_IMAGES = 10_000  # by default no more images are drawn, as in the papers

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Wanted:
    """What is asked of an evaluation; None leaves the choice to the checkpoint and its test split."""

    images: int | None = None
    extractor: str | None = None
    weights: Path | None = None
    metrics: tuple[str, ...] | None = None


class Scoring:
    """The judge of checkpoints of one configuration, with the real split already seen.

    `config` says how to sample, and where the test split is; each rank opens what it may see of that: rank 0 the
    whole data set, or with private partitions each rank its clients' own. UserError, on all ranks, if the images
    do not suit the extractor or do not suffice.
    """

    def __init__(
        self, comm: Communicator, device: torch.device, config: Config, wanted: Wanted, cache: Path | None
    ) -> None:
        self._comm, self._config = comm, config
        data = config.data
        extractor = self._load(wanted, device)
        together(comm, lambda: extractor.check_shape(data.channels, data.image_side, data.image_side))
        self._judge = together(comm, lambda: choose(extractor, wanted.metrics, data.partition == "private"))
        sources = together(comm, self._sources)
        seen = together(comm, lambda: [see_source(extractor, s, device, cache) for s in sources])
        own = Seen.joined(seen, extractor, device)
        self._real_features, self._real = own.features.cpu(), self._sum(own)
        private = data.partition == "private"
        self._split = "test split of each client" if private else next((source.name for source in sources), "")
        real = self._real.moments.n
        self._images = min(real, MOST_IMAGES) if wanted.images is None else wanted.images
        together(comm, lambda: self._judge.check(self._images, real))
        self._trainer = together(comm, lambda: Trainer(config, device))

    def score(self, saved: Saved, ema: bool, local: bool = False, progress: Progress = iter) -> list[dict[str, Any]]:
        """On rank 0 a row of scores for each model of the checkpoint, elsewhere []; `progress` wraps its batches.

        The models are those of all clients, each drawn on the rank that hosts it, where they keep private parts; else
        the global one, drawn by all. With `ema` their moving averages. With `local` those of the clients that trained
        in the round, as they were before its average.
        """
        models, cut = self._share_out(saved, local)
        mine = [b for b in cut if b.rank == self._comm.rank]
        seen = together(self._comm, lambda: self._draw(saved, mine, ema, local, progress))
        rows = []
        for model in models:
            own = [s for b, s in zip(mine, seen, strict=True) if b.model == model]
            scores = self._score_one([b for b in cut if b.model == model], own)
            rows.append(self._facts(saved, model, ema, local) | {"scores": scores})
        return rows if self._comm.rank == 0 else []

    # --- the real split

    def _load(self, wanted: Wanted, device: torch.device) -> Extractor:
        """The extractor, on rank 0 first: if it has to be downloaded, one rank does so and the others find it."""
        name = wanted.extractor or ("fmnist-cnn" if self._config.data.channels == 1 else "inception")
        loaded: Extractor | None = None
        for turn in (self._comm.rank == 0, self._comm.rank != 0):
            load = partial(load_extractor, name, wanted.weights, str(device)) if turn else lambda: None
            loaded = together(self._comm, load) or loaded
        assert loaded is not None
        return loaded

    def _sources(self) -> list[Source]:
        data = self._config.data
        if data.partition == "private":
            clients = hosted_by(self._comm.rank, self._config.federation.clients, self._comm.size)
            return [open_client_source(data, client, "test") for client in clients]
        return [open_source(data, "test")] if self._comm.rank == 0 else []

    # --- the generated images

    def _share_out(self, saved: Saved, local: bool) -> tuple[list[int | None], list[evaluate.Batch]]:
        clients, ranks = saved.config.federation.clients, self._comm.size
        models: list[int | None] = list(range(clients)) if private_parts(saved.config) else [None]
        if local:
            models = list(_selected(saved))
        cut = evaluate.batches(models, self._images, self._config.sample, lambda c: host_of(c, clients, ranks), ranks)
        return models, cut

    def _draw(self, saved: Saved, mine: list[evaluate.Batch], ema: bool, local: bool, progress: Progress) -> list[Seen]:
        """What the extractor sees of this rank's batches."""
        seen = []
        for i in progress(range(len(mine))):
            if i == 0 or mine[i].model != mine[i - 1].model:
                self._trainer.buckets.flat.copy_(_parameters(saved, mine[i].model, ema, local))
            seen.append(Seen.of(self._judge.extractor, evaluate.draw(self._trainer, self._config, mine[i])))
        return seen

    def _score_one(self, cut: list[evaluate.Batch], seen: list[Seen]) -> dict[str, Any]:
        """On rank 0 the scores of the model whose batches are in `cut`, of which this rank saw `seen`."""
        own = Seen.joined(seen, self._judge.extractor, self._trainer.device)
        fake, features = self._sum(own), None
        if self._judge.needs_features:
            with self._comm.ledger.purpose("statistics"):
                features = evaluate.gather_in_order(self._comm, cut, own.features)

        def judged() -> dict[str, Any]:
            return self._judge.scores(self._real, fake, self._real_features, features) if self._comm.rank == 0 else {}

        return together(self._comm, judged)

    def _sum(self, own: Seen) -> Tally:
        """The tally of all ranks' images, on each of them."""
        flat = own.tally().to_flat()
        with self._comm.ledger.purpose("statistics"):
            self._comm.all_reduce(flat, tuple(range(self._comm.size)))
        return Tally.from_flat(flat)

    def _facts(self, saved: Saved, model: int | None, ema: bool, local: bool) -> dict[str, Any]:
        """What a score is stored with: without these it says nothing."""
        sample = self._config.sample
        return {
            "round": saved.round,
            "client": model,
            "ema": ema,
            "local": local,
            "n": self._images,
            "split": self._split,
            "n_real": self._real.moments.n,
            **self._judge.extractor.describe(self._config.data.image_side),
            "sampler": sample.sampler,
            "steps": sample.steps if sample.sampler == "ddim" else self._config.diffusion.timesteps,
        }


def _selected(saved: Saved) -> tuple[int, ...]:
    fed = saved.config.federation
    return plan_round(saved.config.method, fed.clients, saved.round, saved.config.run.seed, fed.fraction).selected


def _parameters(saved: Saved, model: int | None, ema: bool, local: bool) -> Tensor:
    if not local:
        return saved.parameters(model, ema)
    assert model is not None
    return saved.local_parameters(model, ema)


def sampling_config(saved: Saved, **chosen: Any) -> Config:
    """The checkpoint's configuration with other fields of `sample`; those that are None stay as the run had them."""
    sample = replace(saved.config.sample, **{name: value for name, value in chosen.items() if value is not None})
    return replace(saved.config, sample=sample)


# --- many models -----------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, float | int]:
    """Mean, deviation over the clients and the worst client of a distance."""
    values = [row["scores"][name] for row in rows]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    worst = max(rows, key=lambda row: row["scores"][name])
    return {"mean": mean, "deviation": deviation, "worst": worst["scores"][name], "worst_client": worst["client"]}
