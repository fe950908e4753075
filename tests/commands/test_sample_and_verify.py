"""Whole commands as a user types them: plan, partition and sample, their JSON forms and their files."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from jobs import ROOT, TINY, fdiff, in_turn
from PIL import Image
from progress_bars import recorded
from ranks import run_ranks

from fdiff.comm import Communicator, SoloCommunicator
from fdiff.commands import export, partition, report, sample, sweep
from fdiff.config import Config, RuntimeConfig
from fdiff.data import check_target
from fdiff.data.fashion_mnist import DEBIAN_ROOT
from fdiff.errors import RunError, UserError
from fdiff.federation import open_checkpoint, sampling
from fdiff.federation.validate import shared_parts
from fdiff.model import Buckets, build_model, diffusion

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Runs `full` and `udec` with a moving average, and samples of them drawn on one, two and four ranks."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--diffusion.timesteps", "40"]  # of which DDPM takes every one
    trained = [["train", *TINY, *short, "--method", m, "--optim.ema", "0.9", "--run.dir", m] for m in ("full", "udec")]
    trained += [["train", *TINY, "--federation.rounds", "1", "--run.dir", "plain"]]
    common = ["--images", "7", "--batch_size", "2", "--runtime.threads", "1"]
    for ranks in (1, 2, 4):
        drawn = [
            ["sample", "full", *common, "--out", f"full-{ranks}.h5"],
            ["sample", "udec", *common, "--client", "3", "--out", f"udec-{ranks}.h5"],
            ["sample", "full", *common, "--ema", "false", "--sampler", "ddpm", "--out", f"ddpm-{ranks}.h5"],
        ]
        done = in_turn(ranks, trained * (ranks == 1) + drawn, folder)
        assert all(rank.status == 0 for job in done for rank in job), done
    return folder


def images(file: Path) -> np.ndarray:
    with h5py.File(file) as opened:
        return opened["images"][()]


@pytest.mark.parametrize("name", ["full", "udec", "ddpm"])
def test_samples_are_the_same_for_any_number_of_ranks(run, name):
    one, two, four = (images(run / f"{name}-{ranks}.h5") for ranks in (1, 2, 4))
    assert one.shape == (7, 8, 8, 1) and one.dtype == np.uint8
    assert np.array_equal(one, two) and np.array_equal(one, four)
    assert len({image.tobytes() for image in one}) == 7


def test_samples_begin_with_the_grid_of_the_run(run):
    """The run's own grid of four images has the same seeds; only the batch they were drawn in differs."""
    with h5py.File(run / "full" / "checkpoints" / "round-000003" / "global.h5") as file:
        grid = file["samples"][()]
    assert np.abs(grid[:, 0].astype(int) - images(run / "full-1.h5")[:4, :, :, 0]).max() <= 1


def test_sample_writes_a_grid_or_a_folder(run, tmp_path):
    checkpoint = run / "udec" / "checkpoints" / "round-000003"
    fdiff("sample", checkpoint, "--images", 5, "--out", "grid.png", cwd=tmp_path).check()
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * (56 + 2) + 2, 2 * (56 + 2) + 2)
    fdiff("sample", checkpoint, "--images", 5, "--out", "folder", cwd=tmp_path).check()
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == [f"{i:06d}.png" for i in range(5)]


def test_samples_that_cannot_be_had_are_one_line_on_two_ranks(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "grid.png").mkdir()
    cases = [
        (["full", "--images", 0], "--images: 0 is not valid"),
        (["full", "--sampler", "ddim", "--steps", 5000], "sample.steps: 5000 is not valid"),
        (["full", "--client", 3], "--client: 3 is not valid; full has one model for all clients"),
        (["udec", "--client", 9], "--client: 9 is not valid; with udec each client has its own model: 0 to 3"),
        (["plain", "--ema", "true"], "has no moving averages; train with --optim.ema"),
        (["none"], "none: is not a folder"),
        (["full", "--first", -1], "--first: -1 is not valid; it must be at least 0, and at most 2^32"),
        (["full", "--seed", -1], "--seed: -1 is not valid; it must be in [0, 2^63)"),
        (["full", "--classes", "3"], "--classes: '3' is not valid; the run was trained without classes"),
        (["full", "--guidance", 2], "sample.guidance: 2.0 is not valid with model.class_dropout 0"),
        (["full", "--out", tmp_path / "full"], "full exists already; name a new folder"),
        (["full", "--out", tmp_path / "grid.png"], "grid.png exists already"),
        (["full", "--out", tmp_path / "full" / "file" / "grid.png"], "cannot be written"),
        (["full", "--out", tmp_path / "photo.jpg"], "nothing is written as .jpg; name FILE.png for a grid, FILE.h5"),
    ]
    requests = [["sample", *words, "--runtime.threads", 1] for words, _ in cases]
    for ends, (_, expected) in zip(in_turn(2, requests, run), cases, strict=True):
        assert [done.status for done in ends] == [2, 2], (expected, ends)
        lines = [line for done in ends for line in done.err.splitlines()]
        assert len(lines) == 1 and expected in lines[0], lines


