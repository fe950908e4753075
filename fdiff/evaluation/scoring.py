"""Scores of a checkpoint's models, by all ranks together: each draws its share, rank 0 computes the scores.

Every rank calls `Scoring` and `score`. What travels: moments and label histograms, summed by all-reduce; features of
generated images, to rank 0, where a metric needs them. Real images never do, nor their features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiff import checkpoint
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.data import Source, open_client_source, open_source
from fdiff.evaluation.extractors import DISTANCES, Extractor, check_images, default_extractor, load_extractor
from fdiff.evaluation.features import FeatureStatistics, ImageFeatures, features_of_source
from fdiff.evaluation.metric_set import choose_metrics
from fdiff.federation import Saved, Trainer, private_parts, sampling, together
from fdiff.plan import host_of, hosted_by, select_clients

MOST_IMAGES = 10_000  # by default no more images are drawn, as in the papers
WORST: dict[str, Callable[..., Any]] = {  # the scores that are summarised over clients: which end is the worst one
    **dict.fromkeys(DISTANCES.values(), max),
    "kid": max,
    "precision": min,
    "recall": min,
    "density": min,
    "coverage": min,
    "total_variation": max,
}

Model = int | None  # a client's by its index, or the global one
Row = dict[str, Any]  # the scores of a model, and all that they depend on


@dataclass(frozen=True)
class ScoringRequest:
    """What is asked of an evaluation; None leaves the choice to the checkpoint and its test split."""

    images: int | None = None
    extractor: str | None = None
    weights: Path | None = None
    metrics: tuple[str, ...] | None = None


class Scoring:
    """Scores checkpoints of one configuration against its test split, whose features are taken once, here.

    `config` says how to sample, and where the test split is; each rank opens what it may see of that: rank 0 the
    whole data set, or with private partitions each rank its clients' own. UserError, on all ranks, if the images
    do not suit the extractor or do not suffice.
    """

    def __init__(
        self, comm: Communicator, device: torch.device, config: Config, wanted: ScoringRequest, cache: Path | None
    ) -> None:
        self._comm, self._config = comm, config
        data = config.data
        extractor = self._load(wanted, device)
        self._metrics = together(comm, lambda: choose_metrics(extractor, wanted.metrics, data.partition == "private"))
        sources = together(comm, self._sources)
        seen = together(comm, lambda: [features_of_source(extractor, s, device, cache) for s in sources])
        own = ImageFeatures.joined(seen, extractor, device)
        self._real_features, self._real = own.features.cpu(), self._sum(own)
        private = data.partition == "private"
        self._split = "test split of each client" if private else next((source.name for source in sources), "")
        real = self._real.moments.n
        self._images = images_by_default(real) if wanted.images is None else wanted.images
        together(comm, lambda: self._metrics.check(self._images, real))
        self._device = device
        self._trainer: Trainer | None = None
        self._selected: tuple[int, Counter[int]] | None = None

    def score(
        self,
        saved: Saved,
        ema: bool,
        *,
        local: bool = False,
        models: Sequence[Model] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[list[Row]]:
        """On rank 0 a row of scores for each model of the checkpoint, elsewhere none; all ranks iterate to the end.

        The models, if not given, are `models_of` the configuration, each client's drawn on the rank that hosts it, the
        global one by all; with `local` those of the clients that trained in the round, as they were before its
        average. With `ema` their moving averages. They come as they are done: at most one of each rank at a time.
        What `check`, called before every sampling step, raises on a rank is raised on all.
        """
        if models is None:
            models = together(self._comm, lambda: _trained(saved) if local else models_of(saved.config))
        clients, ranks = saved.config.federation.clients, self._comm.size

        def rank_of(client: int) -> int:
            return host_of(client, clients, ranks)

        cut = sampling.batches(models, self._images, self._config.sample, rank_of, ranks)
        mine = [batch for batch in cut if batch.rank == self._comm.rank]
        title = f"round {saved.round}{', moving average' if ema else ''}"
        with sampling.progress_bar(self._comm, mine, title, check) as progress_of:
            for turn in _turns(models, rank_of):
                own = [batch for batch in mine if batch.model in turn]
                seen = together(self._comm, lambda own=own: self._draw(saved, own, ema, local, progress_of))
                rows = []
                for model in turn:
                    of_model = [s for b, s in zip(own, seen, strict=True) if b.model == model]
                    scores = self._score_one([b for b in cut if b.model == model], of_model)
                    rows.append(self._facts(saved, model, ema, local) | {"scores": scores})
                yield rows if self._comm.rank == 0 else []

    # --- the real split

    def _load(self, wanted: ScoringRequest, device: torch.device) -> Extractor:
        """The extractor, on rank 0 first: if it has to be downloaded, one rank does so and the others find it."""
        data = self._config.data
        name = together(self._comm, lambda: wanted.extractor or default_extractor(data))
        together(self._comm, lambda: check_images(name, data))
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

    def _draw(
        self,
        saved: Saved,
        own: Sequence[sampling.Batch],
        ema: bool,
        local: bool,
        progress_of: Callable[[sampling.Batch], sampling.Progress],
    ) -> list[ImageFeatures]:
        """What the extractor sees of this rank's batches of one model."""
        if not own:
            return []
        trainer = self._trainer = self._trainer or Trainer(self._config, self._device)
        trainer.buckets.flat.copy_(_parameters(saved, own[0].model, ema, local))
        trainer.buckets.frozen.copy_(saved.frozen)
        images = (sampling.draw(trainer, self._config, batch, saved.round, progress_of(batch)) for batch in own)
        return [ImageFeatures.of(self._metrics.extractor, of_batch) for of_batch in images]

    def _score_one(self, cut: list[sampling.Batch], seen: list[ImageFeatures]) -> dict[str, Any]:
        """On rank 0 the scores of the model whose batches are in `cut`, of which this rank saw `seen`."""
        own = ImageFeatures.joined(seen, self._metrics.extractor, self._device)
        fake, features = self._sum(own), None
        if self._metrics.needs_features:
            with self._comm.ledger.purpose("statistics"):
                features = sampling.gather_in_order(self._comm, cut, own.features)

        def scores() -> dict[str, Any]:
            return self._metrics.scores(self._real, fake, self._real_features, features) if self._comm.rank == 0 else {}

        return together(self._comm, scores)

    def _sum(self, own: ImageFeatures) -> FeatureStatistics:
        """The tally of all ranks' images, on each of them."""
        flat = own.statistics().to_flat()
        with self._comm.ledger.purpose("statistics"):
            self._comm.all_reduce(flat, tuple(range(self._comm.size)))
        return FeatureStatistics.from_flat(flat)

    def _facts(self, saved: Saved, model: Model, ema: bool, local: bool) -> Row:
        """What a score is stored with: without these it says nothing."""
        sample = self._config.sample
        return {
            "round": saved.round,
            "client": model,
            "selected": None if model is None else self._rounds_of(saved, model),
            "ema": ema,
            "local": local,
            "n": self._images,
            "split": self._split,
            "n_real": self._real.moments.n,
            **self._metrics.extractor.describe(self._config.data.shape[1]),
            "sampler": sample.sampler,
            "steps": steps_of(self._config),
        }


    def _rounds_of(self, saved: Saved, client: int) -> int:
        """In how many rounds a client was selected: if in none, its private parts are those that the run began with."""
        fed, seed = saved.config.federation, saved.config.run.seed
        if self._selected is None or self._selected[0] != saved.round:
            rounds = (select_clients(fed.clients, r, seed, fed.fraction) for r in range(1, saved.round + 1))
            self._selected = saved.round, Counter(client for selected in rounds for client in selected)
        return self._selected[1][client]


