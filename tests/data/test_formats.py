"""The data sets with a name: files made here in their layouts, every refusal of a bad file, the real ones."""

from __future__ import annotations

import functools
import gzip
import hashlib
import runpy
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import (
    REPO,
    all_images,
    idx_bytes,
    needs_debian,
    pixels,
    refusal,
    save,
    write_idx,
)

from fdiff.config import DataConfig
from fdiff.data import open_source
from fdiff.data.celeba import ATTRIBUTES, HAIR, IMAGES, PARTITION
from fdiff.data.fashion_mnist import DEBIAN_ROOT, EXCERPT, FILES, read_idx

# --- embedded


@pytest.mark.parametrize(("split", "per_class"), [("train", 200), ("test", 50)])
def test_the_embedded_excerpt_has_its_images_of_each_class(split: str, per_class: int) -> None:
    source = open_source(DataConfig(), split)
    assert source.labels.dtype == np.int64
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    assert len(source) == 10 * per_class
    assert source.image(0).shape == (1, 28, 28) and source.image(0).dtype == torch.uint8


@needs_debian
def test_the_excerpt_is_what_its_tool_makes() -> None:
    made = runpy.run_path(str(REPO / "tests" / "tools" / "make_excerpt.py"))["excerpt"](DEBIAN_ROOT)
    with np.load(REPO / "fdiff" / "assets" / EXCERPT, allow_pickle=False) as shipped:
        assert set(shipped.files) == set(made)
        for name in made:
            assert shipped[name].dtype == made[name].dtype
            np.testing.assert_array_equal(shipped[name], made[name])


@pytest.mark.parametrize(("limit", "n"), [(7, 7), (100, 100), (None, 2000), (5000, 2000)])
def test_limits_take_a_sample_of_their_split_in_its_order(limit: int | None, n: int) -> None:
    whole, cut = open_source(DataConfig(), "train"), open_source(DataConfig(limit=limit), "train")
    place = {image.tobytes(): i for i, image in enumerate(all_images(whole))}
    rows = [place[image.tobytes()] for image in all_images(cut)]
    assert len(rows) == n and rows == sorted(set(rows))
    np.testing.assert_array_equal(cut.labels, whole.labels[rows])
    again, other = (open_source(DataConfig(limit=limit, seed=seed), "train") for seed in (2023, 1))
    np.testing.assert_array_equal(all_images(again), all_images(cut))
    assert np.array_equal(all_images(other), all_images(cut)) == (n == 2000)
    assert n < 10 or len(set(cut.labels)) == 10
    assert len(open_source(DataConfig(limit=limit, test_limit=3), "test")) == 3
    assert len(open_source(DataConfig(limit=3), "test")) == 500


# --- Fashion-MNIST


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_read_from_plain_gzipped_and_torchvision_files(
    tmp_path: Path, split: str, below: str, compress: bool
) -> None:
    images, labels = write_idx(tmp_path / below, split, 23, compress)
    source = open_source(DataConfig(dataset="fashion-mnist", root=str(tmp_path)), split)
    np.testing.assert_array_equal(all_images(source), images[:, None])
    np.testing.assert_array_equal(source.labels, labels)
    assert split in source.name and str(tmp_path) in source.name


def test_without_a_root_the_folder_data_is_tried(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fdiff.data.fashion_mnist.DEBIAN_ROOT", tmp_path / "no-such")
    config = DataConfig(dataset="fashion-mnist")
    refusal(lambda: open_source(config, "train"), "no-such", "data/FashionMNIST/raw")
    write_idx(tmp_path / "data/FashionMNIST/raw", "train", 4)
    assert len(open_source(config, "train")) == 4


@needs_debian
def test_debians_files_are_the_whole_set() -> None:
    source = open_source(DataConfig(dataset="fashion-mnist", root=str(DEBIAN_ROOT)), "test")
    assert np.bincount(source.labels).tolist() == [1000] * 10


def test_a_root_without_fashion_mnist_says_where_it_looked_and_how_to_get_it(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 5)
    (tmp_path / FILES["train"][1]).unlink()
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path))
    words = (str(tmp_path / "FashionMNIST/raw"), *FILES["train"], "apt install", "--data.download true")
    refusal(lambda: open_source(config, "train"), f"in {tmp_path} or", *words)


