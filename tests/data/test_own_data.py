"""What users bring: folders of images, and silos of which each client opens its own."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from small_datasets import (
    all_images,
    folder,
    pixels,
    refusal,
    save,
)

from fdiff.config import DataConfig
from fdiff.data import check_labels, open_client_source, open_source

# --- folder


def test_a_folder_of_images_is_one_class(tmp_path: Path) -> None:
    for i, name in enumerate(["b.PNG", "a.bmp", "c.webp", ".hidden.png"]):
        options = {"lossless": True} if name == "c.webp" else {}
        save(tmp_path / name, np.full((8, 8, 3), 50 * i, np.uint8), **options)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(folder(tmp_path), "train")
    assert source.labels.tolist() == [0, 0, 0] and source.labels.dtype == np.int64
    assert all_images(source)[:, 0, 0, 0].tolist() == [50, 0, 100]  # a, b, c
    refusal(lambda: open_source(folder(tmp_path), "test"), "no test split", str(tmp_path / "test"))


def test_classes_are_the_subfolders_of_both_splits(tmp_path: Path) -> None:
    for name in ("train/cat/1", "train/ant/z/2", "train/ant/.h/3", "test/dog/1", "test/cat/2"):
        save(tmp_path / f"{name}.png", pixels(8, 8))
    assert open_source(folder(tmp_path), "train").labels.tolist() == [0, 1]
    assert open_source(folder(tmp_path), "test").labels.tolist() == [1, 2]
    (tmp_path / "train" / "bee").mkdir()  # a silo without bees numbers the others like one that has some
    assert open_source(folder(tmp_path), "train").labels.tolist() == [0, 2]
    (tmp_path / "train").rename(tmp_path / ".train")
    refusal(lambda: open_source(folder(tmp_path), "train"), "no train split", str(tmp_path / "train"))


def test_folder_refusals(tmp_path: Path) -> None:
    refusal(lambda: open_source(DataConfig(dataset="folder"), "train"), "data.root", "--data.root")
    refusal(lambda: open_source(folder(tmp_path / "none"), "train"), "data.root", "none", "no folder")
    refusal(lambda: open_source(folder(tmp_path), "train"), str(tmp_path), "no images", ".png")
    save(tmp_path / "a.png", pixels(8, 8))
    save(tmp_path / "sub" / "b.png", pixels(8, 8))
    refusal(lambda: open_source(folder(tmp_path), "train"), "a.png", "subfolders")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "gone", "16-bit"])
def test_an_image_file_that_is_unfit_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.png"
    save(path, pixels(32, 32, 3))
    source = open_source(folder(tmp_path), "train")
    if damage == "gone":
        path.unlink()
    elif damage == "16-bit":
        save(path, np.full((8, 8), 40_000, np.uint16))
    else:
        raw = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"not an image", "cut": raw[:-400]}[damage])
    refusal(lambda: source.image(0), str(path), "more than 8 bits" if damage == "16-bit" else "cannot be read")


# --- private


def private(root: Path | str, **fields: object) -> DataConfig:
    return DataConfig(partition="private", root=str(root), **{"image_side": 8, **fields})


def write_hdf5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def test_a_private_client_opens_its_own_file(tmp_path: Path) -> None:
    for client in range(3):
        write_hdf5(tmp_path / f"site-{client}.h5", images=pixels(4 + client, 8, 8, seed=client))
    write_hdf5(tmp_path / "site-3.h5", images=pixels(2, 8, 8, 3), labels=np.array([5, 300], np.int16))
    config = private(tmp_path / "site-{client}.h5")
    for client in range(3):
        source = open_client_source(config, client, "train")
        np.testing.assert_array_equal(all_images(source)[:, 0], pixels(4 + client, 8, 8, seed=client))
        assert source.labels.tolist() == [0] * (4 + client)
    colour = open_client_source(private(tmp_path / "site-{client}.h5", channels=3, limit=1), 3, "train")
    np.testing.assert_array_equal(all_images(colour), pixels(2, 8, 8, 3).transpose(0, 3, 1, 2)[:1])
    assert colour.labels.tolist() == [5] and colour.labels.dtype == np.int64
    refusal(lambda: open_client_source(config, 4, "train"), "client 4", str(tmp_path / "site-4.h5"))
    refusal(lambda: open_client_source(config, 0, "test"), "site-0.h5", "no test split", "test_images")
    refusal(lambda: open_source(config, "train"), "data.partition", "private")


def test_an_hdf5_file_may_hold_test_images(tmp_path: Path) -> None:
    shown, hidden = pixels(3, 8, 8, seed=1), pixels(2, 8, 8, seed=2)
    write_hdf5(tmp_path / "0.h5", images=shown, labels=np.arange(3), test_images=hidden, test_labels=np.array([4, 5]))
    write_hdf5(tmp_path / "1.h5", images=shown, test_images=hidden, test_labels=np.arange(3))
    config = private(tmp_path / "{client}.h5")
    source = open_client_source(config, 0, "test")
    np.testing.assert_array_equal(all_images(source)[:, 0], hidden)
    assert source.labels.tolist() == [4, 5] and "test split" in source.name
    assert open_client_source(config, 0, "train").labels.tolist() == [0, 1, 2]
    refusal(lambda: open_client_source(config, 1, "test"), "test_labels is int64 (3,)", "(2,)", "2 images")


def test_a_private_client_opens_its_own_folder(tmp_path: Path) -> None:
    save(tmp_path / "0" / "train" / "a.png", pixels(8, 8, seed=1))
    save(tmp_path / "0" / "test" / "b.png", pixels(8, 8, seed=2))
    save(tmp_path / "1" / "c.png", pixels(8, 8, seed=3))
    config = private(tmp_path / "{client}")
    for client, split, seed in ((0, "train", 1), (0, "test", 2), (1, "train", 3)):
        np.testing.assert_array_equal(
            all_images(open_client_source(config, client, split))[0, 0], pixels(8, 8, seed=seed)
        )
    refusal(lambda: open_client_source(config, 1, "test"), str(tmp_path / "1"), "no test split")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": pixels(2, 8, 8)}, ("no dataset images",)),
        ({"images": pixels(2, 8, 8).astype(np.float32)}, ("float32", "uint8")),
        ({"images": pixels(2, 8)}, ("(2, 8)", "(n, H, W)")),
        ({"images": pixels(2, 3, 8, 8)}, ("(2, 3, 8, 8)", "C 1 or 3")),
        ({"images": pixels(0, 8, 8)}, ("not empty",)),
        ({"images": pixels(2, 8, 8), "labels": np.arange(3)}, ("labels is int64 (3,)", "(2,)")),
        ({"images": pixels(2, 8, 8), "labels": np.zeros(2)}, ("labels is float64", "whole numbers")),
        ({"images": pixels(2, 8, 8), "labels": np.array([-1, 3])}, ("from -1 to 3",)),
        ({"images": pixels(2, 8, 8), "labels": np.array([1, 2**63], np.uint64)}, ("9223372036854775808",)),
    ],
)
def test_an_unfit_hdf5_file_is_named(tmp_path: Path, arrays: dict, words: tuple[str, ...]) -> None:
    write_hdf5(tmp_path / "c0.h5", **arrays)
    config = private(tmp_path / "c{client}.h5")
    refusal(lambda: open_client_source(config, 0, "train"), str(tmp_path / "c0.h5"), *words)


def test_files_that_are_no_hdf5_are_named(tmp_path: Path) -> None:
    (tmp_path / "c0.h5").write_text("no HDF5")
    write_hdf5(tmp_path / "c1.h5", images=pixels(50, 8, 8))
    (tmp_path / "c1.h5").write_bytes((tmp_path / "c1.h5").read_bytes()[:-100])
    with h5py.File(tmp_path / "c2.h5", "w") as file:
        file["images"] = pixels(2, 8, 8)
        file.create_group("labels")
    config = private(tmp_path / "c{client}.h5")
    for client in range(3):
        refusal(lambda c=client: open_client_source(config, c, "train"), str(tmp_path / f"c{client}.h5"))


def test_labels_that_the_model_lacks_are_refused() -> None:
    source = open_source(DataConfig(), "test")
    check_labels(source, 0)
    check_labels(source, 10)
    refusal(lambda: check_labels(source, 9), "model.classes: 9", "label 9", "at least 10")
