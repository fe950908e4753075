"""Samples of images that a PNG cannot hold, and whole runs on them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from jobs import TINY, fdiff, on_ranks
from PIL import Image
from small_datasets import pixels, refusal

from fdiff.config import DataConfig
from fdiff.data import as_pictures, needs_array, save_images
from fdiff.evaluation.extractors import check_images, default_extractor
from fdiff.model import diffusion

ONE_ROUND = ["--federation.rounds", 1, "--federation.clients", 2]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("limits", [None, (-1000.0, 3000.0)])
def test_images_are_written_so_that_nothing_is_lost(tmp_path: Path, channels: int, limits) -> None:
    images = torch.from_numpy(pixels(5, channels, 8, 8))
    if limits:
        images = diffusion.to_range(images / 127.5 - 1, *limits)
    last = images.permute(0, 2, 3, 1).numpy()
    for name in ("a.png", "a.h5", "a"):
        save_images(images, tmp_path / name, limits)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["images"][()], last)
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.mode == ("RGBA" if channels == 4 and not limits else "RGB")
    if not (limits or channels in (2, 5, 16)):
        assert not (tmp_path / "a.npy").exists() and len(list((tmp_path / "a").glob("*.png"))) == 5
        with Image.open(tmp_path / "a" / "000003.png") as one:
            np.testing.assert_array_equal(np.asarray(one).reshape(8, 8, channels), last[3])
        return
    assert needs_array(channels, limits)
    for array in (tmp_path / "a.npy", tmp_path / "a" / "images.npy"):
        found = np.load(array)
        np.testing.assert_array_equal(found, last)
        assert found.dtype == (np.float32 if limits else np.uint8)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["grid.png", "images.npy"]
    shown = as_pictures(images, limits)
    np.testing.assert_array_equal(shown[:, 0].numpy(), pixels(5, channels, 8, 8)[:, 0])
    assert shown.shape[1] == (1 if channels == 1 else 3)
    (tmp_path / "a.png").unlink()
    refusal(lambda: save_images(images, tmp_path / "a.png", limits), "--out", "a.npy exists already")


def test_the_ends_of_a_range_are_black_and_white() -> None:
    x = torch.tensor([-3, -1, 0, 1, 3.0])
    assert diffusion.to_range(x, 0.1, 0.7).tolist() == [np.float32(v) for v in (0.1, 0.1, 0.4, 0.7, 0.7)]
    assert diffusion.to_range(x, 0, 65535).tolist() == [0, 0, 32767.5, 65535, 65535]


@pytest.mark.parametrize("name", ["inception", "fmnist-cnn"])
def test_scores_by_8_bit_colour_are_refused_before_anything_is_loaded(name: str) -> None:
    data = DataConfig(dataset="npz", root="x", channels=1, image_side=28)
    check_images(name, data)
    deep = DataConfig(dataset="npz", root="x", channels=1, image_side=28, range=(0, 1))
    refusal(lambda: check_images(name, deep), "--extractor", name, "8 bits", "from 0 to 1")
    five = DataConfig(dataset="npz", root="x", channels=5, image_side=28)
    refusal(lambda: check_images(name, five), "--extractor", "5x28x28")
    refusal(lambda: default_extractor(five), "5 channels")


@pytest.mark.slow
def test_a_run_on_wide_silos_samples_their_values(tmp_path: Path) -> None:
    for client in range(2):
        values = np.random.default_rng(client).normal(0, 100, (20, 8, 8, 5)).clip(-500, 500).astype(np.float32)
        np.savez_compressed(tmp_path / f"{client}.npz", train_images=values, test_images=values[:4])
    words = ["train", *TINY, *ONE_ROUND, "--data.partition", "private", "--data.root", "{client}.npz"]
    words += ["--data.dataset", "npz", "--sample.clip", "true", "--run.dir"]
    for done in on_ranks(2, *words, "run", "--data.range", "[-500,500]", cwd=tmp_path):
        done.check()
    grid = np.load(tmp_path / "run" / "samples" / "round-000001.npy")
    with h5py.File(tmp_path / "run" / "checkpoints" / "round-000001" / "global.h5") as file:
        np.testing.assert_array_equal(file["samples"][()].transpose(0, 2, 3, 1), grid)
    assert grid.shape == (4, 8, 8, 5) and grid.dtype == np.float32 and np.abs(grid).max() <= 500
    assert len(np.unique(grid.round(1) % 1)) > 5 and (tmp_path / "run" / "samples" / "round-000001.png").exists()
    fdiff("sample", "run", "--images", 4, "--out", "new.png", cwd=tmp_path).check()
    assert np.abs(np.load(tmp_path / "new.npy") - grid).max() < 1 and (tmp_path / "new.png").exists()
    done = fdiff("evaluate", "run", "--extractor", "inception", cwd=tmp_path)
    assert done.status == 2 and "8 bits" in done.err and len(done.err.splitlines()) == 1
    for more, said in (([], "--data.range"), (["--data.range", "[-10,10]"], "outside data.range [-10,10]")):
        refused = on_ranks(2, *words, "other", *more, cwd=tmp_path)
        (line,) = "".join(done.err for done in refused).splitlines()
        assert [done.status for done in refused] == [2, 2] and said in line and ".npz" in line
