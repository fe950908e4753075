"""The scores' arithmetic: against references written another way, and on real images that noise makes worse."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from fdiff.errors import UserError
from fdiff.evaluation import metrics
from fdiff.evaluation.extractors import FMNIST_CLASSES, Extractor, load_extractor
from fdiff.evaluation.metrics import (
    Moments,
    class_coverage,
    density_coverage,
    frechet_distance,
    kid,
    label_histogram,
    moments_distance,
    precision_recall,
)

TESTS = Path(__file__).parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EXCERPT = TESTS.parent / "fdiff" / "assets" / "fashion_mnist_excerpt.npz"
NOISE = (0, 16, 32, 64, 128)  # deviations in grey levels of 0..255


def normal(n: int, dim: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, scale, (n, dim)))


# Fréchet distance and moments


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")  # in pytorch-fid
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_the_frechet_distance_equals_pytorch_fids(dim: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    mixing = normal(dim, dim, 3)
    a, b = normal(4 * dim + 2, dim, 1) @ mixing, normal(3 * dim + 2, dim, 2, 0.3, 1.4) @ mixing
    expected = calculate_frechet_distance(
        a.mean(0).numpy(), np.cov(a.numpy(), rowvar=False), b.mean(0).numpy(), np.cov(b.numpy(), rowvar=False)
    ) if dim > 1 else (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2  # fmt: skip
    assert moments_distance(Moments.of(a), Moments.of(b)) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


def test_the_frechet_distance_of_singular_covariances_is_exact() -> None:
    a, b = torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.diag(torch.tensor([1.0, 9.0, 0.0]))
    means = torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])
    assert frechet_distance(means[0], a, means[1], b) == pytest.approx(1 + 4 + 4, abs=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 12), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_moments_of_shards_add_up_to_the_moments_of_all(seed: int, dim: int, sizes: list[int]) -> None:
    shards = [normal(n, dim, seed + i, 1.0) for i, n in enumerate([*sizes, dim + 2])]
    flat = sum(Moments.of(shard).to_flat() for shard in shards)  # what an all-reduce leaves on each rank
    merged, everything = Moments.from_flat(flat), torch.cat(shards)
    assert merged.n == len(everything)
    np.testing.assert_allclose(merged.mean(), everything.mean(0), atol=1e-12)
    np.testing.assert_allclose(merged.cov(), everything.T.cov().reshape(dim, dim), atol=1e-10)


def test_adding_moments_is_adding_their_flat_tensors() -> None:
    a, b = Moments.of(normal(7, 3, 1)), Moments.of(normal(5, 3, 2))
    assert torch.equal((a + b).to_flat(), a.to_flat() + b.to_flat())
    assert torch.equal((a + Moments.zeros(3)).to_flat(), a.to_flat())


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0, 3), st.floats(0.2, 3))
def test_the_frechet_distance_is_a_distance(seed: int, dim: int, shift: float, scale: float) -> None:
    a, b = (Moments.of(normal(40, dim, seed)), Moments.of(normal(40, dim, seed + 1, shift, scale)))
    assert moments_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert moments_distance(a, b) == pytest.approx(moments_distance(b, a), abs=1e-9)
    assert moments_distance(a, b) > 0


def test_few_images_have_a_distance_and_one_has_none() -> None:
    """A covariance of less than full rank, as scipy's matrix root has it."""
    few, enough = normal(5, 8, 1), normal(9, 8, 2)
    assert moments_distance(Moments.of(few), Moments.of(few)) == pytest.approx(0, abs=1e-9)
    a, b = (np.cov(x.double().numpy(), rowvar=False) for x in (few, enough))
    shift = (few.double().mean(0) - enough.double().mean(0)).square().sum().item()
    expected = shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert moments_distance(Moments.of(few), Moments.of(enough)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="1 images are too few for a covariance"):
        moments_distance(Moments.of(normal(1, 8, 1)), Moments.of(enough))
    with pytest.raises(UserError, match="no image"):
        Moments.zeros(8).mean()
    with pytest.raises(UserError, match="1 \\+ D \\+ D\\*D"):
        Moments.from_flat(torch.zeros(9))


