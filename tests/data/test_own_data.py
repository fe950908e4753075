"""What users bring: folders of images, and silos of which each client opens its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from small_datasets import (
    REPO,
    all_images,
    folder,
    pixels,
    refusal,
    save,
)

from fdiff.config import DataConfig
from fdiff.data import check_labels, open_client_source, open_source, split_source
from fdiff.data.hdf5 import read_hdf5
from fdiff.errors import Interrupted, RunError
from fdiff.runtime import heeding_signals

# --- folder


def test_a_folder_of_images_is_one_class(tmp_path: Path) -> None:
    for i, name in enumerate(["b.PNG", "a.bmp", "c.webp", ".hidden.png"]):
        options = {"lossless": True} if name == "c.webp" else {}
        save(tmp_path / name, np.full((8, 8, 3), 50 * i, np.uint8), **options)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(folder(tmp_path), "train")
    assert source.labels.tolist() == [0, 0, 0] and source.labels.dtype == np.int64 and not source.labelled
    assert all_images(source)[:, 0, 0, 0].tolist() == [50, 0, 100]  # a, b, c
    refusal(lambda: open_source(folder(tmp_path), "test"), "no test split", str(tmp_path / "test"))


def labels_of(root: Path, split: str = "train") -> list[int]:
    return open_source(folder(root, channels=1), split).labels.tolist()


def test_classes_are_the_subfolders_with_images_of_both_splits(tmp_path: Path) -> None:
    for name in ("train/cat/1", "train/ant/z/2", "train/ant/.h/3", "test/dog/1", "test/cat/2"):
        save(tmp_path / f"{name}.png", pixels(8, 8))
    (tmp_path / "train" / "bee").mkdir()
    for leftover in ("__MACOSX", "lost+found", "@eaDir"):
        save(tmp_path / "train" / leftover / "1.png", pixels(8, 8))
    assert (labels_of(tmp_path), labels_of(tmp_path, "test")) == ([0, 1], [1, 2])
    (tmp_path / "train").rename(tmp_path / ".train")
    refusal(lambda: labels_of(tmp_path), "no train split", str(tmp_path / "train"))


def test_links_are_followed_and_a_loop_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "store" / "x.png", pixels(8, 8))
    (tmp_path / "root" / "cat").mkdir(parents=True)
    (tmp_path / "root" / "cat" / "1.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "store")
    assert labels_of(tmp_path / "root") == [0, 1]
    (tmp_path / "store" / "again").symlink_to(tmp_path / "store")
    refusal(lambda: labels_of(tmp_path / "root"), "again", "link to a folder that it lies in")


def test_classes_are_the_same_however_their_names_are_encoded(tmp_path: Path) -> None:
    for name in ("train/a\u0301bc", "train/\u00e1bc", "train/b", "test/\u00e1bc"):  # NFD, then NFC
        save(tmp_path / name / f"{len(name)}.png", pixels(8, 8))
    assert (labels_of(tmp_path), labels_of(tmp_path, "test")) == ([0, 1, 1], [1])
    save(tmp_path / "test" / "B" / "1.png", pixels(8, 8))
    refusal(lambda: labels_of(tmp_path), "B and b differ in case only", "alike")


@pytest.mark.parametrize("train", ["Train", "training", "TRAIN"])
@pytest.mark.parametrize("test", ["Test", "testing", "VAL", "valid", "Validation"])
def test_splits_may_be_called_otherwise(tmp_path: Path, train: str, test: str) -> None:
    save(tmp_path / train / "cat" / "1.png", pixels(8, 8))
    save(tmp_path / test / "dog" / "1.png", pixels(8, 8))
    assert (labels_of(tmp_path), labels_of(tmp_path, "test")) == ([0], [1])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("seg_train", "seg_test"), ("looks like a split", "train and test")),
        (("trainA", "trainB"), ("looks like a split",)),
        (("val2017", "b"), ("looks like a split",)),
        (("train", "Train"), ("both", "one train split")),
        (("train", "training"), ("both",)),
        (("Test", "test", "train"), ("both", "one test split")),
        (("airplane", "train", "truck"), ("train, which is a split, beside",)),
        (("airplane", "test"), ("test, which is a split, beside airplane",)),
    ],
)
def test_folders_that_may_be_a_split_or_a_class_are_refused(tmp_path: Path, names, words) -> None:
    for name in names:
        save(tmp_path / name / "cat" / "1.png", pixels(8, 8))
    refusal(lambda: labels_of(tmp_path), str(tmp_path), *words)


def test_validation_images_beside_test_images_are_left_out(tmp_path: Path, caplog) -> None:
    for i, name in enumerate(("train", "val", "test", "unlabelled")):
        save(tmp_path / name / f"{i}.png", np.full((8, 8), 10 * i, np.uint8))
    assert all_images(open_source(folder(tmp_path), "test"))[0, 0, 0, 0] == 20
    assert "left out: unlabelled" in caplog.text


def test_a_tower_of_folders_is_read(tmp_path: Path) -> None:
    deep = top = tmp_path / "top"
    try:
        for _ in range(1500):  # more than Python would call itself
            os.mkdir(deep)
            deep = deep / "d"
        Image.fromarray(pixels(8, 8)).save(deep.parent / "1.png")
        assert labels_of(top) == [0]
    finally:
        subprocess.run(["rm", "-rf", str(top)], check=True)  # Python's own removal is recursive


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
    refusal(lambda: source.image(0), str(path), "16 bits a channel" if damage == "16-bit" else "cannot be read")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)")
def test_what_this_user_may_not_read_is_named(tmp_path: Path) -> None:
    """As a user without root's right to read everything."""
    for name in ("a/cat/1", "a/dog/1", "b/c/1"):
        save(tmp_path / f"{name}.png", pixels(8, 8))
    (tmp_path / "b" / "c" / "1.png").chmod(0)
    (tmp_path / "a" / "dog").chmod(0)
    (tmp_path / "no").mkdir(mode=0)
    look = """
import sys
from fdiff.config import DataConfig
from fdiff.data import open_source, open_client_source
for config in (DataConfig(dataset="folder", root="a"), DataConfig(dataset="folder", root="b"),
               DataConfig(partition="private", root="no/{client}")):
    try:
        open_source(config, "train") if config.dataset == "folder" else open_client_source(config, 0, "train")
    except Exception as error:
        print(type(error).__name__, error)
"""
    caps = "-dac_override,-dac_read_search"
    command = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", sys.executable, "-c", look]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 3 and all(line.startswith("UserError") and "Permission denied" in line for line in said), said
    assert [name for name, line in zip(("a/dog", "b/c/1.png", "no/0"), said, strict=True) if name not in line] == []


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
    refusal(lambda: open_client_source(config, 1, "test"), "test_labels is int64 (3,)", "(2,)", "(2, 8, 8)")


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
        ({"images": pixels(2, 5, 8, 8)}, ("(2, 5, 8, 8)", "not clear", "--data.axes")),
        ({"images": pixels(2, 17, 20, 20)}, ("(2, 17, 20, 20)", "C 1 to 16", "--data.axes")),
        ({"images": pixels(10, 3, 4, 3)}, ("(10, 3, 4, 3)", "not clear", "--data.axes")),
        ({"images": pixels(28, 28, 1000)}, ("not clear", "--data.axes, e.g. HWN")),
        ({"images": pixels(8, 8, 5), "labels": np.arange(5)}, ("(8, 8, 5), and there are 5 labels", "--data.axes")),
        ({"images": pixels(2, 8, 8), "labels": np.arange(4).reshape(2, 2)}, ("labels is int64 (2, 2)",)),
        ({"images": pixels(2, 8, 8), "labels": np.array([0.5, 1])}, ("fractions", "whole numbers")),
        ({"images": pixels(2, 8, 8), "labels": np.array([np.nan, 1])}, ("whole numbers",)),
        ({"images": pixels(2, 8, 8), "labels": np.array([b"cat", b"dog"])}, ("labels is", "whole numbers")),
        ({"images": pixels(0, 8, 8)}, ("not empty",)),
        ({"images": pixels(2, 8, 8), "labels": np.arange(3)}, ("labels is int64 (3,)", "(2,)")),
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


