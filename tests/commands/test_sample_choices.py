"""What `fdiff sample` can be asked for beside how many: other noise, a later lot, some classes, guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from jobs import TINY

from fdiff.comm import SoloCommunicator
from fdiff.commands import export, sample
from fdiff.commands.flags import parse
from fdiff.config import Config, RuntimeConfig
from fdiff.errors import UserError
from fdiff.federation import rounds

CPU = torch.device("cpu")
CLASSES = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with classes, dropped labels and a moving average; its weights are large, so that images differ."""
    folder = tmp_path_factory.mktemp("choices") / "run"
    more = "--method udec --federation.clients 2 --federation.rounds 1 --optim.ema 0.5 --sample.every 0".split()
    more += f"--model.classes {CLASSES} --model.class_dropout 0.5 --sample.clip --optim.lr 1e-2".split()
    config: Config = parse(["train", *TINY, *more, "--run.dir", str(folder)]).arguments["config"]
    rounds.run(replace(config, runtime=replace(config.runtime, threads=None)), SoloCommunicator(), CPU)
    return folder


@pytest.fixture
def draw(run, tmp_path):
    """A function that draws, and returns the images (n, S, S)."""

    def drawn(**asked: object) -> np.ndarray:
        out = tmp_path / "drawn.h5"
        sample.run(run, RuntimeConfig(), SoloCommunicator(), CPU, out=out, **{"images": 12, "batch_size": 32, **asked})
        with h5py.File(out) as file:
            return file["images"][..., 0].astype(int)

    return drawn


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether they are the same images, but for what batches of other sizes round otherwise."""
    return bool(np.abs(a - b).max() <= 1)


def test_a_later_lot_goes_on_where_the_first_one_ended(draw, run, tmp_path):
    assert near(draw(images=7, first=5), draw()[5:])
    sample.run(run, RuntimeConfig(), SoloCommunicator(), CPU, out=tmp_path / "lot", images=2, first=5)
    assert sorted(file.name for file in (tmp_path / "lot").iterdir()) == ["000005.png", "000006.png"]


def test_another_seed_is_other_noise_and_that_of_the_run_is_the_default(draw):
    assert np.array_equal(draw(), draw(seed=0)) and not near(draw(), draw(seed=1))


def test_classes_are_shown_in_turn(draw):
    every, some = draw(), draw(classes="3,7")
    assert near(some[3], every[7 - 4]) is False  # image 3 is of class 7 here, and of 3 there
    assert near(draw(classes="3")[3], every[3]) and near(draw(classes="7,7")[7], every[7])
    assert near(some[[0, 2, 4]], draw(classes="3")[[0, 2, 4]]) and near(some[[1, 3]], draw(classes="7")[[1, 3]])
    assert np.array_equal(draw(classes="0,1,2,3,4,5,6,7,8,9"), every)


def test_guidance_1_is_none_0_forgets_the_class_and_more_shows_it_more(draw):
    one, none, more = draw(), draw(guidance=0.0), draw(guidance=4.0)
    assert np.array_equal(draw(guidance=1.0), one) and not near(more, one)
    assert near(none, draw(guidance=0.0, classes="3"))
    assert np.abs(more - none).mean() > np.abs(one - none).mean()


@pytest.mark.parametrize("given", ["10", "3,", "", "-1", "3;7", "[3,7]", "two", "1e0"])
def test_what_is_no_class_is_refused(draw, given):
    with pytest.raises(UserError, match="--classes: .* is not valid; give numbers from 0 to 9, e.g. 0,9"):
        draw(classes=given)


def test_sample_and_export_say_which_model_and_take_the_same(draw, run, tmp_path, capsys):
    said = []
    for asked in ({}, {"client": 1}, {"client": 1, "ema": False}):
        draw(**asked)
        export.run(run, tmp_path / "model.safetensors", **asked)
        drawn, exported = capsys.readouterr().out.splitlines()
        said.append(drawn.partition(" images of ")[2].partition(":")[0])
        assert exported.startswith(said[-1] + ": ")
    assert said == [
        "client 0, round 1, moving average",
        "client 1, round 1, moving average",
        "client 1, round 1, last weights",
    ]
