"""fdiff in Python: configurations, trainings here and in ranks, and what an opened run says and draws."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import ROOT, arrays, clean_env
from jobs import fdiff as command
from PIL import Image
from run_folders import write_run

import fdiff
from fdiff.config import Config

FIELDS = {
    "federation.rounds": 2,
    "federation.local_epochs": 1,
    "federation.clients": 2,
    "data.image_side": 8,
    "data.limit": 32,
    "model.dim": 8,
    "model.dim_mults": [1, 2],
    "model.head_dim": 8,
    "optim.batch_size": 8,
    "optim.ema": 0.9,
    "sample.sampler": "ddim",
    "sample.steps": 2,
    "sample.every": 0,
    "sample.batch_size": 3,
    "runtime.threads": 1,
    "runtime.reduction": "ordered",
}


def tiny(folder: Path, **more) -> Config:
    return fdiff.load_config(**{**FIELDS, "method": "udec", "run.dir": folder, **more})


def test_importing_fdiff_loads_nothing_that_takes_time():
    code = "import sys, fdiff; assert not {'torch', 'numpy', 'h5py', 'diffusers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=clean_env(PYTHONPATH=str(ROOT)))


@pytest.mark.parametrize("name", fdiff.__all__)
def test_every_name_is_there(name):
    assert getattr(fdiff, name).__doc__ and name in dir(fdiff)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fdiff.trian  # noqa: B018


def test_a_configuration_is_fields_over_a_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    config = fdiff.load_config("fmnist-k10", **{"federation.rounds": 3, "data.root": "$SOMEWHERE/x", "method": "udec"})
    assert (config.federation.clients, config.federation.rounds, config.method) == (10, 3, "udec")
    assert config.data.root == f"{tmp_path}/x"
    assert fdiff.load_config(**{"model.dim_mults": (1, 2), "run.dir": tmp_path}).run_dir == tmp_path
    assert fdiff.load_config() == Config()
    own = fdiff.load_config(**{"model.kind": "my_model:net", "model.options.width": 5, "model.options.deep": True})
    assert own.model.options == {"width": 5, "deep": True}


@pytest.mark.parametrize(
    ("preset", "fields", "says"),
    [
        ("maxi", {}, "--preset: 'maxi' is not a preset"),
        (None, {"federation.roundz": 3}, "federation.roundz: no such field; did you mean federation.rounds?"),
        (None, {"rounds": 3}, "rounds: no such field"),
        (None, {"federation": 3}, "federation: 3 is not valid; it must be a group of fields"),
        (None, {"federation.rounds": 0}, "federation.rounds: 0 is not valid"),
        (None, {"federation.rounds": "3"}, "federation.rounds: '3' is not valid; it must be of type int"),
        (None, {"data.root": "$NOT_SET/x"}, "the variable NOT_SET is not set"),
        (None, {"method.x": 1}, "method: {'x': 1} is not valid; it must be of type str"),
        (None, {"method": "udec", "method.x": 1}, "method.x: method has no fields; give each field once"),
        (None, {"federation": {"rounds": 2}, "federation.rounds.x": 1}, "federation.rounds has no fields"),
        (None, {"model.dim.x.y": 1}, "model.dim: {'x': {'y': 1}} is not valid; it must be of type int"),
        (None, {"": 1}, "no such field"),
    ],
)
def test_what_it_does_not_know_is_an_exception_with_one_line(preset, fields, says):
    with pytest.raises(fdiff.UserError) as refused:
        fdiff.load_config(preset, **fields)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(fdiff.UserError, match="holds no run; give the folder of one"):
        fdiff.open_run(tmp_path)
    with pytest.raises(fdiff.UserError, match="seed: is not code of a run; name method, model.kind, data.dataset"):
        fdiff.open_run(tmp_path, seed="x:y")


def test_the_logs_of_a_run_are_rows(tmp_path):
    run = fdiff.open_run(str(write_run(tmp_path)))
    assert [row["round"] for row in run.rounds] == [1, 2]
    assert {(row["round"], row["client"]) for row in run.clients} == {(r, c) for r in (1, 2) for c in (0, 1)}
    assert run.scores[0]["scores"]["fd_fmnist"] > 0 and run.checkpoints == {}
    assert run.config.method == "udec" and "2 rounds" in repr(run)


def test_ranks_that_a_launcher_started_do_not_each_train(tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(fdiff.UserError, match="torchrun started 2 ranks of this program, and each would train"):
        fdiff.train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_configuration_is_not_trained():
    with pytest.raises(fdiff.UserError, match="config: a dict is not valid; make one by fdiff.load_config"):
        fdiff.train({"method": "udec"})


def test_code_that_a_run_names_is_loaded_by_no_rank_unless_it_is_named_again(tmp_path):
    write_run(tmp_path)
    text = (tmp_path / "config.yaml").read_text().replace("method: udec", "method: evil_module:table")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(fdiff.UserError, match="method: 'evil_module:table' is code, which is loaded only where"):
        fdiff.train(fdiff.open_run(tmp_path).config, ranks=2, resume=True)


def test_the_callers_fields_stay_as_they_are():
    group = {"rounds": 2}
    config = fdiff.load_config(**{"federation": group, "federation.clients": 3})
    assert group == {"rounds": 2} and (config.federation.rounds, config.federation.clients) == (2, 3)


@pytest.mark.parametrize("ranks", [0, -1, 1.0, True, "2", 10**6])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(tmp_path, ranks):
    with pytest.raises(fdiff.UserError, match="ranks: .* is not valid; it must be a whole number from 1 to 1024"):
        fdiff.train(tiny(tmp_path), ranks=ranks)


# --- trained ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> fdiff.Run:
    """A run that was trained in this process."""
    return fdiff.train(tiny(tmp_path_factory.mktemp("api") / "run"))


@pytest.mark.slow
def test_a_run_is_opened_when_it_is_trained(trained):
    assert [row["round"] for row in trained.rounds] == [1, 2] and list(trained.checkpoints) == [1, 2]
    assert len(trained.clients) == 4 and trained.scores == []
    with pytest.raises(fdiff.UserError, match="exists already; choose another, or pass --resume"):
        fdiff.train(trained.config)


@pytest.mark.slow
def test_a_run_goes_on_in_the_same_process(tmp_path):
    """Also after a start that was refused; and parts that are not trained are not shared."""
    wrong = tiny(tmp_path / "run", **{"model.init": tmp_path / "none"})
    with pytest.raises(fdiff.UserError, match="model.init: .*none: is not there"):
        fdiff.train(wrong)
    config = tiny(tmp_path / "run", method="ulatdec", **{"federation.rounds": 1, "model.train": "decoder"})
    run = fdiff.train(config, resume=True)
    assert run.rounds[0]["reporters"] == {"decoder": [0, 1]}
    more = replace(config, federation=replace(config.federation, rounds=2))
    assert [row["round"] for row in fdiff.train(more, resume=True).rounds] == [1, 2]


@pytest.mark.slow
def test_its_images_are_those_of_the_command(trained, tmp_path):
    words = ["--images", 5, "--client", 1, "--seed", 7, "--out", "out", "--runtime.threads", 1]
    command("sample", trained.path, *words, cwd=tmp_path).check()
    drawn = trained.sample(5, client=1, seed=7)
    assert (drawn.shape, drawn.dtype) == ((5, 1, 8, 8), torch.float32) and 0 <= drawn.min() < drawn.max() <= 1
    files = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").iterdir())]
    assert np.array_equal((drawn[:, 0] * 255).round().byte().numpy(), np.stack(files))
    assert torch.equal(trained.sample(2, client=1, seed=7, first=3), drawn[3:])
    assert not torch.equal(trained.sample(5, client=1, ema=False, seed=7), drawn)
    assert not torch.equal(trained.sample(5, client=1, round=1, seed=7), drawn)


@pytest.mark.slow
def test_its_model_is_a_module_that_predicts_noise(trained):
    model = trained.model(client=1)
    assert isinstance(model, torch.nn.Module) and not model.training
    assert model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape == (2, 1, 8, 8)
    last = trained.model(client=1, ema=False).state_dict()
    private = arrays(trained.path, 2)  # of the checkpoint, by file and name
    encoder = next(value for name, value in private.items() if "client-0001" in str(name) and "encoder" in str(name))
    first = next(iter(last.values()))
    assert np.array_equal(encoder[: first.numel()], first.flatten().numpy())
    assert any(not torch.equal(value, last[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run: run.model(client=2), "--client: 2 is not valid; with udec each client has its own model: 0 to 1"),
        (lambda run: run.model(round=9), "round: 9 has no checkpoint in .*; it has 1, 2"),
        (lambda run: run.sample(0), "--images: 0 is not valid"),
        (lambda run: run.sample(1, seed=-1), "--seed: -1 is not valid"),
        (lambda run: run.sample(1, classes=[0]), "--classes: .* was trained without classes"),
        (lambda run: run.sample(1, classes=3), "--classes: .* was trained without classes"),
        (lambda run: run.sample(1, classes=[0.5]), "classes: 0.5 is not valid; it must be a whole number"),
        (lambda run: run.sample(2.0), "n: 2.0 is not valid; it must be a whole number"),
        (lambda run: run.model(client=True), "client: True is not valid; it must be a whole number"),
        (lambda run: run.model(client="0"), "client: '0' is not valid; it must be a whole number"),
        (lambda run: run.model(device="gpu"), "device: 'gpu' is not valid"),
    ],
)
def test_a_model_that_is_not_there_is_refused(trained, call, says):
    with pytest.raises(fdiff.UserError, match=says):
        call(trained)


@pytest.mark.slow
def test_ranks_that_it_starts_train_the_same_and_their_line_is_raised(trained, tmp_path, capfd):
    config = replace(trained.config, run=replace(trained.config.run, dir=str(tmp_path / "two")))
    run = fdiff.train(config, ranks=2)
    assert len(json.loads((run.path / "setting.json").read_text())["ranks"]) == 2
    assert "round 2/2" in capfd.readouterr().out
    one, two = (arrays(each.path, 2) for each in (trained, run))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(fdiff.UserError, match="^run.dir: .* exists already; choose another, or pass --resume"):
        fdiff.train(config, ranks=2)
    longer = replace(config, federation=replace(config.federation, rounds=3))
    assert list(fdiff.train(longer, resume=True).checkpoints) == [2, 3]


@pytest.mark.slow
def test_ranks_find_code_by_its_module_and_not_what_only_this_process_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_ranks_method.py").write_text("from fdiff import everyone\nmine = {'encoder': everyone}\n")
    run = fdiff.train(tiny(tmp_path / "code", method="my_ranks_method:mine"), ranks=2)
    assert run.rounds[-1]["reporters"] == {"encoder": [0, 1]}
    again = fdiff.open_run(run.path, method="my_ranks_method:mine")
    assert again.sample(1).shape == (1, 1, 8, 8)
    fdiff.register_method("only-here", {"decoder": fdiff.everyone})
    with pytest.raises(fdiff.UserError, match="method: 'only-here' is known to this process alone; name it as MODULE"):
        fdiff.train(tiny(tmp_path / "here", method="only-here"), ranks=2)