@pytest.mark.parametrize(
    ("shape", "axes", "order"),
    [
        ((5, 8, 9), None, (0, 1, 2)),
        ((5, 8, 9, 3), None, (0, 3, 1, 2)),
        ((5, 3, 8, 9), None, (0, 1, 2, 3)),
        ((8, 9, 5), "HWN", (2, 0, 1)),
        ((8, 9, 3, 5), "HWCN", (3, 2, 0, 1)),
        ((1, 5, 8, 9), "CNHW", (1, 0, 2, 3)),
    ],
)
def test_axes_are_inferred_or_given(tmp_path: Path, shape, axes, order) -> None:
    images = pixels(*shape)
    write_hdf5(tmp_path / "c0.h5", images=images, labels=np.arange(5.0)[:, None])
    found = read_hdf5(tmp_path / "c0.h5", "train", DataConfig(axes=axes))
    expected = images.transpose(order)
    np.testing.assert_array_equal(found.images.load(), expected if expected.ndim == 4 else expected[:, None])
    assert found.labels.tolist() == [0, 1, 2, 3, 4] and found.labels.dtype == np.int64


@pytest.mark.parametrize("shape", [(8, 9, 5), (8, 9, 3, 5), (5, 8, 9), (5, 8, 9, 3)])
def test_a_matlab_file_is_read_as_matlab_shows_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """MATLAB 7.3 stores an array with its axes from the last to the first, and numbers as doubles."""
    images = pixels(*shape)
    with h5py.File(tmp_path / "c0.mat", "w", userblock_size=512) as file:
        for name, array, kind in (("images", images, b"uint8"), ("labels", np.arange(5.0)[:, None], b"double")):
            file[name] = array.T
            file[name].attrs["MATLAB_class"] = np.bytes_(kind)
    axes = ("HWN" if shape[0] == 8 else "NHW") if len(shape) == 3 else ("HWCN" if shape[0] == 8 else "NHWC")
    for given in (None, axes):
        found = read_hdf5(tmp_path / "c0.mat", "train", DataConfig(axes=given))
        expected = images.transpose([axes.index(a) for a in "NCHW" if a in axes])
        np.testing.assert_array_equal(found.images.load(), expected if expected.ndim == 4 else expected[:, None])
        assert found.labels.tolist() == [0, 1, 2, 3, 4]


