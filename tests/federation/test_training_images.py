"""What all ranks find out about the images of a run, before there is a model; and whether they are the same."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from jobs import TINY, arrays, fdiff, on_ranks
from PIL import Image
from small_datasets import pixels, refusal, save

from fdiff import checkpoint
from fdiff.checkpoint.file import write_file
from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig
from fdiff.data import fingerprint, read_split
from fdiff.federation import infer_image_shape, open_data
from fdiff.presets import preset

SMALL = [word for i, word in enumerate(TINY) if not {"--data.image_side", "--data.limit"} & {word, TINY[i - 1]}]
ONE_ROUND = ["--federation.rounds", 1, "--federation.clients", 2, "--sample.every", 0]


def config(data: DataConfig, clients: int = 2, **model: object) -> Config:
    return Config(data=data, federation=FederationConfig(clients=clients), model=ModelConfig(dim_mults=(1, 2), **model))


def folder_of(root: Path, images: int, *shape: int, seed: int = 0) -> Path:
    for i in range(images):
        save(root / "train" / f"{i:02d}.png", pixels(*(shape or (12, 12, 3)), seed=seed + i))
    return root


def opened(data: DataConfig, **fields: object):
    return open_data(config(data, **fields), SoloCommunicator())


# --- side and channels ---------------------------------------------------------------------------------------------


def test_the_readmes_own_line_trains_what_is_in_the_folder(tmp_path: Path) -> None:
    """On two ranks, each of which looks at half of the files, with a colour image in one half only."""
    folder_of(tmp_path / "images", 12, 12, 12)
    save(tmp_path / "images" / "train" / "03.png", pixels(12, 12, 3))
    words = ["train", *SMALL, *ONE_ROUND, "--run.dir", "run", "--data.dataset", "folder", "--data.root", "images"]
    first, second = (done.check().err for done in on_ranks(2, *words, cwd=tmp_path))
    header = [line.split(":")[0] for line in first.splitlines()]
    assert header[:8] == ["run", "ranks", "data", "clients", "model", "method", "round", "memory"]
    assert "run: run, 1 round\nranks: 2 (2 × CPU, 1 threads on " in first and "clients: 2, each with 6 images" in first
    assert second == ""
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert (kept["image_side"], kept["channels"]) == (12, 3) and "changed" not in kept
    said = "".join(done.err for done in on_ranks(1, *words, "--resume", cwd=tmp_path))
    assert "12 training images of 12x12, RGB; the model sees 12x12 RGB" in said


def test_what_a_flag_or_a_preset_gives_is_given(tmp_path: Path) -> None:
    data = DataConfig(dataset="folder", root=str(folder_of(tmp_path, 3)))
    assert opened(replace(data, image_side=8, channels=1)).config.data.shape == (1, 8, 8)
    assert opened(replace(data, image_side=8)).config.data.shape == (3, 8, 8)
    assert opened(replace(data, channels=1)).config.data.shape == (1, 12, 12)
    shapes = {"fmnist": (1, 28, 28), "celeba": (3, 64, 64), "cifar10": (3, 32, 32), "mini": (1, 16, 16)}
    for name, shape in shapes.items():
        given = preset(name).data
        assert (given.channels, given.image_side, given.image_side) == shape == given.shape
    assert DataConfig(dataset="cifar10").shape == (3, 32, 32) and DataConfig().shape == (1, 28, 28)
    assert preset("folder").data.image_side is None


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(12, 12), (16, 12), (16, 16)], ("12x12 to 16x16", "no side in common", "--data.image_side 12")),
        ([(13, 13), (13, 15)], ("13x13 to 13x15", "halved evenly by the 2 stages")),
    ],
)
def test_a_side_that_not_all_share_is_asked_for(tmp_path: Path, shapes, words) -> None:
    for i, shape in enumerate(shapes):
        save(tmp_path / f"{i}.png", pixels(*shape))
    refusal(lambda: opened(DataConfig(dataset="folder", root=str(tmp_path))), "data.image_side", *words)


def test_plan_opens_images_only_to_infer_their_shape_and_names_the_flags(tmp_path: Path, monkeypatch) -> None:
    data = DataConfig(dataset="folder", root=str(folder_of(tmp_path / "images", 2)))
    assert infer_image_shape(config(data), SoloCommunicator()).data.shape == (3, 12, 12)
    monkeypatch.setattr("fdiff.federation.training_images.read_split", lambda *_: pytest.fail("images were opened"))
    given = replace(data, image_side=8, channels=3, root="/none")
    assert infer_image_shape(config(given), SoloCommunicator()).data == given
    done = fdiff("plan", "--preset", "folder", "--data.root", "none", cwd=tmp_path)
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert re.search("data.root: none .* or give --data.image_side and --data.channels", done.err)


# --- what is said once ---------------------------------------------------------------------------------------------


def test_what_is_not_taken_as_it_is_is_said_once_with_its_number(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / f"{i}.png", pixels(8, 8, 4))
    frames = [Image.fromarray(pixels(8, 8, seed=i)) for i in range(2)]
    frames[0].save(tmp_path / "5.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "6.png").write_bytes(b"")
    notes = opened(DataConfig(dataset="folder", root=str(tmp_path), on_bad_image="skip", background="black")).notes
    assert notes[:3] == [
        "folder, 6 training images of 8x8, RGB; the model sees 8x8 RGB",
        "5 images may be transparent; behind them is black",
        "1 images have several frames or pages; the first is taken",
    ]
    assert notes[3].startswith(f"1 image files are unfit and left out, e.g. {tmp_path / '6.png'}") and len(notes) == 4


def test_two_ranks_leave_out_the_same_images_or_refuse_in_one_line(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 9)
    (root / "train" / "04.png").write_bytes(b"no image")
    words = ["train", *SMALL, *ONE_ROUND, "--data.dataset", "folder", "--data.root", "images", "--run.dir"]
    refused = on_ranks(2, *words, "a", cwd=tmp_path)
    assert [done.status for done in refused] == [2, 2]
    (line,) = "".join(done.err for done in refused).splitlines()
    assert str(Path("images/train/04.png")) in line
    skipped = on_ranks(2, *words, "b", "--data.on_bad_image", "skip", cwd=tmp_path)
    assert [done.status for done in skipped] == [0, 0], skipped
    clients = json.loads((tmp_path / "b" / "setting.json").read_text())["clients"]
    assert [client["images"] for client in clients] == [4, 4]


# --- private silos -------------------------------------------------------------------------------------------------


def silo(root: Path, classes: dict[str, int], seed: int) -> None:
    for name, count in classes.items():
        for i in range(count):
            save(root / "train" / name / f"{i}.png", pixels(8, 8, seed=seed + i))


def test_silos_number_their_classes_alike_and_are_called_silos(tmp_path: Path) -> None:
    silo(tmp_path / "0", {"cat": 2, "ant": 1}, seed=1)
    silo(tmp_path / "1", {"dog": 1, "cat": 1}, seed=10)
    data = DataConfig(partition="private", root=f"{tmp_path}/{{client}}")
    found = opened(data)
    assert [source.labels.tolist() for source in found.sources] == [[0, 1, 1], [1, 2]]
    assert found.config.data.dataset == "silos" and found.config.run_dir.name.startswith("silos-full-private")
    (tmp_path / "1" / "train" / "dog").rename(tmp_path / "1" / "train" / "Cat")
    refusal(lambda: opened(data), "Cat and cat differ in case only")


def test_clients_with_the_same_images_are_named(tmp_path: Path) -> None:
    silo(tmp_path / "0", {"cat": 2}, seed=1)
    silo(tmp_path / "1", {"cat": 2}, seed=1)
    notes = opened(DataConfig(partition="private", root=f"{tmp_path}/{{client}}")).notes
    assert notes[1:] == ["clients 0 and 1 have the same images; is that meant?"]


def test_a_silo_with_a_misspelt_name_of_its_labels_is_no_class_0(tmp_path: Path) -> None:
    for client in range(2):
        with h5py.File(tmp_path / f"{client}.h5", "w") as file:
            file["images"], file["label"] = pixels(10, 8, 8, seed=client), np.arange(10)
    words = ["train", *SMALL, *ONE_ROUND, "--data.partition", "private", "--data.root", "{client}.h5"]
    done = fdiff(*words, "--model.classes", 10, cwd=tmp_path)
    assert done.status == 2 and re.search("model.classes: .*0.h5.* has no labels", done.err), done


# --- the same images after a stop ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, list[object]]:
    """A run of two silos, one a folder and one a file, after its first round; and the words that go on with it."""
    folder = tmp_path_factory.mktemp("stopped")
    silo(folder / "data" / "0", {"cat": 6}, seed=1)
    with h5py.File(folder / "data" / "1", "w") as file:
        file["images"] = pixels(6, 8, 8, seed=99)
    words = [*SMALL, *ONE_ROUND, "--data.partition", "private", "--data.root", "data/{client}", "--run.dir", "run"]
    fdiff("train", *words, cwd=folder).check()
    return folder, ["train", *words, "--federation.rounds", 2, "--resume"]


def replace_image(data: Path) -> None:
    """By another one of the same size in bytes."""
    path = data / "0" / "train" / "cat" / "3.png"
    size, raw = path.stat().st_size, path.read_bytes()
    path.write_bytes(raw[:-30] + bytes(18) + raw[-12:])
    assert path.stat().st_size == size


def rename_image(data: Path) -> None:
    (data / "0" / "train" / "cat" / "3.png").rename(data / "0" / "train" / "cat" / "3-.png")


def replace_row(data: Path) -> None:
    with h5py.File(data / "1", "a") as file:
        file["images"][2] = 7


def add_labels(data: Path) -> None:
    with h5py.File(data / "1", "a") as file:
        file["labels"] = np.arange(6)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [(rename_image, "names"), (replace_row, "contents"), (add_labels, "labels"), (replace_image, "contents")],
)
def test_other_images_are_told_by_their_fingerprint(stopped, tmp_path: Path, change, kinds: str) -> None:
    folder, _ = stopped
    os.system(f"cp -r {folder / 'data'} {tmp_path}")
    data = DataConfig(partition="private", root=f"{tmp_path}/data/{{client}}", image_side=8, channels=1)
    before = opened(data).fingerprints
    assert before == opened(replace(data, root=f"{folder}/data/{{client}}")).fingerprints  # times do not count
    change(tmp_path / "data")
    after = opened(replace(data, max_pixels=10**6, on_bad_image="stop")).fingerprints
    different = {kind for a, b in zip(before, after, strict=True) for kind in a if a[kind] != b[kind]}
    assert different == {kinds}


def test_a_run_goes_on_with_other_images_only_when_told_and_once(stopped) -> None:
    folder, words = stopped
    os.system(f"cp -r {folder / 'data'} {folder / 'kept'}")
    replace_row(folder / "data")
    done = fdiff(*words, cwd=folder)
    assert done.status == 2, done
    assert re.search("client 1's images have other contents than when .* --data.changed true", done.err), done.err
    moved = [word if word != "data/{client}" else "kept/{client}" for word in words]
    fdiff(*moved, cwd=folder).check()  # another place
    told = [*words, "--federation.rounds", 3]
    fdiff(*told, "--data.changed", "true", cwd=folder).check()
    assert arrays(folder / "run", 3) and "changed" not in (folder / "run" / "config.yaml").read_text()
    again = fdiff(*told, "--federation.rounds", 4, cwd=folder).check()  # these are its images now
    assert "run: run goes on with round 4 of 4\n" in again.err and "round 4/4" in again.err


def test_a_checkpoint_without_fingerprints_is_of_a_time_when_images_were_taken_otherwise(tmp_path: Path) -> None:
    words = ["train", *TINY, *ONE_ROUND, "--run.dir", "run"]
    fdiff(*words, cwd=tmp_path).check()
    folder = tmp_path / "run" / "checkpoints" / "round-000001"
    arrays_of, header, _ = checkpoint.read_generation(folder)
    del header["fingerprints"]
    write_file(folder / "global.h5", arrays_of, header)
    more = [*words, "--federation.rounds", 2, "--resume"]
    done = fdiff(*more, cwd=tmp_path)
    assert done.status == 2 and re.search("data.limit: .* of an older fdiff", done.err), done
    fdiff(*more, "--data.changed", "true", cwd=tmp_path).check()


def test_of_many_files_a_fixed_sample_stands_for_all(tmp_path: Path, monkeypatch) -> None:
    root = folder_of(tmp_path, 20)
    split = read_split(DataConfig(dataset="folder", root=str(root)), "train")
    monkeypatch.setattr("fdiff.data.listing.WHOLE", 5 * split.images[0].stat().st_size)
    whole, seen = fingerprint(split, str(root)), 0
    for path in split.images:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + b"\0")
        found = fingerprint(split, str(root))
        path.write_bytes(raw)
        assert {k for k in whole if whole[k] != found[k]} <= {"contents"}
        seen += found != whole
    assert 3 <= seen <= 6 and fingerprint(split, str(root)) == whole