def models_of(config: Config) -> list[Model]:
    """The models of a checkpoint: each client's where they keep private parts, else the global one."""
    return list(range(config.federation.clients)) if private_parts(config) else [None]


def _trained(saved: Saved) -> list[Model]:
    """The clients that trained in the round: of one that was dropped from it the files keep what it was before."""
    fed = saved.config.federation
    selected = select_clients(fed.clients, saved.round, saved.config.run.seed, fed.fraction)
    _, header, _ = checkpoint.read_generation(saved.path)
    dropped = [int(client) for client in header.get("metrics", {}).get("dropped", {})]
    return [client for client in selected if client not in dropped]


def _turns(models: Sequence[Model], rank_of: Callable[[int], int]) -> list[list[Model]]:
    """The models in groups, in each of which every rank has at most one to draw."""
    turns: list[list[Model]] = []
    had: dict[int, int] = {}
    for model in models:
        rank = 0 if model is None else rank_of(model)
        had[rank] = had.get(rank, 0) + 1
        turns += [[]] if len(turns) < had[rank] else []
        turns[had[rank] - 1].append(model)
    return turns


def _parameters(saved: Saved, model: Model, ema: bool, local: bool) -> Tensor:
    if not local:
        return saved.parameters(model, ema)
    assert model is not None
    return saved.local_parameters(model, ema)


def sampling_config(config: Config, **chosen: Any) -> Config:
    """The configuration with other fields of `sample`; those that are None stay as the run had them."""
    sample = replace(config.sample, **{name: value for name, value in chosen.items() if value is not None})
    return replace(config, sample=sample)


def steps_of(config: Config) -> int:
    """The sampling steps of an image."""
    return config.sample.steps if config.sample.sampler == "ddim" else config.diffusion.timesteps


def images_by_default(real: int) -> int:
    """How many images of a model are drawn against so many real ones, where no number is asked for."""
    return min(real, MOST_IMAGES)


# --- many models -----------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], name: str) -> dict[str, float | int]:
    """Mean, deviation over the clients and the worst client of a score, one of WORST.

    Clients that were never selected do not count, unless there are no others.
    """
    rows = [row for row in rows if row.get("selected") != 0] or list(rows)
    values = [row["scores"][name] for row in rows]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    worst = WORST[name](rows, key=lambda row: row["scores"][name])
    return {"mean": mean, "deviation": deviation, "worst": worst["scores"][name], "worst_client": worst["client"]}


def summaries(rows: Sequence[Row]) -> dict[str, dict[str, float | int]]:
    """The summary of each score of WORST that the rows, of one kind of weights, have."""
    return {name: summary(rows, name) for name in rows[0]["scores"] if name in WORST}


def described(facts: Mapping[str, Any]) -> str:
    """What must be said beside a score, in a line; `facts` as the rows of `Scoring.score` have them."""
    resized = f", images resized from {facts['resized_from']} pixels" if facts.get("resized_from") else ""
    before = ", before the average" if facts.get("local") else ""
    return (
        f"{facts['n']} images a model{before} ({facts['sampler']}, {facts['steps']} steps) against "
        f"{facts['n_real']} of {facts['split']}; extractor {facts['extractor']} {facts['checksum'][:12]}{resized}"
    )