def test_where_samples_cannot_be_written_none_are_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "draw_all", None)
    with pytest.raises(UserError, match="--out: .* exists already"):
        sample.run(run / "full", RuntimeConfig(), SoloCommunicator(), torch.device("cpu"), out=run)


def test_samples_that_are_not_finite_are_an_error_that_names_the_client_and_the_round(run, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion.Drawing, "draw", lambda *_: torch.full((2, 1, 8, 8), math.nan))
    alone = (RuntimeConfig(), SoloCommunicator(), torch.device("cpu"))
    for words, whose in (({}, "client 0"), ({"client": 3}, "client 3")):
        with pytest.raises(RunError, match=rf"{whose}, round 3: drawn images are not finite"):
            sample.run(run / "udec", *alone, out=tmp_path / "none.png", images=2, **words)
    assert not list(tmp_path.iterdir())


class Sampling:
    """`fdiff sample` on a rank; returns what that sent."""

    def __init__(self, run: Path, out: Path) -> None:
        self.run, self.out = run, out

    def __call__(self, comm: Communicator) -> dict[str, float]:
        sample.run(self.run, RuntimeConfig(), comm, torch.device("cpu"), out=self.out, images=7, batch_size=2)
        return comm.ledger.take()


def test_of_samples_nothing_but_the_pictures_travels(run, tmp_path):
    sent = run_ranks(Sampling(run / "full", tmp_path / "out.h5"), 2, tmp_path)
    assert [set(ledger) <= {"pictures"} for ledger in sent] == [True, True]
    assert sent[1] == {"pictures": 3 * 8 * 8}  # the second and the fourth batch of two, two, two and one
    assert np.array_equal(images(tmp_path / "out.h5"), images(run / "full-1.h5"))


def test_a_bar_over_all_sampling_steps_is_shown_where_a_person_watches(run, tmp_path, monkeypatch):
    bars = recorded(monkeypatch)
    alone = (RuntimeConfig(), SoloCommunicator(), torch.device("cpu"))
    sample.run(run / "full", *alone, out=tmp_path / "out.h5", images=7, batch_size=4, steps=5)
    assert bars[0].total == 7 and bars[0].n == pytest.approx(7)
    shown = bars[0].terminal.getvalue()
    assert shown.count("images/s") >= 2 * 5 and "| 7/7 [" in shown


def test_plan_as_json(tmp_path):
    flags = ["--preset", "fmnist-k10", "--method", "udec", "--json"]
    plan = json.loads(fdiff("plan", *flags, cwd=tmp_path).check().out)
    assert plan["parameters"] == {
        "encoder": 1_280_642,
        "bottleneck": 999_376,
        "decoder": 716_297,
        "total": 2_996_315,
    }
    assert round(100 * plan["saving"], 1) == 73.6
    assert plan["communicated_parameters_full"] == 15 * 10 * 2 * 2_996_315
    assert len(plan["rounds"]) == 15 and sum(r["wire_bytes"] for r in plan["rounds"]) == plan["wire_bytes"]
    assert sum(plan["bytes_by_purpose"].values()) == plan["wire_bytes"] and plan["bytes_by_purpose"]["ema"] == 0
    assert plan["rounds"][0]["reporters"] == {"decoder": list(range(10))}
    assert sum(r["parameters"] for r in plan["rounds"]) == plan["communicated_parameters"]


def test_plan_as_a_table(tmp_path):
    out = fdiff("plan", "--preset", "fmnist-k10", "--method", "usplit", cwd=tmp_path).check().out
    assert all(word in out for word in ("2,996,315", "25.0%", "41.3%", "73.6%", "usplit", "round  15"))