def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: nobody listens
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path), download=True)
    refusal(lambda: open_source(config, "train"), "data.download", str(tmp_path), "apt install")
    assert list((tmp_path / "FashionMNIST/raw").iterdir()) == []


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that has the files of tmp_path/mirror."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_download_is_fetched_whole_and_checked(tmp_path: Path, mirror: str, monkeypatch) -> None:
    from torchvision.datasets import FashionMNIST

    images, _ = write_idx(tmp_path / "mirror", "train", 6, compress=True)
    resources = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in (tmp_path / "mirror").iterdir()]
    monkeypatch.setattr(FashionMNIST, "mirrors", [mirror])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path / "root"), download=True)
    np.testing.assert_array_equal(all_images(open_source(config, "train")), images[:, None])
    assert len(list((tmp_path / "root/FashionMNIST/raw").iterdir())) == 2
    monkeypatch.setattr(FashionMNIST, "resources", [(name, "0" * 32) for name, _ in resources])
    elsewhere = DataConfig(dataset="fashion-mnist", root=str(tmp_path / "other"), download=True)
    refusal(lambda: open_source(elsewhere, "train"), "data.download", "corrupted")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], ("0x00000d03", "0x00000803")),
        (lambda raw: raw[:3], ("0x000008,", "0x00000803")),
        (lambda raw: raw[:9], ("begins with",)),
        (lambda raw: raw[:-1], ("6x28x28", "holds 4703")),
        (lambda raw: raw + b"\x00", ("6x28x28", "holds 4705")),
        (lambda raw: gzip.compress(raw)[:-20], ("cannot be read",)),
        (lambda raw: gzip.compress(raw)[:200] + b"\xff" * 50 + gzip.compress(raw)[250:], ("cannot be read",)),
        (lambda raw: idx_bytes(pixels(5, 28, 28)), ("6 labels for 5 images",)),
        (lambda raw: idx_bytes(pixels(0, 28, 28)), ("holds no images",)),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage, words: tuple[str, ...]) -> None:
    write_idx(tmp_path, "train", 6)
    path = tmp_path / FILES["train"][0]
    path.write_bytes(damage(path.read_bytes()))
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path))
    refusal(lambda: open_source(config, "train"), path.name, "again", *words)


def test_a_label_that_fashion_mnist_has_not_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "test", 6)
    path = tmp_path / FILES["test"][1]
    path.write_bytes(idx_bytes(np.array([0, 1, 2, 10, 4, 5], np.uint8)))
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path))
    refusal(lambda: open_source(config, "test"), str(path), "label 10")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.booleans())
def test_any_idx_array_comes_back(tmp_path_factory, shape: list[int], compress: bool) -> None:
    array, path = pixels(*shape), tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    back = read_idx(path, dims=len(shape))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == np.uint8 and back.flags.writeable


# --- CelebA

PEOPLE = [  # partition, attributes set, class (None: left out)
    (0, "Male Young Black_Hair", 0),
    (0, "Young Gray_Hair Blond_Hair", 10),
    (1, "Young Black_Hair", 8),
    (0, "Male Young", None),
    (2, "Male Gray_Hair", 7),
    (0, "Brown_Hair Blond_Hair", 13),
    (2, "Bald", None),
    (2, "Gray_Hair", 15),
]


def write_celeba(folder: Path) -> None:
    columns = ("Bald", "Gray_Hair", "Young", "Black_Hair", "Male", "Brown_Hair", "Blond_Hair")
    names = [f"{i + 1:06d}.jpg" for i in range(len(PEOPLE))]
    for i, name in enumerate(names):
        face = np.full((218, 178, 3), 30 * i, np.uint8)
        face[:20], face[198:] = 255, 255  # what the centre crop of 178 takes off, and no more
        save(folder / IMAGES / name, face, quality=100, subsampling=0)
    (folder / PARTITION).write_text("".join(f"{n} {p}\n" for n, (p, _, _) in zip(names, PEOPLE, strict=True)))
    rows = [
        f"{n}  " + "  ".join("1" if c in has.split() else "-1" for c in columns)
        for n, (_, has, _) in zip(names, PEOPLE, strict=True)
    ]
    (folder / ATTRIBUTES).write_text("\n".join([str(len(names)), " ".join(columns), *rows, ""]))


def celeba(root: Path) -> DataConfig:
    return DataConfig(dataset="celeba", root=str(root), image_side=64, channels=3)


@pytest.mark.parametrize("below", [".", "celeba"])
@pytest.mark.parametrize(("split", "code"), [("train", 0), ("test", 2)])
def test_celeba_has_the_papers_classes_and_crop(tmp_path: Path, split: str, code: int, below: str) -> None:
    write_celeba(tmp_path / below)
    source = open_source(celeba(tmp_path), split)
    kept = [(i, c) for i, (p, _, c) in enumerate(PEOPLE) if p == code and c is not None]
    assert source.labels.tolist() == [c for _, c in kept]
    images = all_images(source)
    assert images.shape == (len(kept), 3, 64, 64)
    for image, (i, _) in zip(images, kept, strict=True):
        levels = image[:, 3:-3].astype(int)
        assert abs(levels - 30 * i).max() <= 2  # JPEG
        assert abs(image[:, 0].astype(int) - 30 * i).max() < 60  # ringing of the bar beyond it


