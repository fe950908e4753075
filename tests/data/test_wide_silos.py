"""HDF5 silos of any depth and number of channels, held in memory or read as they are needed; own sets of the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from small_datasets import CPU, all_images, pixels, refusal

import fdiff
from fdiff import registry
from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig
from fdiff.data import Shard, fingerprint, open_client_source, open_source, read_client_split
from fdiff.data.hdf5 import Hdf5Images, read_hdf5
from fdiff.federation import open_data


def silo(path: Path, images: np.ndarray, **options: object) -> DataConfig:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **options)
    return DataConfig(partition="private", root=str(path.with_name("{client}.h5")), image_side=8)


def numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2000, shape).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "options", "in_memory"),
    [
        ("<u2", {}, "auto"),
        ("f2", {"chunks": (4, 4, 8, 2)}, "auto"),
        (">f8", {"chunks": (3, 8, 8, 1), "compression": "gzip", "shuffle": True}, "auto"),
        (">u2", {"chunks": (3, 8, 8, 1), "compression": "lzf"}, "never"),
        ("f4", {}, "never"),
    ],
)
def test_silos_of_more_than_8_bits_reach_the_model(tmp_path: Path, dtype: str, options, in_memory: str) -> None:
    images = numbers(dtype, 9, 8, 8, 2)
    data = replace(silo(tmp_path / "0.h5", images, **options), range=(0, 2000), in_memory=in_memory, channels=2)
    source = open_client_source(data, 0, "train")
    expected = images.astype(np.float64).transpose(0, 3, 1, 2) / 1000 - 1
    assert np.abs(all_images(source) - expected).max() < 1e-6 and source.dtype == torch.float32
    where = str(tmp_path / "0.h5")
    words = (where, str(np.dtype(dtype).newbyteorder("=")), "--data.range")
    refusal(lambda: open_client_source(replace(data, range=None), 0, "train"), *words)
    images[5, 3, 3, 1] = 2001 if dtype != "f2" else 2002

    def read_all() -> None:
        all_images(open_client_source(data, 0, "train"))

    silo(tmp_path / "0.h5", images, **options)
    refusal(read_all, where, f"image 5: has the value {images[5, 3, 3, 1]:g}, outside data.range [0,2000]")
    assert len(open_client_source(replace(data, on_bad_image="skip"), 0, "train")) == 8


def test_images_that_do_not_fit_are_read_as_they_are_needed_and_are_the_same(tmp_path: Path, monkeypatch) -> None:
    data = replace(silo(tmp_path / "0.h5", pixels(40, 12, 12), chunks=(7, 12, 12), compression="gzip"), limit=13)
    whole = read_client_split(data, 0, "train")
    assert isinstance(whole.images, np.ndarray) and len(whole.rows) == 13
    held = open_client_source(data, 0, "train")
    shard = Shard(held, np.arange(13), CPU, in_memory="always")
    first = fingerprint(whole, None)
    monkeypatch.setattr("fdiff.data.opening.free_memory", lambda device: 2 * 13 * 144 - 1)
    split = read_client_split(data, 0, "train")
    assert isinstance(split.images, Hdf5Images) and fingerprint(split, None) == first
    source = open_client_source(data, 0, "train")
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    lazy = Shard(source, np.arange(13), CPU, in_memory="never", workers=1)
    for (a, _), (b, _) in zip(shard.batches(order, 5), lazy.batches(order, 5), strict=True):
        assert torch.equal(a, b)
    refusal(lambda: open_client_source(replace(data, in_memory="always"), 0, "train"), "data.in_memory", "use auto")


def test_a_part_is_read_without_the_rest(tmp_path: Path, monkeypatch) -> None:
    data = silo(tmp_path / "0.h5", pixels(200, 8, 8))
    asked = []
    from fdiff.data.hdf5_process import Reader

    read = Reader.images
    monkeypatch.setattr(Reader, "images", lambda self, *where: asked.append(where) or read(self, *where))
    split = read_client_split(replace(data, limit=5), 0, "train")
    assert sum(stop - start for _, start, stop in asked) == 5 and len(split.images) == 5


@pytest.mark.parametrize("order", ["NHWC", "HWCN", "CNHW"])
def test_given_axes_hold_for_what_is_read_in_parts(tmp_path: Path, order: str) -> None:
    images = pixels(6, 8, 9, 5)
    stored = images.transpose(["NHWC".index(axis) for axis in order])
    silo(tmp_path / "0.h5", stored)
    found = read_hdf5(tmp_path / "0.h5", "train", DataConfig(axes=order)).images
    expected = images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found.image(4), expected[4])
    np.testing.assert_array_equal(found.take(np.array([5, 1, 2])).load(), expected[[5, 1, 2]])
    np.testing.assert_array_equal(found.load(), expected)


def test_a_file_that_goes_bad_is_named_and_no_process_is_left(tmp_path: Path) -> None:
    data = silo(tmp_path / "0.h5", pixels(50, 16, 16), chunks=(1, 16, 16), compression="gzip")
    source = open_client_source(replace(data, in_memory="never"), 0, "train")
    reader = source._images._silo.reader()
    with (tmp_path / "0.h5").open("r+b") as file:
        file.seek(os.path.getsize(tmp_path / "0.h5") // 2)
        file.write(bytes(4000))
    refusal(lambda: all_images(source), str(tmp_path / "0.h5"))
    assert reader._process.poll() is not None


def test_uint8_silos_have_no_range_to_give(tmp_path: Path) -> None:
    data = replace(silo(tmp_path / "0.h5", pixels(5, 8, 8)), range=(0, 255))
    refusal(lambda: open_client_source(data, 0, "train"), "data.range", "uint8", "leave it out")
    silo(tmp_path / "0.h5", numbers("i2", 5, 8, 8))
    refusal(lambda: open_client_source(data, 0, "train"), "int16", "uint8")


@pytest.mark.parametrize(("channels", "axes"), [(4, None), (2, "NCHW")])
def test_channels_are_what_the_silos_have(tmp_path: Path, channels: int, axes: str | None) -> None:
    for client in range(2):
        images = pixels(6, 24, 24, channels, seed=client)
        silo(tmp_path / f"{client}.h5", images if axes != "NCHW" else images.transpose(0, 3, 1, 2))
    data = DataConfig(partition="private", root=f"{tmp_path}/{{client}}.h5", axes=axes)
    config = Config(data=data, federation=FederationConfig(clients=2), model=ModelConfig(dim_mults=(1, 2)))
    opened = open_data(config, SoloCommunicator())
    assert opened.config.data.shape == (channels, 24, 24)
    assert f"{channels} channels; the model sees 24x24 {channels} channels" in opened.notes[0]
    assert np.array_equal(opened.sources[1].image(2), pixels(6, 24, 24, channels, seed=1)[2].transpose(2, 0, 1))
    refusal(lambda: open_client_source(replace(opened.config.data, channels=3), 0, "train"), "channels")
    silo(tmp_path / "1.h5", pixels(6, 24, 24))
    refusal(lambda: open_data(replace(config, data=replace(data, axes=None)), SoloCommunicator()), "channels")


class Wide:
    labels = None

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[index]


def test_a_set_of_the_users_own_may_be_wide(monkeypatch) -> None:
    monkeypatch.setitem(registry._registered, "data.dataset", {})
    array = numbers("f4", 7, 8, 8, 6) / 2000
    fdiff.register_dataset("mine", lambda root, split: Wide(array))
    data = DataConfig(dataset="mine", range=(0, 1), image_side=8)
    opened = open_data(Config(data=data, model=ModelConfig(dim_mults=(1, 2))), SoloCommunicator())
    source = opened.sources[0]
    assert source.shape == (6, 8, 8) and np.abs(all_images(source) - (array.transpose(0, 3, 1, 2) * 2 - 1)).max() < 1e-6
    array[3, 0, 0, 0] = 7
    refusal(lambda: all_images(source), "mine train, image 3: has the value 7")
    skipping = replace(opened.config.data, on_bad_image="skip")
    assert len(open_source(skipping, "train")) == 6
    refusal(lambda: open_source(replace(data, range=None), "train"), "image 0 is float32 (8, 8, 6)", "--data.range")
