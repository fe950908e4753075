"""Bad requests as a user makes them, alone and on two ranks: one line, once, the right status, and no hang."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import injections
from faults.processes import Job
from faults.runs import train
from jobs import TINY, Done, fdiff, in_turn, torchrun
from PIL import Image
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow


MINE = """
from torch import nn

nobody = {"decoder": lambda selection: []}


def whole(shape, model):
    return nn.Conv2d(shape[0], shape[0], 1)


def net(shape, model):
    made = whole(shape, model)
    made.parts = {"all": [made]}
    return made
"""


def write_inputs(folder: Path) -> None:
    """Data sets that are wrong in one way each, and a run folder that exists."""
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (folder / "corrupt" / name).write_bytes(b"\0\0\x08\x07 this is not an IDX file")
    for i in range(20):
        (folder / "images" / "train" / "shirts").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / "images" / "train" / "shirts" / f"{i:02d}.png")
    shutil.copytree(folder / "images", folder / "spoilt")
    (folder / "spoilt" / "train" / "shirts" / "07.png").write_bytes(b"not a PNG")
    (folder / "exists").mkdir()
    (folder / "exists" / "thesis.tex").write_text("precious")
    (folder / "a-file").write_text("")
    (folder / "not.yaml").write_text("federation: [1, 2")
    (folder / "code.yaml").write_text("model: {kind: 'json:dumps'}\n")
    (folder / "mine.py").write_text(MINE)
    (folder / "unknown.yaml").write_text("federation:\n  client: 3\n")
    (folder / "rgb.json").write_text('{"in_channels": 3, "block_out_channels": [32, 64, 64, 64]}')
    save_file({"one": np.ones(1, np.float32)}, folder / "one.safetensors")


UNET2D = "--model.kind unet2d"

# name: (flags of `train`, what the line says, status)
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "method": ("--method fedavg", ("method", "'fedavg'", "full, usplit, ulatdec, udec"), 2),
    "a part": ("--method encoder+tail", ("method", "a part 'tail'", "encoder, bottleneck, decoder"), 2),
    "no module": ("--method nowhere:table", ("method: 'nowhere:table' cannot be imported", "No module named"), 2),
    "no name": ("--model.kind json:unet", ("model.kind: 'json:unet' cannot be used", "has no attribute 'unet'"), 2),
    "model": ("--model.kind resnet", ("model.kind: 'resnet'", "choose one of unet", "MODULE:NAME"), 2),
    "no model": ("--model.kind json:dumps", ("model.kind: json:dumps fails",), 2),
    "data set": ("--data.dataset imagenet", ("data.dataset: 'imagenet'", "fashion-mnist, celeba", "MODULE:NAME"), 2),
    "no data set": ("--data.dataset json:dumps", ("data.dataset: json:dumps cannot be opened for train",), 2),
    "code in a file": ("--config code.yaml", ("'json:dumps' is code", "add --model.kind json:dumps"), 2),
    "nobody reports": ("--method mine:nobody", ("mine:nobody lets nobody report the part decoder in round 1",), 2),
    "part of none": ("--model.kind mine:net --method head", ("shares a part 'head'", "its parts are all"), 2),
    "no parts": ("--model.kind mine:whole", ("the model cannot be shared: it has no attribute parts",), 2),
    "levels": (f"{UNET2D} --model.options.block_out_channels [8,8,8,8,8]", ("data.image_side: 8", "5 stages"), 2),
    "fourier": (f"{UNET2D} --model.options.time_embedding_type fourier", ("takes the logarithm of the timestep",), 2),
    "other channels": (f"{UNET2D} --model.config rgb.json", ("in_channels: 3 is a config for other channels",), 2),
    "no weights": ("--model.init nowhere", ("model.init: nowhere: is not there; give a file of fdiff export",), 2),
    "other weights": ("--model.init one.safetensors", ("does not fit the model; it has no encoder.", "and 1"), 2),
    "only frozen": ("--method udec --model.train encoder", ("method: udec shares only decoder",), 2),
    "trained part": ("--model.train tail", ("model.train: 'tail' names a part 'tail'; the parts are encoder",), 2),
    "partition": ("--data.partition dirichlet", ("data.partition", "quantity-skew, label-count, private"), 2),
    "preset": ("--preset imagenet", ("--preset", "'imagenet'", "fmnist, celeba, cifar10, folder or mini"), 2),
    "flag": ("--federation.client 3", ("--federation.client",), 2),
    "type": ("--federation.clients many", ("federation.clients", "'many'", "int"), 2),
    "no clients": ("--federation.clients 0", ("federation.clients: 0", "between 1 and 100000"), 2),
    "clients without end": (f"--federation.clients {10**30}", ("federation.clients: 1000", "between 1 and 100000"), 2),
    "fraction 0": ("--federation.fraction 0", ("federation.fraction: 0", "(0, 1]"), 2),
    "fraction 1.5": ("--federation.fraction 1.5", ("federation.fraction: 1.5", "(0, 1]"), 2),
    "beta": ("--data.beta 0", ("data.beta: 0", "greater than 0"), 2),
    "side": ("--data.image_side 9", ("data.image_side: 9", "multiple of 2", "e.g. 8"), 2),
    "ranks": ("--federation.clients 1", ("federation.clients: 1", "2 ranks", "at most 1"), 2),
    "few images": ("--data.limit 3", ("4 clients need at least 4 images", "has 3"), 2),
    "few for skew": ("--data.limit 39 --data.partition label-skew", ("at least 40 images", "has 39"), 2),
    "hopeless skew": ("--data.partition quantity-skew --data.beta 0.01", ("1000 draws; the smallest data.beta",), 2),
    "hopeless labels": ("--data.partition label-skew --data.beta 0.0001", ("1000 draws; the smallest data.beta",), 2),
    "few labels": ("--data.partition label-count", ("2 of 10 classes to nobody", "data.labels_per_client 3"), 2),
    "many labels": ("--data.partition label-count --data.labels_per_client 11", ("classes; use at most 10",), 2),
    "root": ("--data.dataset fashion-mnist --data.root empty", ("empty", "train-images-idx3-ubyte", "download"), 2),
    "corrupt idx": ("--data.dataset fashion-mnist --data.root corrupt", ("corrupt/train-", "idx"), 2),
    "corrupt image": ("--data.dataset folder --data.root spoilt", ("07.png",), 2),
    "private": ("--data.partition private --data.root images", ("data.root", "{client}"), 2),
    "run folder": ("--run.dir exists", ("run.dir: 'exists' exists already", "--resume"), 2),
    "no run": ("--resume --run.dir images", ("run.dir: 'images' is not a run's folder", "nothing to resume"), 2),
    "run file": ("--run.dir a-file", ("run.dir: 'a-file' is a file",), 2),
    "no gpu": ("--runtime.device cuda", ("runtime.device: 'cuda'", "no GPU is visible"), 2),
    "yaml": ("--config not.yaml", ("--config: not.yaml is not YAML",), 2),
    "yaml field": ("--config unknown.yaml", ("unknown.yaml: federation.client: no such field", "clients?"), 2),
    "no yaml": ("--config absent.yaml", ("--config: absent.yaml cannot be read",), 2),
    "comm": ("--runtime.comm none", ("runtime.comm: 'none'", "2 ranks"), 2),
    "first round": ("--optim.lr 1e30 --optim.batch_size 64", (", round 1: after the last step the loss is not a",), 1),
    "last step": ("--optim.lr 50 --optim.batch_size 64", (", round 2: after the last step the loss is not a",), 1),
    "loss": ("--optim.lr 1e30 --optim.batch_size 4", (", round 1: step 2: the loss is nan, not a finite number",), 1),
}
GPU = {"no gpu"}
ON_RANKS_ONLY = {"ranks", "comm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(folder) -> dict[str, list[Done]]:
    requests = [["train", *TINY, "--run.dir", f"run-{i}", *case[0].split()] for i, case in enumerate(CASES.values())]
    requests.append(["frobnicate"])
    return dict(zip([*CASES, "command"], in_turn(2, requests, folder), strict=True))


def complaints(done: list[Done]) -> list[str]:
    return [line for rank in done for line in rank.err.splitlines() if "fdiff: error:" in line]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_say_it_once_and_end(on_two_ranks, name):
    import torch

    if name in GPU and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ranks, (_, words, status) = on_two_ranks[name], CASES[name]
    assert [rank.status for rank in ranks] == [status, status], ranks
    said = complaints(ranks)
    assert len(said) == 1, ranks
    assert all(word in said[0] for word in words), said[0]
    assert not any("Traceback" in rank.err for rank in ranks)


def test_an_unknown_command_on_two_ranks(on_two_ranks):
    ranks = on_two_ranks["command"]
    assert [rank.status for rank in ranks] == [2, 2]
    assert len(complaints(ranks)) == 1 and "train, plan" in complaints(ranks)[0]


def test_a_bad_request_leaves_what_was_there(on_two_ranks, folder):
    assert [f.name for f in (folder / "exists").iterdir()] == ["thesis.tex"]
    assert (folder / "exists" / "thesis.tex").read_text() == "precious"


def test_what_diverged_is_not_committed_and_the_last_checkpoint_stands(on_two_ranks, folder):
    first, run = (folder / f"run-{list(CASES).index(name)}" for name in ("first round", "last step"))
    assert re.search(r"client \d+, round 2: after", complaints(on_two_ranks["last step"])[0])
    assert not list((first / "checkpoints").iterdir())
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["round-000001"]
    assert all(line.startswith("sound ") for line in fdiff("verify", run, cwd=folder).check().out.splitlines())


def test_under_torchrun_it_is_said_once_and_the_status_tells(folder):
    done = torchrun(2, "train", *TINY, "--federation.fraction", 1.5, cwd=folder)
    assert done.status != 0 and done.err.count("fdiff: error:") == 1, done.err
    assert "federation.fraction: 1.5" in done.err and "commands/main.py" not in done.err


@pytest.mark.parametrize("victim", [0, 1])
def test_what_fails_on_one_rank_before_they_meet_is_heard_by_all(tmp_path, victim):
    job = Job(train("run", "full", 1), 2, tmp_path, partial(injections.fail_to_start, victim))
    assert job.wait(60) and job.statuses() == [1, 1]
    assert job.errors() == ["fdiff: error: RuntimeError: no driver"] and "Traceback" not in job.said()


def test_alone(folder):
    done = fdiff("train", *TINY, "--method", "fedavg", cwd=folder)
    assert done.status == 2 and complaints([done]) == done.err.splitlines()
    done = fdiff("sample", "absent", cwd=folder)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and "absent" in done.err
    done = fdiff("plan", "--federation.rounds", 10**30, cwd=folder)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and "between 1 and 1000000" in done.err
    done = fdiff("plan", "--ranks", "9", cwd=folder)
    assert done.status == 2 and "--ranks: 9" in done.err
