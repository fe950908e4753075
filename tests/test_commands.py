"""Whole commands as a user types them: plan, partition and sample, their JSON forms and their files."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from jobs import TINY, fdiff, in_turn
from PIL import Image

from fdiff.data.fashion_mnist import DEBIAN_ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Runs `full` and `udec` with a moving average, and samples of them drawn on one rank and on two."""
    folder = tmp_path_factory.mktemp("runs")
    trained = [["train", *TINY, "--method", m, "--optim.ema", "0.9", "--run.dir", m] for m in ("full", "udec")]
    common = ["--images", "7", "--batch_size", "2", "--runtime.threads", "1"]
    for ranks in (1, 2):
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
    one, two = images(run / f"{name}-1.h5"), images(run / f"{name}-2.h5")
    assert one.shape == (7, 8, 8, 1) and one.dtype == np.uint8
    assert np.array_equal(one, two)
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
    again = fdiff("sample", checkpoint, "--images", 5, "--out", "folder", cwd=tmp_path)
    assert again.status == 2 and "folder exists already" in again.err
    absent = fdiff("sample", checkpoint, "--client", 9, cwd=tmp_path)
    assert absent.status == 2 and "client-0009.h5" in absent.err


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


def test_help(tmp_path):
    assert "usage: fdiff COMMAND" in fdiff("--help", cwd=tmp_path).check().out
    assert fdiff(cwd=tmp_path).status == 2