# KID


def reference_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator as a sum over pairs, for sets of any sizes."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (np.dot(a, b) / len(a) + 1) ** 3

    xx = np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return float(xx + yy - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_kid_over_whole_sets_is_the_unbiased_estimator() -> None:
    a, b = normal(30, 4, 1), normal(30, 4, 2, 0.5)
    mean, deviation = kid(a, b, subsets=2, subset_size=30)
    assert mean == pytest.approx(reference_mmd(a.numpy(), b.numpy()), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased() -> None:
    same, other = normal(4000, 16, 1), normal(4000, 16, 2)
    mean, deviation = kid(same, other, subsets=400, subset_size=50)
    assert deviation > 0
    assert abs(mean) < 4 * deviation / 400**0.5
    # the biased estimator counts each image against itself, which alone is (E k(x, x) - E k(x, y)) * 2 / 50
    assert 4 * deviation / 400**0.5 < 2 / 50 * (2**3 - 1) / 2
    assert kid(same, normal(4000, 16, 3, 0.3), subsets=20, subset_size=500)[0] > 0.1


def test_kid_follows_its_seed_and_no_global_state() -> None:
    a, b = normal(100, 8, 1), normal(90, 8, 2)
    first = kid(a, b, 10, 40, seed=5)
    np.random.seed(1)  # noqa: NPY002 - the state that must not matter
    assert kid(a, b, 10, 40, seed=5) == first
    assert kid(a, b, 10, 40, seed=6) != first


@pytest.mark.parametrize("subset_size", [1, 91])
def test_kid_refuses_subsets_that_do_not_fit(subset_size: int) -> None:
    with pytest.raises(UserError, match=f"subsets of {subset_size} images asked of 90; 2 to 90 fit"):
        kid(normal(100, 8, 1), normal(90, 8, 2), 10, subset_size)


# neighbours


def reference_neighbours(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    real_radii, fake_radii = (np.sort(cdist(x, x), 1)[:, k] for x in (real, fake))
    distances = cdist(real, fake)
    in_real, in_fake = distances < real_radii[:, None], distances < fake_radii
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum(0).mean() / k,
        "coverage": in_real.any(1).mean(),
    }


@pytest.mark.parametrize("block", [1, 300, metrics.DISTANCE_BLOCK])
@pytest.mark.parametrize("k", [1, 5])
def test_neighbour_scores_equal_all_pairs_for_any_block(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DISTANCE_BLOCK", block)
    real, fake = normal(60, 6, 1), normal(47, 6, 2, 0.4, 1.2)
    expected = reference_neighbours(real.numpy(), fake.numpy(), k)
    assert precision_recall(real, fake, k) == pytest.approx((expected["precision"], expected["recall"]))
    assert density_coverage(real, fake, k) == pytest.approx((expected["density"], expected["coverage"]))


def test_a_collapsed_generator_is_precise_and_covers_nothing() -> None:
    real = normal(500, 8, 1)
    collapsed = real[:1] + normal(500, 8, 2) * 1e-6
    precision, recall = precision_recall(real, collapsed, 3)
    density, coverage = density_coverage(real, collapsed, 5)
    assert (precision, recall) == (1, pytest.approx(0, abs=0.01))
    assert density > 0.2 and coverage < 0.1


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_images_are_refused(k: int) -> None:
    for score in (precision_recall, density_coverage):
        with pytest.raises(UserError, match=f"neighbour {k} asked of 5 images; 1 to 4 fit"):
            score(normal(5, 2, 1), normal(20, 2, 2), k)
    with pytest.raises(UserError, match="20 against 0|0 against 20"):
        density_coverage(normal(20, 2, 1), normal(0, 2, 2), 3)


# class coverage


def test_class_coverage_names_the_classes_that_skew_destroyed() -> None:
    real, fake = torch.tensor([100, 100, 100, 100]), torch.tensor([60, 39, 1, 0])
    variation, missing = class_coverage(real, fake)
    assert variation == pytest.approx((0.35 + 0.14 + 0.24 + 0.25) / 2)
    assert missing == [2, 3]
    assert class_coverage(torch.tensor([90, 10, 0]), torch.tensor([99, 1, 0])).missing == []  # 1 % of 10 %: a tenth


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_total_variation_is_symmetric_and_bounded(pairs: list[tuple[int, int]]) -> None:
    real, fake = (torch.tensor(h) + torch.eye(len(pairs), dtype=torch.int64)[0] for h in zip(*pairs, strict=True))
    variation = class_coverage(real, fake).total_variation
    assert 0 <= variation < 1
    assert variation == pytest.approx(class_coverage(fake, 7 * real).total_variation)
    assert class_coverage(real, 3 * real) == (pytest.approx(0, abs=1e-12), [])


def test_histograms_count_every_class_and_refuse_what_does_not_match() -> None:
    assert label_histogram(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    for fake in (torch.tensor([1, 2, 3]), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(UserError, match="two filled histograms of the same classes"):
            class_coverage(torch.tensor([4, 5]), fake)


# real images


@pytest.fixture(scope="module")
def real_images() -> Tensor:
    """Fashion-MNIST test images (n, 1, 28, 28) uint8: 2,000 of Debian's, else the package's excerpt."""
    if DEBIAN.is_dir():
        read_idx = runpy.run_path(str(TESTS / "tools" / "train_extractor.py"))["read_idx"]
        return torch.tensor(read_idx(DEBIAN / "t10k-images-idx3-ubyte.gz")[:2000])[:, None]
    with np.load(EXCERPT, allow_pickle=False) as excerpt:
        return torch.tensor(excerpt["test_images"])[:, None]


def score_all(extractor: Extractor, real: Tensor, fake: Tensor) -> dict[str, float]:
    """Every score of images, lower is better."""
    a, b = extractor.features(real), extractor.features(fake)
    real_hist, fake_hist = (label_histogram(extractor.labels(x), FMNIST_CLASSES) for x in (real, fake))
    precision, recall = precision_recall(a, b)
    density, coverage = density_coverage(a, b)
    return {
        "fd_fmnist": moments_distance(Moments.of(a), Moments.of(b)),
        "kid": kid(a, b, 20, len(a) // 2)[0],
        "lost precision": 1 - precision,
        "lost recall": 1 - recall,
        "lost density": 1 - density,
        "lost coverage": 1 - coverage,
        "total variation": class_coverage(real_hist, fake_hist).total_variation,
    }


@pytest.fixture(scope="module")
def by_noise(real_images: Tensor) -> dict[int, dict[str, float]]:
    """One half of the real images against the other half, to which noise is added."""
    extractor = load_extractor("fmnist-cnn")
    real, other = real_images[::2], real_images[1::2]
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    noisy = {level: (other + level * noise).round().clamp(0, 255).byte() for level in NOISE}
    return {level: score_all(extractor, real, images) for level, images in noisy.items()}


# How far one half of the test split may be from the other. The excerpt's halves, 250 images each, are at 2.9, 0.01,
# 0.12, 0.12, 0.03, 0.02 and 0.09; with the most noise at 111, 8.3, 1, 1, 1, 1 and 0.78.
NEAR_ZERO = {
    "fd_fmnist": 5, "kid": 0.05, "lost precision": 0.2, "lost recall": 0.2, "lost density": 0.1, "lost coverage": 0.08,
    "total variation": 0.15,
}  # fmt: skip
METRICS = (
    "fd_fmnist", "kid", "lost precision", "lost recall", "lost density", "lost coverage", "total variation"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_real_against_real_is_near_zero(by_noise: dict[int, dict[str, float]], metric: str) -> None:
    assert abs(by_noise[0][metric]) < NEAR_ZERO[metric] < by_noise[NOISE[-1]][metric] / 2


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_a_score_worsens_monotonically_with_noise(by_noise: dict[int, dict[str, float]], metric: str) -> None:
    values = [by_noise[level][metric] for level in NOISE]
    at_its_worst = 1 if metric == "lost recall" else None  # no image is covered any more: it cannot get worse
    assert all(a < b or a == b == at_its_worst for a, b in zip(values, values[1:], strict=False)), values
