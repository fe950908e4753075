"""Weights for others: what is exported gives the checkpoint's very images, from the file alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import TINY, in_turn
from safetensors.torch import load_file, safe_open, save_file

from fdiff import load_model, seeds
from fdiff.config import SampleConfig
from fdiff.errors import UserError
from fdiff.federation import sampling
from fdiff.federation.client import Trainer
from fdiff.federation.saved import open_checkpoint
from fdiff.model import diffusion

SAMPLE = SampleConfig(sampler="ddim", steps=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    more = ["--optim.ema", 0.9, "--federation.rounds", 2, "--sample.every", 0]
    requests = [["train", *TINY, *more, "--method", m, "--run.dir", m] for m in ("usplit", "udec")]
    requests += [
        ["export", "usplit", "global.safetensors", "--ema", "false"],
        ["export", "udec", "new/client.safetensors", "--client", 2, "--ema"],
        ["export", "udec", "default.safetensors"],
        ["export", "udec", "none.safetensors", "--client", 4],
        ["export", "usplit", "none.safetensors", "--client", 1],
    ]
    ends = [done[0] for done in in_turn(1, requests, folder)]
    for done in ends[:5]:
        done.check()
    assert [done.status for done in ends[5:]] == [2, 2]
    assert "--client: 4 is not valid; with udec each client has its own model: 0 to 3" in ends[5].err
    assert "usplit has one model for all clients" in ends[6].err
    assert "the global model, round 2, last weights: global.safetensors (" in ends[2].out
    assert "client 2, round 2, moving average: new/client.safetensors (" in ends[3].out
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "file", "client", "ema"),
    [
        ("usplit", "global.safetensors", None, False),
        ("udec", "new/client.safetensors", 2, True),
        ("udec", "default.safetensors", 0, True),
    ],
)
def test_an_exported_model_gives_the_same_samples(runs, run, file, client, ema):
    saved = open_checkpoint(runs / run)
    config = replace(saved.config, sample=SAMPLE)
    trainer = Trainer(config, torch.device("cpu"))
    trainer.buckets.flat.copy_(saved.parameters(client, ema))
    expected = sampling.draw(trainer, config, sampling.Batch(client, 0, 5, 0), 2)

    model, found = load_model(runs / file)
    assert found == saved.config
    sampler = diffusion.make_sampler(found.diffusion, SAMPLE)
    key = seeds.derive(found.run.seed, "sampling")
    images = diffusion.sample(model.eval(), sampler, key, torch.arange(5), (1, 8, 8))
    assert torch.equal(diffusion.to_uint8(images), expected)
    with safe_open(runs / file, "pt") as opened:
        told = opened.metadata()
    whose = "global" if client is None else str(client)
    assert (told["round"], told["client"], told["ema"]) == ("2", whose, str(ema).lower())


@pytest.mark.slow
def test_a_file_that_is_not_whole_is_refused(runs, tmp_path):
    weights = load_file(runs / "global.safetensors")
    with safe_open(runs / "global.safetensors", "pt") as opened:
        metadata = opened.metadata()
    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "part.safetensors", metadata)
    with pytest.raises(UserError, match="not those of the model that it describes"):
        load_model(tmp_path / "part.safetensors")
    save_file(weights, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="has format None, expected fdiff/1"):
        load_model(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path / "none.safetensors")
