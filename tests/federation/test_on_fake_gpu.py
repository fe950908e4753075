"""Every path of a run as a GPU takes it, on fake tensors: nothing stays on the host, no dtype is wrong, nobody waits.

See `fake_gpu` for what this can't see. The tests marked `gpu` see the rest, on a real one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import GPU, fake_gpu

from fdiff import config as cfg
from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.data import Shard, normalise, open_source
from fdiff.evaluation import Scoring, ScoringRequest
from fdiff.evaluation.metric_set import MetricSet
from fdiff.federation import client as clients
from fdiff.federation import federator, open_checkpoint, rounds
from fdiff.federation.client import Client, Trainer
from fdiff.federation.host import Host
from fdiff.model import diffusion

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")

Plant = Callable[[Trainer, pytest.MonkeyPatch], None]
TINY = Config(
    federation=cfg.FederationConfig(clients=2, rounds=2, local_epochs=1),
    data=cfg.DataConfig(image_side=4, limit=7, test_limit=120),
    model=cfg.ModelConfig(dim=4, dim_mults=(1,), heads=1, head_dim=4),
    diffusion=cfg.DiffusionConfig(timesteps=3),
    optim=cfg.OptimConfig(batch_size=2),
    sample=cfg.SampleConfig(images=2, every=2),
)
# Where the host may wait for the device, and for what.
MAY_WAIT = {
    "comm.base.gather": "images of the grid, and features, come to the host",
    "data.shards.__init__": "labels go to the device, once a run",
    "data.shards._load": "images come from a loader",
    "data.shards._fill": "images go to the device, once a run",
    "data.shards.batches": "an epoch's order goes to the device",
    "evaluation.extractors.__init__": "the extractor's weights go to the device, once",
    "evaluation.extractors._conv_block": "likewise",
    "evaluation.extractors._fmnist_extractor": "likewise",
    "evaluation.features.features_of_source": "the real images go to the device, once",
    "evaluation.features.from_flat": "moments of a model come to the host",
    "evaluation.features.joined": "an evaluation's features come together",
    "evaluation.metrics.to_flat": "the number of images goes to the device, beside their moments",
    "evaluation.scoring.__init__": "the real features come to the host, once",
    "evaluation.scoring._draw": "a checkpoint's model goes to the device",
    "federation.client._mean_loss": "an epoch's losses come to the host",
    "federation.client._find_diverged": "is what the last step left finite, once a round",
    "federation.host._host_copy": "what the clients begin with, once a run",
    "federation.local_optimizer.__init__": "torch looks at the learning rate, once",
    "federation.sampling.draw": "are a batch's images finite",
    "federation.host.parameters": "a client's private parts come back for its grid",
    "federation.host.shared_range": "a moving average comes back",
    "federation.same_code._sample": "initial weights, and what is frozen, are compared, once a start",
    "federation.snapshot._complete_copies": "a checkpoint's copies are complete",
    "federation.snapshot._fill": "a checkpoint's values go to the device",
    "model.unet.__init__": "the frequencies of the timesteps go to the device, once",
    "model.diffusion.make_schedule": "the schedule goes to the device, once",
    "model.diffusion.__init__": "the table of steps goes to the device, once for all batches of a size",
}


def play(config: Config, monkeypatch: pytest.MonkeyPatch, folder: Path, **how: bool) -> Counter[str]:
    """A run on the fake GPU; who waited for it."""
    config = replace(config, run=replace(config.run, dir=str(folder / "run")))
    monkeypatch.setattr(federator, "lock", lambda path: 0)  # which a process holds for life
    with fake_gpu(monkeypatch) as watch:
        rounds.run(config, SoloCommunicator(), GPU, **how)
    assert set(watch.waits) <= set(MAY_WAIT), watch.waits
    return watch.waits


EVERYTHING = {
    "federation": replace(TINY.federation, keep_optimizer=True, on_client_failure="drop"),
    "optim": replace(TINY.optim, ema=0.9, ema_warmup=True, warmup_steps=3, grad_clip=0.5, weight_decay=0.1),
    "data": replace(TINY.data, flip=True),
    "diffusion": replace(TINY.diffusion, schedule="cosine", objective="v"),
    "run": replace(TINY.run, keep_local=True),
}
ALONE = replace(TINY.federation, clients=1)
CASES = {
    "udec-everything": replace(TINY, method="udec", **EVERYTHING),
    "full-alone-bf16": replace(TINY, federation=ALONE, runtime=cfg.RuntimeConfig(precision="bf16")),
    "ulatdec-float64": replace(TINY, method="ulatdec", runtime=cfg.RuntimeConfig(precision="float64")),
    "usplit-ordered": replace(TINY, method="usplit", runtime=cfg.RuntimeConfig(reduction="ordered")),
    "labels-loaded": replace(
        TINY,
        model=replace(TINY.model, classes=10, class_dropout=0.2),
        data=replace(TINY.data, in_memory="never", workers=0),
        sample=replace(TINY.sample, guidance=2.0),
    ),
}


FAST = "udec-everything"


@pytest.mark.parametrize("case", [FAST, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != FAST)])
def test_a_run_and_its_resumption(case, monkeypatch, tmp_path):
    config = CASES[case]
    play(replace(config, federation=replace(config.federation, rounds=1)), monkeypatch, tmp_path)
    play(config, monkeypatch, tmp_path, resume=True)
    assert open_checkpoint(tmp_path / "run").round == 2


@pytest.mark.slow
def test_an_evaluation(monkeypatch, tmp_path):
    config = CASES["udec-everything"]
    play(replace(config, federation=replace(config.federation, rounds=1)), monkeypatch, tmp_path)
    for name in ("check", "scores"):  # of numbers that a fake tensor does not have, on the host
        monkeypatch.setattr(MetricSet, name, lambda *_: {})
    with fake_gpu(monkeypatch) as watch:
        request = ScoringRequest(images=6, metrics=("neighbours", "classes"))
        scoring = Scoring(SoloCommunicator(), GPU, config, request, None)
        for _ in scoring.score(open_checkpoint(tmp_path / "run"), ema=True):
            pass
    assert set(watch.waits) <= set(MAY_WAIT), watch.waits


# --- nobody waits inside an epoch, or between clients ----------------------------------------------------------------


def epoch(images: int, monkeypatch: pytest.MonkeyPatch, plant: Plant = lambda *_: None) -> Counter[str]:
    """Who waits in an epoch of so many images, all of them already on the GPU, with something planted."""
    with fake_gpu(monkeypatch) as watch:
        trainer = Trainer(replace(TINY, optim=EVERYTHING["optim"], data=EVERYTHING["data"]), GPU)
        client = Client(0, Shard(open_source(TINY.data, "train"), range(images), GPU))
        plant(trainer, monkeypatch)
        watch.waits.clear()
        trainer.prepare(client, 1)
        trainer.train(client, 1)
        return watch.waits


def test_an_epoch_waits_as_often_whatever_its_length(monkeypatch):
    assert epoch(7, monkeypatch) == epoch(3, monkeypatch)
    assert epoch(3, monkeypatch).total() == 3  # its order, its losses, is what it left finite


def test_clients_change_places_without_a_wait(monkeypatch):
    with fake_gpu(monkeypatch) as watch:
        config = CASES["udec-everything"]
        shard = Shard(open_source(TINY.data, "train"), range(2), GPU)
        host = Host(Trainer(config, GPU), [Client(i, shard) for i in range(3)])
        watch.waits.clear()
        for client in host.clients * 2:
            host.enter(client)
        host.adopt_average()
        assert not watch.waits


# --- what is planted is found ----------------------------------------------------------------------------------------


def leave_on_the_host(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.schedule = diffusion.Schedule(trainer.schedule.sqrt_ac.cpu(), trainer.schedule.sqrt_one_minus_ac)


def take_another_dtype(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "normalise", lambda images, dtype: normalise(images, torch.float64))


def draw_on_the_host(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer._noise = torch.Generator()


def read_a_number(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *arguments: loss(*arguments) * loss(*arguments).item())


PLANTS = {leave_on_the_host: "device", take_another_dtype: "dtype", draw_on_the_host: "generator"}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_mistake_is_found(plant, monkeypatch):
    with pytest.raises(Exception, match=PLANTS[plant]):
        epoch(2, monkeypatch, plant)


def test_a_planted_wait_is_found(monkeypatch):
    waits = epoch(7, monkeypatch, read_a_number)
    steps = {"federation.client.descend": 3 + 1}  # whole batches, and one to warm up
    assert waits - epoch(7, monkeypatch) == Counter(steps)
