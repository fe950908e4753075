"""The feature extractors: how good the embedded one is, what it makes of odd shapes, and pytorch-fid's."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from jobs import TINY, fdiff
from torch import Tensor

from fdiff.comm import SoloCommunicator
from fdiff.commands import evaluate as command
from fdiff.commands import sample
from fdiff.config import DataConfig, RuntimeConfig
from fdiff.data import open_source
from fdiff.errors import UserError
from fdiff.evaluation import extractors as extractors
from fdiff.evaluation.extractors import (
    FMNIST_WEIGHTS,
    INCEPTION_FILE,
    InceptionFeatures,
    find_inception_weights,
    fmnist_metadata,
    load_extractor,
    to_extractor_input,
)
from fdiff.evaluation.metrics import Moments, moments_distance

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def images(n: int, channels: int = 1, side: int = 28) -> Tensor:
    return torch.randint(256, (n, channels, side, side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


# --- the embedded one


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.slow
def test_the_embedded_classifier_finds_91_of_100_test_labels():
    source = open_source(DataConfig(dataset="fashion-mnist", root=str(DEBIAN)), "test")
    found = load_extractor("fmnist-cnn").labels(source.images(np.arange(len(source))))
    accuracy = (found.numpy() == source.labels).mean()
    assert len(source) == 10_000
    assert accuracy >= 0.91
    assert accuracy == pytest.approx(float(fmnist_metadata()["test_accuracy"]), abs=5e-4)


def test_its_weights_are_small_and_its_distance_is_not_called_fid():
    assert FMNIST_WEIGHTS.stat().st_size <= 2**20
    extractor = load_extractor("fmnist-cnn")
    assert extractor.metric_name == "fd_fmnist"
    assert len(extractor.checksum) == 64


@pytest.mark.slow
def test_features_do_not_depend_on_how_images_are_dealt_out():
    extractor, batch = load_extractor("fmnist-cnn"), images(300)
    whole = extractor.features(batch)
    assert whole.shape == (300, extractor.feature_dim) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([extractor.features(part) for part in batch.split(7)]))
    assert extractor.features(batch[:0]).shape == (0, extractor.feature_dim)


@pytest.mark.parametrize("side", [16, 28, 56])
def test_images_of_another_side_are_resized_and_the_score_says_so(side):
    extractor = load_extractor("fmnist-cnn")
    flat = torch.full((2, 1, side, side), 51, dtype=torch.uint8)
    torch.testing.assert_close(to_extractor_input(flat), torch.full((2, 1, 28, 28), 0.2))
    assert extractor.describe(side).get("resized_from") == (None if side == 28 else side)
    assert extractor.features(images(3, side=side)).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 28, 30)])
def test_an_extractor_for_another_shape_is_refused(shape):
    with pytest.raises(UserError, match=f"--extractor: fmnist-cnn takes .* got {'x'.join(map(str, shape))}"):
        load_extractor("fmnist-cnn").check_shape(*shape)


def test_unknown_missing_and_unfit_weights_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--extractor: 'vgg' is unknown; choose from fmnist-cnn, inception"):
        load_extractor("vgg")
    with pytest.raises(UserError, match="--weights: .* is no file; give pt_inception"):
        load_extractor("inception", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="--weights: .*text.pth cannot be read as weights"):
        load_extractor("inception", tmp_path / "text.pth")
    with pytest.raises(UserError, match="holds no pytorch-fid InceptionV3"):
        load_extractor("inception", FMNIST_WEIGHTS)


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x02cos\nsystem\n(S'ls'\ntR."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_whatever_the_bytes_of_a_weights_file_make_its_reader_raise_names_the_file(tmp_path, content, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=f"--weights: .*weights{suffix} cannot be read as weights .*; give pt_"
    ) as raised:
        load_extractor("inception", file)
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)


def test_a_weights_file_damaged_anywhere_names_itself_or_is_read(tmp_path, recwarn):
    """Both of torch's formats; 40,000 of 145,000 damaged files once escaped as nine kinds of exception."""
    file, random = tmp_path / "weights.pth", np.random.RandomState(0)
    for new_format in (True, False):
        torch.save({"a": torch.zeros(3), "b": torch.ones(2, 3)}, file, _use_new_zipfile_serialization=new_format)
        whole, refused = np.frombuffer(file.read_bytes(), np.uint8), 0
        for _ in range(200):
            damaged = whole.copy()
            damaged[random.randint(len(whole), size=3)] = random.randint(256, size=3)
            file.write_bytes(damaged.tobytes())
            try:
                extractors._read_state(file)
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"--weights: {file} cannot be read as weights (")
        assert refused > 50
    assert not recwarn.list