def test_celeba_has_sixteen_classes(tmp_path: Path) -> None:
    from fdiff.data.celeba import _class

    classes = [
        _class({"Male": male, "Young": young, **{c: c == colour for c in HAIR}})
        for male in (True, False) for young in (True, False) for colour in HAIR
    ]  # fmt: skip
    assert classes == list(range(16))


@pytest.mark.parametrize("gone", [IMAGES, ATTRIBUTES, PARTITION])
def test_a_root_without_part_of_celeba_names_it(tmp_path: Path, gone: str) -> None:
    write_celeba(tmp_path / "celeba")
    (tmp_path / "celeba" / gone).rename(tmp_path / "away")
    words = (str(tmp_path / "celeba"), f"lacks {gone} of", "get it from")
    refusal(lambda: open_source(celeba(tmp_path), "train"), *words)


def test_a_root_without_celeba_says_where_it_looked(tmp_path: Path) -> None:
    refusal(lambda: open_source(celeba(tmp_path), "train"), f"{tmp_path} or {tmp_path / 'celeba'}", IMAGES)
    refusal(lambda: open_source(DataConfig(dataset="celeba"), "train"), "data.root", "celeba")


@pytest.mark.parametrize(
    ("file", "line", "text", "words"),
    [
        (PARTITION, 0, "000001.jpg 3", ("line 1", "0, 1 or 2")),
        (PARTITION, 3, "000004.jpg", ("line 4",)),
        (ATTRIBUTES, 1, "Bald Young Black_Hair Male Brown_Hair Blond_Hair", ("line 2", "Gray_Hair")),
        (ATTRIBUTES, 4, "000003.jpg 1 -1", ("line 5", "7 times 1 or -1")),
        (ATTRIBUTES, 5, "000004.jpg 1 -1 1 1 1 1 0", ("line 6",)),
    ],
)
def test_a_damaged_celeba_list_is_named_with_its_line(tmp_path, file, line, text, words) -> None:
    write_celeba(tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    lines[line] = text
    (tmp_path / file).write_text("\n".join(lines))
    refusal(lambda: open_source(celeba(tmp_path), "train"), str(tmp_path / file), *words)


def test_celeba_images_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    (tmp_path / IMAGES / "000006.jpg").unlink()
    refusal(lambda: open_source(celeba(tmp_path), "train"), str(tmp_path / IMAGES), "000006.jpg", "1 of 3")
    assert len(open_source(celeba(tmp_path), "test")) == 2
    face = tmp_path / IMAGES / "000005.jpg"
    face.write_bytes(face.read_bytes()[:500])
    source = open_source(celeba(tmp_path), "test")
    refusal(lambda: source.image(0), str(face), "cannot be read as an image")


# --- CIFAR-10


def write_cifar(folder: Path, label: int = 9) -> np.ndarray:
    """Two records in each file; returns the training images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = pixels(12, 3, 32, 32)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = [bytes([j if j else label]) + images[2 * i + j].tobytes() for j in range(2)]
        (folder / name).write_bytes(b"".join(records))
    return images[:10]


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin"])
def test_cifar10_is_read_from_its_binary_version(tmp_path: Path, below: str) -> None:
    images = write_cifar(tmp_path / below)
    config = DataConfig(dataset="cifar10", root=str(tmp_path), image_side=32, channels=3)
    source = open_source(config, "train")
    np.testing.assert_array_equal(all_images(source), images)
    assert source.labels.tolist() == [9, 1] * 5
    assert len(open_source(config, "test")) == 2


def test_cifar10_refusals(tmp_path: Path) -> None:
    config = DataConfig(dataset="cifar10", root=str(tmp_path))
    refusal(
        lambda: open_source(config, "test"),
        "test_batch.bin",
        str(tmp_path / "cifar-10-batches-bin"),
        "https://",
    )
    (tmp_path / "cifar-10-batches-py").mkdir()
    refusal(lambda: open_source(config, "test"), "pickles", "cifar-10-binary.tar.gz")
    write_cifar(tmp_path, label=10)
    refusal(lambda: open_source(config, "test"), "test_batch.bin", "label 10")
    batch = tmp_path / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    write_cifar(tmp_path / "cifar-10-batches-bin")
    batch = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    nested = DataConfig(dataset="cifar10", root=str(tmp_path / "cifar-10-batches-bin"))
    refusal(lambda: open_source(nested, "train"), str(batch), "6145 bytes")
    refusal(lambda: open_source(DataConfig(dataset="cifar10"), "test"), "data.root", "https://")
