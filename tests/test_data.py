"""Sources of files made here, every refusal of a bad file, pixels against NumPy, shards in both places."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import runpy
import signal
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fdiff.config import DataConfig
from fdiff.data import Shard, Source, check_labels, normalise, open_client_source, open_source, shards
from fdiff.data.celeba import ATTRIBUTES, HAIR, IMAGES, PARTITION
from fdiff.data.fashion_mnist import DEBIAN_ROOT, EXCERPT, FILES, read_idx
from fdiff.data.images import prepare, read_image
from fdiff.errors import RunError, UserError

REPO = Path(__file__).parents[1]
CPU = torch.device("cpu")
needs_debian = pytest.mark.skipif(
    not DEBIAN_ROOT.is_dir(), reason="needs Debian's dataset-fashion-mnist: apt install dataset-fashion-mnist"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_idx(folder: Path, split: str, n: int, compress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A split of n images 28x28 with labels 0…9 in turn; returns both."""
    arrays = pixels(n, 28, 28, seed=n), (np.arange(n) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES[split], arrays, strict=True):
        raw = idx_bytes(array)
        (folder / f"{name}{'.gz' * compress}").write_bytes(gzip.compress(raw) if compress else raw)
    return arrays


def save(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def refusal(call, *words: str) -> str:
    """The one-line UserError of the call, which holds the words."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


def all_images(source: Source) -> np.ndarray:
    return source.images(range(len(source))).numpy()


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


@pytest.mark.parametrize(("limit", "n"), [(7, 7), (None, 2000), (5000, 2000)])
def test_limits_take_the_first_images_of_their_split(limit: int | None, n: int) -> None:
    whole, cut = open_source(DataConfig(), "train"), open_source(DataConfig(limit=limit), "train")
    np.testing.assert_array_equal(cut.labels, whole.labels[:n])
    np.testing.assert_array_equal(all_images(cut), all_images(whole)[:n])
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


@settings(max_examples=40, deadline=None)
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


# --- folder


def folder(root: Path, **fields: object) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **{"image_side": 8, **fields})


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
    refusal(lambda: open_client_source(config, 0, "test"), "site-0.h5", "no test split")
    refusal(lambda: open_source(config, "train"), "data.partition", "private")


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


# --- pixels


def numpy_area(image: np.ndarray, side: int) -> np.ndarray:
    """Means over rows (and columns) ⌊i·n/side⌋ up to ⌈(i + 1)·n/side⌉ of (n, n), rounded half to even."""
    n = len(image)
    spans = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    means = [[image[a:b, c:d].mean(dtype=np.float64) for c, d in spans] for a, b in spans]
    return np.rint(means).astype(np.uint8)


@pytest.mark.parametrize(("n", "side"), [(28, 16), (28, 14), (28, 27), (178, 64), (9, 4)])
def test_images_shrink_by_the_mean_of_areas(n: int, side: int) -> None:
    image = pixels(3, n, n)
    shrunk = prepare(torch.from_numpy(image)[None], side, 3)
    assert shrunk.dtype == torch.uint8
    for plane, expected in zip(shrunk[0].numpy(), image, strict=True):
        np.testing.assert_array_equal(plane, numpy_area(expected, side))


def test_the_embedded_images_shrink_by_area_however_many_there_are() -> None:
    whole, small = open_source(DataConfig(), "train"), open_source(DataConfig(image_side=16), "train")
    for i in (0, 1023, 1024, 1999):  # at the ends of the blocks in which they are resized
        np.testing.assert_array_equal(small.image(i)[0], numpy_area(whole.image(i)[0].numpy(), 16))


def test_images_grow_by_interpolation() -> None:
    ramp = np.tile(np.arange(0, 160, 20, dtype=np.uint8), (8, 1))
    grown = prepare(torch.from_numpy(ramp)[None, None], 16, 1)[0, 0].numpy()
    centres = (np.arange(16) + 0.5) / 2 - 0.5
    expected = np.rint(np.interp(centres, np.arange(8), ramp[0]))
    np.testing.assert_array_equal(grown, np.tile(expected, (16, 1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_a_flat_image_stays_flat(height: int, width: int, side: int, level: int) -> None:
    flat = torch.full((2, 1, height, width), level, dtype=torch.uint8)
    assert torch.equal(prepare(flat, side, 3), torch.full((2, 3, side, side), level, dtype=torch.uint8))


def test_the_largest_centred_square_is_kept() -> None:
    wide = torch.from_numpy(pixels(1, 1, 5, 11))
    assert torch.equal(prepare(wide, 5, 1), wide[..., 3:8])
    assert torch.equal(prepare(wide.mT, 5, 1), wide.mT[:, :, 3:8])


def test_colour_becomes_grey_as_pillow_does_it_and_grey_is_repeated() -> None:
    colour = pixels(64, 64, 3)
    grey = prepare(torch.from_numpy(colour).permute(2, 0, 1)[None], 64, 1)
    np.testing.assert_array_equal(grey[0, 0], np.asarray(Image.fromarray(colour).convert("L")))
    repeated = prepare(grey, 64, 3)
    assert all(torch.equal(repeated[:, c], grey[:, 0]) for c in range(3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_files_of_any_mode_are_read_like_arrays(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(pixels(12, 10, 3)).convert(mode)
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    wanted = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(12, 10, channels)[1:11]
    read = read_image(path, 10, channels)
    assert read.shape == (channels, 10, 10) and read.dtype == torch.uint8
    np.testing.assert_array_equal(read.permute(1, 2, 0), wanted)
    assert torch.equal(read_image(path, 5, channels), prepare(read[None], 5, channels)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_images_span_minus_one_to_one(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = normalise(levels, dtype)
    assert scaled.dtype == dtype and (scaled[0], scaled[-1]) == (-1, 1)
    torch.testing.assert_close(scaled, torch.linspace(-1, 1, 256, dtype=dtype))
    assert torch.equal(((scaled + 1) * 127.5).round().byte(), levels)
    assert levels[255] == 255  # the images themselves are kept


# --- shards


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Source:
    """30 image files in 3 classes."""
    root = tmp_path_factory.mktemp("files")
    for i in range(30):
        save(root / str(i % 3) / f"{i:02d}.png", pixels(10, 10, 3, seed=i))
    return open_source(folder(root, channels=3), "train")


def drawn(shard: Shard, order: torch.Tensor, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(shard.batches(order, batch_size))


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize(("in_memory", "workers"), [("always", 0), ("always", 2), ("never", 0), ("never", 2)])
def test_batches_are_the_same_wherever_the_images_are(files, kind: str, in_memory: str, workers: int) -> None:
    source = files if kind == "files" else open_source(DataConfig(test_limit=30), "test")
    indices = np.random.default_rng(3).permutation(30)[:23]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(4))
    shard = Shard(source, indices, CPU, in_memory=in_memory, workers=workers)
    assert shard.in_memory == (in_memory == "always") and len(shard) == 23
    np.testing.assert_array_equal(shard.labels, source.labels[indices])
    batches = drawn(shard, order, 5)
    assert [len(images) for images, _ in batches] == [5, 5, 5, 5, 3] == [len(labels) for _, labels in batches]
    wanted = indices[order.numpy()]
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([source.image(i) for i in wanted]))
    np.testing.assert_array_equal(labels, source.labels[wanted])


def test_more_images_than_are_brought_over_at_once_stay_in_order() -> None:
    source = open_source(DataConfig(), "test")
    assert len(source) > shards.FILL_BATCH
    (whole,) = drawn(Shard(source, np.arange(500)[::-1], CPU, in_memory="always"), torch.arange(500), 500)
    assert torch.equal(whole[0], source.images(range(500)).flip(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(["always", "never"]))
def test_an_epoch_holds_each_image_once(n: int, batch_size: int, seed: int, in_memory: str) -> None:
    source = open_source(DataConfig(test_limit=30), "test")
    shard = Shard(source, np.arange(n), CPU, in_memory=in_memory, workers=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    batches = drawn(shard, order, batch_size)
    assert [len(images) for images, _ in batches] == [len(part) for part in order.split(batch_size)]
    seen = torch.cat([images for images, _ in batches])
    assert torch.equal(seen[order.argsort()], source.images(range(n)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(files, workers: int) -> None:
    shard = Shard(files, np.arange(30), CPU, in_memory="never", workers=workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn(shard, torch.arange(30), 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_takes_half_of_the_free_memory(monkeypatch) -> None:
    source = open_source(DataConfig(test_limit=10), "test")
    for free, kept in ((2 * 10 * 784, True), (2 * 10 * 784 - 1, False)):
        monkeypatch.setattr(shards, "free_memory", lambda device, free=free: free)
        assert Shard(source, np.arange(10), CPU, in_memory="auto", workers=0).in_memory == kept


def test_the_hosts_free_memory_is_what_the_kernel_says() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free * 0.5 < shards.free_memory(CPU) <= pages


@pytest.mark.parametrize(("in_memory", "workers"), [("never", 0), ("never", 2), ("always", 2)])
def test_a_damaged_file_is_one_line_out_of_a_worker_too(tmp_path: Path, in_memory: str, workers: int) -> None:
    for i in range(6):
        save(tmp_path / f"{i}.png", pixels(8, 8))
    (tmp_path / "4.png").write_bytes(b"damaged")
    source = open_source(folder(tmp_path), "train")

    def epoch() -> None:
        drawn(Shard(source, np.arange(6), CPU, in_memory=in_memory, workers=workers), torch.arange(6), 2)

    refusal(epoch, str(tmp_path / "4.png"), "cannot be read as an image")


class Deadly:
    """A source that kills the process that reads it."""

    name, labels, shape, decodes = "deadly images", np.zeros(4, np.int64), (1, 8, 8), True

    def __init__(self) -> None:
        self.owner = os.getpid()

    def __len__(self) -> int:
        return 4

    def images(self, indices: np.ndarray) -> torch.Tensor:
        assert os.getpid() != self.owner
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_loader_process_that_dies_ends_the_run_with_a_line() -> None:
    shard = Shard(Deadly(), np.arange(4), CPU, in_memory="never", workers=1)
    with pytest.raises(RunError, match="loading deadly images failed: DataLoader worker") as raised:
        drawn(shard, torch.arange(4), 2)
    assert "\n" not in str(raised.value)


@needs_gpu
@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_batches_on_a_gpu_are_those_of_the_host(files, in_memory: str) -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    host = drawn(Shard(files, np.arange(30), CPU, in_memory="always", workers=0), order, 7)
    gpu = Shard(files, np.arange(30), torch.device("cuda"), in_memory=in_memory, workers=2)
    for (images, labels), (wanted, wanted_labels) in zip(drawn(gpu, order, 7), host, strict=True):
        assert images.is_cuda and labels.is_cuda
        assert torch.equal(images.cpu(), wanted) and torch.equal(labels.cpu(), wanted_labels)


@needs_gpu
def test_images_on_a_gpu_are_batched_without_waiting_for_it(files) -> None:
    batches = Shard(files, np.arange(30), torch.device("cuda"), in_memory="always").batches(torch.arange(30), 7)
    next(batches)  # the order has been brought over
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