def never_written(file: h5py.File) -> None:
    file.create_dataset("images", (4, 8, 8), "u1")


def some_chunks_missing(file: h5py.File) -> None:
    file.create_dataset("images", (40, 8, 8), "u1", chunks=(4, 8, 8))[:8] = pixels(8, 8, 8)


def labels_never_written(file: h5py.File) -> None:
    file["images"] = pixels(4, 8, 8)
    file.create_dataset("labels", (4,), "i8")


def source_gone(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 8, 8), "u1")
    layout[:] = h5py.VirtualSource("gone.h5", "images", (4, 8, 8))
    file.create_virtual_dataset("images", layout)


def source_without_dataset(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("source.h5"), "w") as source:
        source["other"] = pixels(4, 8, 8)
    layout = h5py.VirtualLayout((4, 8, 8), "u1")
    layout[:] = h5py.VirtualSource("source.h5", "images", (4, 8, 8))
    file.create_virtual_dataset("images", layout)


def source_never_written(file: h5py.File) -> None:
    never_written(file)
    file.move("images", "raw")
    layout = h5py.VirtualLayout((4, 8, 8), "u1")
    layout[:] = h5py.VirtualSource(file["raw"])
    file.create_virtual_dataset("images", layout)


def source_of_half(file: h5py.File) -> None:
    file["raw"] = pixels(2, 8, 8)
    layout = h5py.VirtualLayout((4, 8, 8), "u1")
    layout[:2] = h5py.VirtualSource(file["raw"])
    file.create_virtual_dataset("images", layout)


def external_file_gone(file: h5py.File) -> None:
    file.create_dataset("images", (4, 8, 8), "u1", external=[("gone.bin", 0, 256)])


def dangling_labels(file: h5py.File) -> None:
    file["images"], file["labels"] = pixels(4, 8, 8), h5py.SoftLink("/gone")


def labels_elsewhere(file: h5py.File) -> None:
    file["images"], file["labels"] = pixels(4, 8, 8), h5py.ExternalLink("gone.h5", "/labels")