@pytest.mark.skipif(not DEBIAN_ROOT.is_dir(), reason="needs Fashion-MNIST: apt install dataset-fashion-mnist")
def test_partition_as_json_and_as_a_picture(tmp_path):
    flags = ["--preset", "fmnist-label-skew", "--json", "--plot", "split.png"]
    clients = json.loads(fdiff("partition", *flags, cwd=tmp_path).check().out)["clients"]
    assert [c["client"] for c in clients] == list(range(5)) and sum(c["size"] for c in clients) == 60_000
    counts = {"0": 4888, "1": 1316, "2": 378, "3": 936, "4": 146, "5": 1177, "6": 96, "7": 2944, "8": 1565}
    assert clients[0] == {"client": 0, "size": 13446, "labels": counts}
    assert clients[3]["labels"] == {"0": 2, "1": 3979, "2": 1959, "3": 149, "5": 2265, "6": 5484}
    with Image.open(tmp_path / "split.png") as picture:
        assert min(picture.size) > 300


def test_a_picture_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "counts_of_labels", None)  # each is refused before the work
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--plot: .*split.png cannot be written .*file is no folder to write in.; give"):
        partition.run(Config(), plot=tmp_path / "file" / "split.png")
    with pytest.raises(UserError, match="--plot: .*split.doc is not valid; name a file that ends in .png or .pdf or"):
        partition.run(Config(), plot=tmp_path / "split.doc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"--plot: matplotlib.figure is not installed; pip install 'fdiff\[report\]'"):
        partition.run(Config(), plot=tmp_path / "split.png")


@pytest.mark.parametrize("suffix", partition.PLOTS)
def test_a_picture_is_what_its_name_says(tmp_path, suffix):
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".eps": b"%!PS", ".jpg": b"\xff\xd8\xff"}
    starts |= {".jpeg": starts[".jpg"], ".webp": b"RIFF", ".tif": b"II*\0", ".tiff": b"II*\0"}
    file = tmp_path / "new" / f"split{suffix}"
    partition.draw([{0: 3, 1: 4}, {1: 5}], file)
    assert file.read_bytes().startswith(starts[suffix])


def test_no_output_is_written_under_the_name_of_another_kind(tmp_path):
    for call, said in (
        (lambda: export.run(tmp_path, tmp_path / "weights.pt"), "FILE: .*weights.pt is not valid; .* .safetensors"),
        (lambda: report.run([tmp_path], out=tmp_path / "page.pdf"), "--out: .*page.pdf is not valid; .* .html or .htm"),
        (lambda: report.run([tmp_path], out=tmp_path), "--out: .* is not valid; name a file"),
        (lambda: sweep._check_folder(tmp_path / "all.csv"), "--out: .*all.csv is not valid; name a folder"),
        (lambda: check_target(tmp_path / "x.jpg"), "--out: .*x.jpg is not valid: nothing is written as .jpg"),
    ):
        with pytest.raises(UserError, match=said):
            call()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="--out: .*folder.html is a folder"):
        report.run([tmp_path], out=tmp_path / "folder.html")
    (tmp_path / "beta-0.5").mkdir()
    check_target(tmp_path / "beta-0.5")  # an empty folder is one, whatever its name
    check_target(tmp_path / "new")


@pytest.mark.parametrize(("method", "client"), [("full", None), ("udec", 3)])
def test_what_the_readme_says_to_a_stranger_reads_every_parameter(run, method, client):
    """With h5py alone, held against what `fdiff export` writes: shared parts, and those of a client."""
    text = (ROOT / "fdiff" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    first = code.splitlines()[3]
    assert first.startswith("folder, client, name = ") and "fdiff" not in code
    saved = open_checkpoint(run / method)
    model = build_model(saved.config)
    saved.fill(Buckets(model, shared_parts(saved.config)), client, False)
    for name, parameter in model.named_parameters():
        found = {"folder": str(saved.path), "client": client, "name": name}
        exec(compile(code.replace(first, ""), "README", "exec"), found)
        assert np.array_equal(found["weight"], parameter.detach().numpy()), name


def test_help(tmp_path):
    assert "usage: fdiff COMMAND" in fdiff("--help", cwd=tmp_path).check().out
    assert fdiff(cwd=tmp_path).status == 2
