"""Folders of Parquet files in Hugging Face's layout: read by row groups, and never more than is needed."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deep_files import deep, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import CPU, all_images, pixels, refusal

from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig
from fdiff.data import Shard, fingerprint, list_split, open_source, read_split, split_source
from fdiff.data.parquet import _Table
from fdiff.errors import UserError
from fdiff.federation import open_data

NAMES = ["dog", "cat", "ant"]  # not in the order of the alphabet


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write(path: Path, images, labels=None, names=None, plain=False, column="image", group=3, **more) -> DataConfig:
    """A file of encoded images, a row group of each `group` of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [image if isinstance(image, bytes | None) else png(image) for image in images]
    columns = {column: pa.array(files if plain else [{"bytes": f, "path": f"{i}.png"} for i, f in enumerate(files)])}
    columns |= {} if labels is None else {"label": pa.array(labels)}
    table = pa.table(columns | more)
    if names:
        features = {"features": {"label": {"names": names, "_type": "ClassLabel"}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    pq.write_table(table, path, row_group_size=group)
    return DataConfig(dataset="parquet", root=str(path.parent), image_side=8, channels=1)


def three_files(root: Path, below: str = "", **fields) -> tuple[DataConfig, np.ndarray]:
    """10 grey images in files of 4, 4 and 2."""
    images = pixels(10, 8, 8)
    for i, start in enumerate((0, 4, 8)):
        labels = np.arange(10)[start : start + 4] % 3
        write(root / below / f"train-0000{i}-of-00003.parquet", images[start : start + 4], labels, **fields)
    return DataConfig(dataset="parquet", root=str(root), image_side=8, channels=1), images


@pytest.fixture
def groups_read(monkeypatch) -> list[tuple[str, int]]:
    """The row groups whose images are read."""
    read, seen = _Table.read_images, []

    def noting(self, group):
        seen.append((self.path.name[:11], group))
        return read(self, group)

    monkeypatch.setattr(_Table, "read_images", noting)
    return seen


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("column", ["image", "img"])
def test_images_and_labels_are_those_of_all_files(tmp_path: Path, below: str, plain: bool, column: str) -> None:
    data, images = three_files(tmp_path, below, plain=plain, column=column, names=NAMES)
    write(tmp_path / below / "test-00000-of-00001.parquet", pixels(2, 8, 8, seed=5), [2, 0], names=NAMES)
    source = open_source(data, "train")
    np.testing.assert_array_equal(all_images(source)[:, 0], images)
    np.testing.assert_array_equal(source.images([7, 0, 7])[:, 0].numpy(), images[[7, 0, 7]])
    assert source.labels.tolist() == [i % 3 for i in range(10)]
    assert open_source(data, "test").labels.tolist() == [2, 0]
    assert read_split(data, "train").classes == tuple(NAMES)
    config = Config(data=replace(data, image_side=None), model=ModelConfig(dim_mults=(1,)))
    opened = open_data(config, SoloCommunicator())
    assert opened.sources[0].labels.tolist() == source.labels.tolist()  # numbered as in the file, not by name


def test_a_part_of_it_reads_the_row_groups_of_that_part(tmp_path: Path, groups_read) -> None:
    data, images = three_files(tmp_path, group=2)
    source = open_source(data, "train")
    assert groups_read == []  # labels are another column
    shard = Shard(source, np.array([9, 1, 0, 8]), CPU, in_memory="always", workers=0)
    assert groups_read == [("train-00000", 0), ("train-00002", 0)]
    ((batch, labels),) = shard.batches(torch.arange(4), 4)
    np.testing.assert_array_equal(batch[:, 0].numpy(), images[[9, 1, 0, 8]])
    assert labels.tolist() == [0, 1, 0, 2]
    groups_read.clear()
    opened = open_data(Config(data=replace(data, limit=1), federation=FederationConfig(clients=1)), SoloCommunicator())
    opened.sources[0].image(0)
    assert len(set(groups_read)) == 1


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_shards_are_the_same_in_memory_and_through_loaders(tmp_path: Path, in_memory: str) -> None:
    data, images = three_files(tmp_path)
    source = open_source(replace(data, image_side=6), "train")
    shard = Shard(source, split_source(source, data, 2)[1], CPU, in_memory=in_memory, workers=2)
    batches = [batch for batch, _ in shard.batches(torch.arange(len(shard)), 2)]
    assert torch.equal(torch.cat(batches), source.images(shard._indices))


def test_images_are_looked_at_as_those_of_a_folder(tmp_path: Path) -> None:
    three = [pixels(8, 8, 3), pixels(8, 8), pixels(8, 8, 4)]
    data = replace(write(tmp_path / "train-0.parquet", three), image_side=None, channels=None)
    opened = open_data(Config(data=data, model=ModelConfig(dim_mults=(1, 2))), SoloCommunicator())
    assert opened.config.data.shape == (3, 8, 8) and "1 images may be transparent" in opened.notes[1]
    write_png(tmp_path / "a.png", deep(8, 8))
    data = replace(write(tmp_path / "train-0.parquet", [(tmp_path / "a.png").read_bytes()]), image_side=None)
    opened = open_data(Config(data=data, model=ModelConfig(dim_mults=(1, 2))), SoloCommunicator())
    assert opened.config.data.range == (0, 65535) and opened.sources[0].dtype == torch.float32


def test_an_unfit_image_is_named_or_left_out(tmp_path: Path) -> None:
    images = [png(pixels(8, 8)), b"no image", None, png(pixels(8, 8))[:-60], png(pixels(8, 8))]
    data = write(tmp_path / "train-0.parquet", images, group=2)
    source = open_source(data, "train")
    where = str(tmp_path / "train-0.parquet")
    refusal(lambda: source.image(1), f"{where}, row 1", "cannot be read as an image")
    refusal(lambda: source.image(2), f"{where}, row 2", "no bytes")
    assert len(open_source(replace(data, on_bad_image="skip"), "train")) == 2


def test_silos_may_be_of_parquet_and_number_classes_alike(tmp_path: Path) -> None:
    write(tmp_path / "0" / "train-0.parquet", pixels(3, 8, 8), [0, 1, 0], names=["dog", "cat"])
    write(tmp_path / "1" / "train-0.parquet", pixels(2, 8, 8, seed=1), [0, 1], names=["ant", "dog"])
    for dataset in ("parquet", "silos"):
        data = DataConfig(dataset=dataset, partition="private", root=f"{tmp_path}/{{client}}", image_side=8, channels=1)
        opened = open_data(Config(data=data, federation=FederationConfig(clients=2)), SoloCommunicator())
        assert [source.labels.tolist() for source in opened.sources] == [[2, 1, 2], [0, 2]]


def test_the_fingerprint_follows_files_and_images(tmp_path: Path) -> None:
    data, images = three_files(tmp_path / "a")
    split = read_split(data, "train")
    first, lines = fingerprint(split, data.root), list_split(split, data.root)
    assert len(lines) == 4 and "train-00001-of-00003.parquet" in lines[1]
    three_files(tmp_path / "b")
    moved = replace(data, root=str(tmp_path / "b"))
    assert fingerprint(read_split(moved, "train"), moved.root) == first
    write(tmp_path / "b" / "train-00001-of-00003.parquet", images[:4], np.arange(4, 8) % 3)
    changed = fingerprint(read_split(moved, "train"), moved.root)
    assert changed["contents"] != first["contents"] and changed["labels"] == first["labels"]


UNFIT = {
    "no image": (dict(column="picture"), "has the columns picture, label", "must be image"),
    "words": (dict(labels=["a", "b"]), "label is string", "whole numbers"),
    "null": (dict(labels=[0, None]), "1 of its 2 labels are null"),
    "below 0": (dict(labels=[0, -2]), "labels go from -2 to 0"),
    "beyond": (dict(labels=[0, 3], names=NAMES), "labels go from 0 to 3", "below 3, the number of class names"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_file_is_named(tmp_path: Path, case: str) -> None:
    fields, *words = UNFIT[case]
    data = write(tmp_path / "train-0.parquet", pixels(2, 8, 8), **{"labels": [0, 1], **fields})
    refusal(lambda: open_source(data, "train"), str(tmp_path), *words)


def test_other_refusals(tmp_path: Path, monkeypatch) -> None:
    data, _ = three_files(tmp_path)
    refusal(lambda: open_source(data, "test"), "no test split", "test-*.parquet")
    refusal(lambda: open_source(replace(data, root=None), "train"), "--data.root")
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    refusal(lambda: open_source(data, "train"), "one of 3 files", "there are 2")
    images = pa.table({"image": pa.array([1, 2]), "label": pa.array([1, 2])})
    pq.write_table(images, tmp_path / "b-train.parquet")
    (tmp_path / "b").mkdir()
    pq.write_table(images, tmp_path / "b" / "train-0.parquet")
    refusal(lambda: open_source(replace(data, root=str(tmp_path / "b")), "train"), "image is int64", "binary")
    write(tmp_path / "c" / "train-0.parquet", pixels(2, 8, 8), [-1, -1])
    unlabelled = open_source(replace(data, root=str(tmp_path / "c")), "train")
    assert not unlabelled.labelled and "-1" in unlabelled.no_labels
    write(tmp_path / "c" / "train-1.parquet", pixels(2, 8, 8))
    refusal(lambda: open_source(replace(data, root=str(tmp_path / "c")), "train"), "train-1.parquet", "other labels")
    silo = DataConfig(partition="private", root=str(tmp_path / "c" / "train-{client}.parquet"))
    from fdiff.data import open_client_source

    refusal(lambda: open_client_source(silo, 0, "train"), "is a Parquet file", "a folder with train-*.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refusal(lambda: open_source(replace(data, root=str(tmp_path / "b")), "train"), "pip install 'fdiff[parquet]'")


def test_a_row_group_beyond_memory_is_refused_by_the_footer(tmp_path: Path, monkeypatch) -> None:
    data, _ = three_files(tmp_path)
    source = open_source(data, "train")
    monkeypatch.setattr("fdiff.data.parquet.free_memory", lambda device: 100)
    refusal(lambda: source.image(0), "train-00000-of-00003.parquet", "row group 0", "smaller row groups")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=8)), min_size=1, max_size=4), st.floats(0.5, 1))
def test_a_damaged_file_is_refused_in_one_line_or_read(tmp_path_factory, edits, kept) -> None:
    path = tmp_path_factory.mktemp("parquet") / "train-0.parquet"
    data = write(path, pixels(4, 8, 8), np.arange(4))
    raw = bytearray(path.read_bytes())
    for start, junk in edits:
        start %= len(raw)
        raw[start : start + len(junk)] = junk
    path.write_bytes(raw[: int(len(raw) * kept)] if kept < 0.6 else raw)
    try:
        source = open_source(data, "train")
        assert all_images(source).shape[1:] == (1, 8, 8)
    except UserError as error:
        assert str(path.parent) in str(error) and "\n" not in str(error)