def loop_of_links(file: h5py.File) -> None:
    file["images"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/images")


def vast_and_empty(file: h5py.File) -> None:
    file.create_dataset("images", (500_000_000, 32, 32), "u1", chunks=(4, 32, 32))


def unknown_filter(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4, 8, 8))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple((4, 8, 8))
    h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (never_written, ("never written",)),
        (some_chunks_missing, ("2 of its 10 chunks",)),
        (labels_never_written, ("labels was never written",)),
        (source_gone, ("gone.h5", "not there")),
        (source_without_dataset, ("source.h5", "no dataset images")),
        (source_never_written, ("raw was never written",)),
        (source_of_half, ("128 of its 256 values",)),
        (external_file_gone, ("gone.bin", "not there")),
        (dangling_labels, ("labels is a link", "/gone")),
        (labels_elsewhere, ("labels is a link", "gone.h5")),
        (loop_of_links, ("cannot be read as HDF5",)),
        (vast_and_empty, ("0 of its 125000000 chunks",)),
        (unknown_filter, ("(32015)", "pip install hdf5plugin")),
    ],
)
def test_what_would_read_as_zeros_or_end_the_library_is_refused(tmp_path: Path, write, words: tuple[str, ...]) -> None:
    with h5py.File(tmp_path / "c0.h5", "w") as file:
        write(file)
    refusal(lambda: open_client_source(private(tmp_path / "c{client}.h5"), 0, "train"), str(tmp_path / "c0.h5"), *words)


def test_a_virtual_dataset_whose_sources_are_there_is_read(tmp_path: Path) -> None:
    images = pixels(4, 8, 8)
    write_hdf5(tmp_path / "source.h5", images=images)
    with h5py.File(tmp_path / "c0.h5", "w") as file:
        layout = h5py.VirtualLayout((8, 8, 8), "u1")
        layout[:4] = h5py.VirtualSource("source.h5", "images", (4, 8, 8))
        layout[4:] = h5py.VirtualSource(str(tmp_path / "source.h5"), "images", (4, 8, 8))
        file.create_virtual_dataset("images", layout)
    found = read_hdf5(tmp_path / "c0.h5", "train", DataConfig()).images
    np.testing.assert_array_equal(found.load()[:, 0], np.concatenate([images, images]))


def test_a_reader_that_a_file_kills_is_named(tmp_path: Path, monkeypatch) -> None:
    write_hdf5(tmp_path / "c0.h5", images=pixels(4, 8, 8))
    deadly = tmp_path / "reader.py"
    deadly.write_text("import os, signal\nprint('{', end='', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr("fdiff.data.hdf5_reader.__file__", str(deadly))
    words = (str(tmp_path / "c0.h5"), "SIGSEGV", "replace it")
    refusal(lambda: read_hdf5(tmp_path / "c0.h5", "train", DataConfig()), *words)


def test_a_reader_that_stands_still_is_given_up(tmp_path: Path, monkeypatch) -> None:
    still = tmp_path / "reader.py"
    still.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr("fdiff.data.hdf5_reader.__file__", str(still))
    monkeypatch.setattr("fdiff.data.hdf5_process.TICK_S", 0.05)
    with heeding_signals() as stop, pytest.raises(Interrupted):
        stop.note(signal.SIGTERM, None)
        read_hdf5(tmp_path / "c0.h5", "train", DataConfig())
    monkeypatch.setattr("fdiff.data.hdf5_process.PATIENCE_S", 0.2)
    with pytest.raises(RunError, match="nothing for 0.2 s"):
        read_hdf5(tmp_path / "c0.h5", "train", DataConfig())


def test_labels_that_the_model_lacks_are_refused() -> None:
    source = open_source(DataConfig(), "test")
    check_labels(source, 0)
    check_labels(source, 10)
    refusal(lambda: check_labels(source, 9), "model.classes: 9", "label 9", "at least 10")


def test_a_conditional_model_and_label_skew_need_labels(tmp_path: Path) -> None:
    save(tmp_path / "1.png", pixels(8, 8))
    source = open_source(folder(tmp_path), "train")
    check_labels(source, 0)
    refusal(lambda: check_labels(source, 1), "model.classes", str(tmp_path), "no labels", "--model.classes 0")
    refusal(lambda: split_source(source, folder(tmp_path, partition="label-skew"), 1), "label-skew needs labels")
    refusal(lambda: split_source(source, folder(tmp_path, partition="label-count"), 1), "label-count needs labels")