@pytest.mark.parametrize(
    "state",
    [None, [], {}, 3, {"a": 1}, {1: torch.zeros(2)}, {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}],
    ids=str,
)
def test_weights_of_something_else_are_no_inception(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds no pytorch-fid InceptionV3"):
        load_extractor("inception", tmp_path / "weights.pth")


@pytest.mark.slow
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t.fill_(torch.nan)], ids=["other type", "NaN"])
def test_weights_that_torch_would_take_for_others_are_refused(random_weights, monkeypatch, change):
    state = torch.load(random_weights, weights_only=True)
    state["Mixed_7c.branch_pool.bn.bias"] = change(state["Mixed_7c.branch_pool.bn.bias"])
    monkeypatch.setattr(extractors, "_read_state", lambda path: state)
    with pytest.raises(UserError, match="holds no pytorch-fid InceptionV3 of finite float32"):
        load_extractor("inception", random_weights)


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("pytorch_fid.inception.FID_WEIGHTS_URL", "http://127.0.0.1:9/weights.pth")  # nobody listens
    with pytest.raises(UserError) as refused:
        load_extractor("inception")
    message = str(refused.value)
    assert "could not be downloaded" in message and "\n" not in message
    assert "or score greyscale images by --extractor fmnist-cnn" in message  # colour images it cannot help
    assert str(tmp_path / "checkpoints" / INCEPTION_FILE) in message


# --- pytorch-fid's, with random weights of its shape


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> Path:
    """A file of InceptionV3-shaped random weights, where torch hub's cache would have the real one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = InceptionFeatures().network
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.05, 0.2)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir()
    torch.save(network.state_dict(), path)
    return path


def their_features(batch: Tensor) -> Tensor:
    """pytorch-fid's features (n, 2048) of uint8 greyscale images, by the weights in torch hub's cache."""
    from pytorch_fid.inception import InceptionV3

    with torch.no_grad():
        return InceptionV3([3]).eval()(batch.expand(-1, 3, -1, -1) / 255)[0][..., 0, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_features_and_fid_are_pytorch_fids(random_weights, monkeypatch):
    from pytorch_fid.fid_score import calculate_frechet_distance

    monkeypatch.setattr(torch.hub, "_hub_dir", str(random_weights.parent.parent))
    assert find_inception_weights() == random_weights
    ours = load_extractor("inception")
    assert ours.metric_name == "fid"
    batch = images(12, side=16)
    features = ours.features(batch)
    expected = their_features(batch)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    chosen = features.double()[:, features.var(0).argsort(descending=True)[:4]]  # full rank with few images
    halves = chosen[:6], chosen[6:]
    moments = [(h.mean(0).numpy(), np.cov(h.numpy(), rowvar=False)) for h in halves]
    distance = calculate_frechet_distance(*moments[0], *moments[1])
    assert moments_distance(*(Moments.of(h) for h in halves)) == pytest.approx(float(distance), rel=1e-6, abs=1e-9)


@pytest.mark.rare  # the features and the distance are compared below
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_gives_pytorch_fids_distance(random_weights, monkeypatch, capsys, tmp_path):
    """End to end on a checkpoint: of the 2048 features those 8 that vary most, or it would take as many images."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    monkeypatch.setattr(torch.hub, "_hub_dir", str(random_weights.parent.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = ["--federation.rounds", 1, "--federation.clients", 1, "--sample.every", 0, "--data.test_limit", 12]
    fdiff("train", *TINY, *short, "--run.dir", "run", cwd=tmp_path).check()
    alone = (RuntimeConfig(threads=1), SoloCommunicator(), torch.device("cpu"))
    sample.run(Path("run"), *alone, out=Path("drawn.h5"), images=12)
    with h5py.File("drawn.h5") as file:
        fake = torch.from_numpy(file["images"][()]).permute(0, 3, 1, 2)
    real = open_source(DataConfig(image_side=8, test_limit=12), "test").images(range(12))
    features = [their_features(x).double() for x in (real, fake)]
    chosen = torch.cat(features).var(0).argsort(descending=True)[:8]
    moments = [(f[:, chosen].mean(0).numpy(), f[:, chosen].T.cov().numpy()) for f in features]
    expected = calculate_frechet_distance(*moments[0], *moments[1])

    whole = InceptionFeatures.forward
    monkeypatch.setattr(InceptionFeatures, "forward", lambda self, x: (whole(self, x)[0][:, chosen], None))
    monkeypatch.setattr(extractors, "INCEPTION_FEATURES", 8)
    command.run(Path("run"), *alone, extractor="inception", weights=random_weights, metrics="frechet,kid", json=True)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["extractor"], told["n"], told["n_real"]) == ("inception", 12, 12) and len(told["checksum"]) == 64
    (scores,) = told["scores"]
    assert scores["fid"] == pytest.approx(float(expected), rel=1e-3) and expected > 0
    assert "fd_fmnist" not in scores and "kid" in scores
