"""A data set of the user's own: images by index, through the same shards and partitions as fdiff's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import fdiff
from fdiff import registry
from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, FederationConfig
from fdiff.data import Shard, fingerprint, open_client_source, open_source, read_split, split_source
from fdiff.errors import UserError
from fdiff.federation import open_data

COUNT = 40


class Images:
    """Grey or RGB images of 12×12, or whatever a case wants."""

    def __init__(self, colour=False, labels=True, change=None, seed=0):
        shape = (COUNT, 12, 12, 3) if colour else (COUNT, 12, 12)
        self.pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        self.labels = np.arange(COUNT) % 3 if labels else None
        self.change = change or (lambda index, image: image)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.change(index, self.pixels[index])


@pytest.fixture
def own(monkeypatch):
    """A function that registers such a set as `mine`, and gives the configuration to use it."""
    monkeypatch.setitem(registry._registered, "data.dataset", {})
    asked = []

    def use(opener=lambda root, split: Images(), **data):
        def opening(root, split):
            asked.append((root, split))
            return opener(root, split)

        fdiff.register_dataset("mine", opening)
        return DataConfig(dataset="mine", **data)

    use.asked = asked
    return use


def test_shape_labels_and_pixels_are_those_of_the_set(own):
    data = own(root="/somewhere")
    opened = open_data(Config(data=data), SoloCommunicator())
    assert opened.config.data.shape == (1, 12, 12) and own.asked == [("/somewhere", "train")]
    source, expected = opened.sources[0], Images()
    assert np.array_equal(source.labels, expected.labels) and source.labelled
    assert np.array_equal(source.images([3, 1])[:, 0].numpy(), expected.pixels[[3, 1]])
    assert open_source(replace(data, image_side=12, channels=3), "test").image(5).shape == (3, 12, 12)
    assert own.asked[-1] == ("/somewhere", "test")


def test_colour_is_kept_and_another_side_is_resized(own):
    source = open_source(own(lambda root, split: Images(colour=True), image_side=6), "train")
    assert source.shape == (3, 6, 6) and source.images(range(COUNT)).shape == (COUNT, 3, 6, 6)
    grey = open_source(own(lambda root, split: Images(colour=True), image_side=12, channels=1), "train")
    assert grey.image(0).shape == (1, 12, 12)


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_shards_and_partitions_are_as_for_fdiffs_own(own, in_memory):
    data = own(partition="quantity-skew", beta=50.0, limit=36)
    source = open_source(data, "train")
    split = split_source(source, data, 3)
    assert sum(map(len, split)) == 36
    shard = Shard(source, split[1], torch.device("cpu"), in_memory=in_memory, workers=1)
    batches = list(shard.batches(torch.arange(len(shard)), 4))
    assert torch.equal(torch.cat([images for images, _ in batches]), source.images(split[1]))


def test_each_client_may_have_its_own(own):
    data = own(lambda root, split: Images(seed=int(root[-1])), partition="private", root="/silo-{client}")
    assert data.dataset == "mine"
    config = Config(data=data, federation=FederationConfig(clients=3))
    assert config.data.dataset == "mine"
    sources = open_data(config, SoloCommunicator()).sources
    assert [root for root, _ in own.asked] == ["/silo-0", "/silo-1", "/silo-2"]
    assert not torch.equal(sources[0].image(0), sources[1].image(0))
    assert len(open_client_source(data, 2, "test")) == COUNT and own.asked[-1] == ("/silo-2", "test")


def test_its_fingerprint_follows_pixels_and_labels(own):
    prints = []
    for opener in (Images, Images, lambda: Images(seed=1), lambda: Images(labels=False)):
        prints.append(fingerprint(read_split(own(lambda root, split, opener=opener: opener()), "train"), None))
    assert prints[0] == prints[1] and prints[0]["contents"] != prints[2]["contents"]
    assert prints[0]["labels"] != prints[3]["labels"]


def raising(root, split):
    raise RuntimeError("no such thing")


class Empty:
    labels = None

    def __len__(self):
        return 0


REFUSED = {
    "raises": (raising, r"mine cannot be opened for train \(RuntimeError: no such thing\)"),
    "no length": (lambda root, split: 3, r"cannot be opened for train \(TypeError"),
    "empty": (lambda root, split: Empty(), "mine train has no images"),
    "floats": (
        lambda r, s: Images(change=lambda i, x: x / 255.0),
        r"image 0 is float64 \(12, 12, 1\); it must be uint8",
    ),
    "channels": (lambda r, s: Images(change=lambda i, x: np.stack([x] * 17, -1)), r"image 0 is uint8 \(12, 12, 17\)"),
    "one raises": (
        lambda r, s: Images(change=lambda i, x: x if i != 7 else x[99]),
        r"image 7 cannot be read \(IndexError",
    ),
    "few labels": (lambda r, s: with_labels(np.arange(3)), r"labels int64 \(3,\); they must be 40 whole numbers"),
    "words": (lambda r, s: with_labels(["a"] * COUNT), "they must be 40 whole numbers"),
    "below 0": (lambda r, s: with_labels(np.arange(COUNT) - 1), "they must be 40 whole numbers"),
    "sizes": (lambda r, s: Images(change=lambda i, x: x[: 12 - i % 2]), "have no side in common"),
}


def with_labels(labels):
    images = Images()
    images.labels = labels
    return images


@pytest.mark.parametrize("case", REFUSED)
def test_a_set_that_is_none_is_refused_in_one_line(own, case):
    opener, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as refused:
        open_data(Config(data=own(opener)), SoloCommunicator())
    assert "\n" not in str(refused.value)


def test_images_that_are_unfit_may_be_left_out(own):
    data = own(lambda root, split: Images(change=lambda i, x: x if i != 7 else x / 2), on_bad_image="skip")
    opened = open_data(Config(data=data), SoloCommunicator())
    assert len(opened.sources[0]) == COUNT - 1 and any("unfit" in note for note in opened.notes)
