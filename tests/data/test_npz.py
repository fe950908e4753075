"""npz archives in MedMNIST's layout: read, checked before memory is taken, and never unpickled."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import CPU, all_images, pixels, refusal

from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig
from fdiff.data import (
    Shard,
    check_labels,
    fingerprint,
    open_client_source,
    open_source,
    read_client_split,
    read_split,
    split_source,
)
from fdiff.data.npz import read_npz
from fdiff.errors import UserError
from fdiff.federation import open_data


def write(path: Path, save=np.savez_compressed, **arrays: np.ndarray) -> DataConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **arrays)
    return DataConfig(dataset="npz", root=str(path))


def medmnist(path: Path, n: int = 6, *channels: int, **more: np.ndarray) -> DataConfig:
    """As MedMNIST writes them: labels (n, 1), and validation images, which are used for nothing."""
    arrays = {}
    for i, split in enumerate(("train", "val", "test")):
        arrays[f"{split}_images"] = pixels(n + i, 8, 8, *channels, seed=i)
        arrays[f"{split}_labels"] = np.arange(n + i)[:, None]
    return write(path, **arrays | more)


@pytest.mark.parametrize("channels", [(), (1,), (3,), (5,)])
def test_the_splits_are_those_of_the_file(tmp_path: Path, channels) -> None:
    data = medmnist(tmp_path / "a.npz", 6, *channels)
    for root in (tmp_path / "a.npz", tmp_path):
        for split, n, seed in (("train", 6, 0), ("test", 8, 2)):
            source = open_source(replace(data, root=str(root)), split)
            expected = pixels(n, 8, 8, *channels, seed=seed)
            expected = expected[:, None] if expected.ndim == 3 else expected.transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(all_images(source), expected)
            assert source.labels.tolist() == list(range(n)) and str(tmp_path / "a.npz") in source.name
    medmnist(tmp_path / "b.npz")
    refusal(lambda: open_source(replace(data, root=str(tmp_path)), "train"), "data.root", "2 .npz files")
    refusal(lambda: open_source(replace(data, root=None), "train"), "--data.root")


def test_each_client_may_have_its_own_file(tmp_path: Path) -> None:
    for client in range(2):
        medmnist(tmp_path / f"site-{client}.npz", 5 + client)
    root = str(tmp_path / "site-{client}.npz")
    for dataset in ("npz", "silos"):
        data = DataConfig(dataset=dataset, partition="private", root=root)
        config = Config(data=data, federation=FederationConfig(clients=2), model=ModelConfig(dim_mults=(1, 2)))
        assert config.data.dataset == dataset
        found = open_data(config, SoloCommunicator())
        assert [len(source) for source in found.sources] == [5, 6] and found.config.data.shape == (1, 8, 8)
        assert len(open_client_source(found.config.data, 1, "test")) == 8
    never = DataConfig(partition="private", root=root, in_memory="never")
    refusal(lambda: open_client_source(never, 0, "train"), "data.in_memory: never", "held in memory")
    refusal(lambda: Config(data=DataConfig(dataset="npz", in_memory="never")), "data.in_memory", "npz")


def test_wider_values_reach_the_shard_at_their_precision(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 4096, (9, 8, 8, 2)).astype(np.uint16)
    data = replace(write(tmp_path / "a.npz", train_images=images), image_side=8, range=(0, 4095), limit=5)
    source = open_source(data, "train")
    split = read_split(data, "train")
    shard = Shard(source, np.array([4, 1]), CPU)
    ((batch, _),) = shard.batches(torch.arange(2), 2)
    back = ((batch.double() + 1) / 2 * 4095).round().numpy()
    np.testing.assert_array_equal(back, images[split.rows[[4, 1]]].transpose(0, 3, 1, 2))
    assert shard._bytes == 2 * 2 * 64 * 4  # float32
    refusal(lambda: open_source(replace(data, range=None), "train"), "uint16 (9, 8, 8, 2)", "--data.range", "[0,65535]")
    refusal(lambda: open_source(replace(data, channels=3), "train"), "data.channels: 3", "2 channels")


def test_the_image_outside_the_range_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    images = np.zeros((40, 8, 8), np.float32)
    images[17, 3, 3] = 1.25
    data = replace(write(tmp_path / "a.npz", train_images=images), range=(0, 1), channels=1, image_side=8)
    refusal(lambda: open_source(data, "train"), str(tmp_path / "a.npz"), "image 17: has the value 1.25", "[0,1]")
    for limit in range(1, 40):
        if 17 in (split := read_split(replace(data, limit=limit), "train")).rows:
            refusal(lambda limit=limit: open_source(replace(data, limit=limit), "train"), "image 17:")
            break
    assert len(split) < 40
    assert len(open_source(replace(data, on_bad_image="skip"), "train")) == 39


MANY_LABELS = np.eye(6, dtype=np.int64)


def test_several_labels_of_an_image_are_refused_where_labels_are_needed(tmp_path: Path) -> None:
    data = medmnist(tmp_path / "a.npz", train_labels=MANY_LABELS)
    source = open_source(data, "train")
    check_labels(source, 0)
    words = ("6 labels for each image", "(6, 6)")
    refusal(lambda: check_labels(source, 6), "model.classes", *words)
    refusal(lambda: split_source(source, replace(data, partition="label-skew"), 2), "label-skew needs labels", *words)
    unlabelled = open_source(write(tmp_path / "b.npz", train_images=pixels(4, 8, 8)), "train")
    refusal(lambda: check_labels(unlabelled, 6), "has no train_labels")


class Tempting:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


UNFIT = {
    "no images": ({"images": pixels(2, 8, 8)}, "no array train_images", "images"),
    "objects": ({"train_images": np.array([Tempting()], object)}, "Python objects", "never unpickled"),
    "object labels": ({"train_images": pixels(1, 8, 8), "train_labels": np.array([Tempting()], object)}, "never"),
    "flat": ({"train_images": pixels(2, 64)}, "uint8 (2, 64)", "(n, H, W)"),
    "volumes": ({"train_images": pixels(2, 28, 28, 28)}, "(2, 28, 28, 28)", "C 1 to 16"),
    "more volumes": ({"train_images": pixels(2, 8, 8, 8, 3)}, "(2, 8, 8, 8, 3)"),
    "channels first": ({"train_images": pixels(2, 3, 8, 8)}, "looks like (n, C, H, W)"),
    "empty": ({"train_images": pixels(0, 8, 8)}, "not empty"),
    "no pixels": ({"train_images": pixels(2, 0, 8)}, "not empty"),
    "signed": ({"train_images": pixels(2, 8, 8).astype(np.int16)}, "int16", "uint8"),
    "complex": ({"train_images": pixels(2, 8, 8).astype(np.complex64)}, "complex64"),
    "record": ({"train_images": np.zeros((2, 8, 8), "u1,u1")}, "uint8"),
    "words": ({"train_images": np.full((2, 8, 8), "a")}, "uint8"),
    "strips": ({"train_images": pixels(2, 4, 100)}, "20 times"),
    "few labels": ({"train_images": pixels(2, 8, 8), "train_labels": np.arange(3)}, "train_labels is int64 (3,)"),
    "fractions": ({"train_images": pixels(2, 8, 8), "train_labels": np.array([0.0, 1])}, "float64", "whole numbers"),
    "below 0": ({"train_images": pixels(2, 8, 8), "train_labels": np.array([0, -1])}, "from -1 to 0"),
    "beyond": ({"train_images": pixels(2, 8, 8), "train_labels": np.array([0, 2**63], np.uint64)}, "be 0 or above"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_archive_is_named(tmp_path: Path, case: str) -> None:
    arrays, *words = UNFIT[case]
    data = write(tmp_path / "a.npz", **arrays)
    refusal(lambda: open_source(data, "train"), str(tmp_path / "a.npz"), *words)


def archive(path: Path, header: bytes, data: bytes, **more: bytes) -> DataConfig:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", header + data)
    return DataConfig(dataset="npz", root=str(path))


def header_of(shape: tuple, descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        (header_of((10**9, 64, 64)), 100, "and its file is not"),  # would be 4 TB
        (header_of((2, 8, 8)), 129, "and its file is not"),
        (header_of((-2, 8, 8)), 128, "and its file is not"),
        (header_of((2, 8, 8)).replace(b"'shape'", b"'shade'"), 128, "cannot be read as npz"),
        (header_of((2, 8, 8)).replace(b"(2,", b"2j,"), 128, "cannot be read as npz"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", 128, "cannot be read as npz"),
        (b"\x93NUMPY\x09\x00", 128, "(9, 0)"),
        (b"no array", 10, "cannot be read as npz"),
    ],
)
def test_a_header_that_lies_is_found_out_before_memory_is_taken(tmp_path: Path, header, size, words) -> None:
    data = archive(tmp_path / "a.npz", header, bytes(size))
    refusal(lambda: open_source(data, "train"), str(tmp_path / "a.npz"), words)


def test_what_does_not_fit_in_memory_is_refused_by_the_header(tmp_path: Path, monkeypatch) -> None:
    data = replace(write(tmp_path / "a.npz", train_images=np.zeros((64, 64, 64), np.uint16)), range=(0, 1))
    monkeypatch.setattr("fdiff.data.npz.free_memory", lambda device: 2**20)
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("memory was taken"))
    refusal(lambda: open_source(data, "train"), "uint16 (64, 64, 64)", "0.00146 GiB", "Parquet")


@settings(max_examples=40)
@given(
    st.integers(1, 5), st.integers(4, 9), st.integers(4, 9), st.sampled_from([None, 1, 2, 3, 16]),
    st.sampled_from(["u1", "<u2", ">u2", "f2", "<f4", ">f8"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_images_come_back(tmp_path_factory, n, height, width, channels, dtype, fortran, compress) -> None:
    shape = (n, height, width) if channels is None else (n, height, width, channels)
    images = np.random.default_rng(n).integers(0, 200, shape).astype(dtype)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    stored = np.asfortranarray(images) if fortran else images
    write(path, np.savez_compressed if compress else np.savez, train_images=stored)
    data = DataConfig(range=None if dtype == "u1" else (0, 200))
    found = read_npz(path, "train", data).images
    expected = images[:, None] if channels is None else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=8)), min_size=1, max_size=4), st.booleans())
def test_a_damaged_archive_is_refused_in_one_line_or_read_as_it_was(tmp_path_factory, edits, compress) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    images, labels = pixels(4, 8, 8), np.arange(4)
    write(path, np.savez_compressed if compress else np.savez, train_images=images, train_labels=labels)
    raw = bytearray(path.read_bytes())
    for start, junk in edits:
        start %= len(raw)
        raw[start : start + len(junk)] = junk
    path.write_bytes(raw)
    try:
        found = read_npz(path, "train", DataConfig())
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    np.testing.assert_array_equal(found.images[:, 0], images)
    assert found.labels is None or found.labels.tolist() == labels.tolist()


def test_the_fingerprint_follows_pixels_and_labels(tmp_path: Path) -> None:
    data = medmnist(tmp_path / "a.npz")
    first = fingerprint(read_split(data, "train"), data.root)
    assert fingerprint(read_split(medmnist(tmp_path / "b.npz"), "train"), None) == first
    changed = medmnist(tmp_path / "b.npz", train_images=pixels(6, 8, 8, seed=9))
    assert fingerprint(read_split(changed, "train"), None)["contents"] != first["contents"]
    silo = DataConfig(partition="private", root=str(tmp_path / "{client}.npz"))
    (tmp_path / "a.npz").rename(tmp_path / "0.npz")
    assert fingerprint(read_client_split(silo, 0, "train"), None) == first
