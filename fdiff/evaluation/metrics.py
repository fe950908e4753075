"""Scores of generated images, as pure functions of their features and of real ones.

Owns the arithmetic only: Fréchet distance, KID, precision and recall, density and coverage, class coverage.
Knows nothing of images, extractors or ranks; what ranks sum up (`Moments`, label histograms) is additive.
Everything is computed in float64. Too few images for a score raise UserError: no smaller sample is scored in
silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdiff.errors import UserError

DISTANCE_BLOCK = 4_000_000  # distances held at a time, 32 MB in float64
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # the usual choice; a subset must be smaller than the sample
PRECISION_RECALL_K, DENSITY_COVERAGE_K = 3, 5  # the neighbours of the papers named below
MISSING_PART = 10  # a class is missing when its share is below the tenth part of its real share


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features: what ranks add up for a Fréchet distance."""

    n: int
    sum: Tensor  # (D,) float64
    outer: Tensor  # (D, D) float64

    @staticmethod
    def zeros(dim: int, device: str | torch.device = "cpu") -> Moments:
        """The moments of no image: the neutral element of `+`."""
        zeros = torch.zeros(dim, dtype=torch.float64, device=device)
        return Moments(0, zeros, zeros.new_zeros(dim, dim))

    @staticmethod
    def of(features: Tensor) -> Moments:
        """The moments of features (n, D), on their device."""
        x = features.double()
        return Moments(len(x), x.sum(0), x.T @ x)

    @staticmethod
    def from_flat(flat: Tensor) -> Moments:
        """The inverse of `to_flat`; D follows from the length 1 + D + D²."""
        dim = (int(np.sqrt(4 * flat.numel() - 3)) - 1) // 2
        if flat.dim() != 1 or flat.numel() != 1 + dim + dim * dim:
            raise UserError(f"moments: 1 + D + D*D numbers expected, got {tuple(flat.shape)}")
        return Moments(round(flat[0].item()), flat[1 : 1 + dim], flat[1 + dim :].reshape(dim, dim))

    def to_flat(self) -> Tensor:
        """One new float64 tensor (1 + D + D²,) whose sum over ranks is `to_flat` of all ranks' moments."""
        return torch.cat([self.sum.new_tensor([self.n]), self.sum, self.outer.flatten()])

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def mean(self) -> Tensor:
        """(D,) float64; UserError without an image."""
        if self.n < 1:
            raise UserError("moments: no image was counted; at least 1 is needed for a mean")
        return self.sum / self.n

    def cov(self) -> Tensor:
        """(D, D) float64, unbiased (as numpy.cov), of full rank only where n > D; UserError of fewer than 2 images."""
        if self.n < 2:
            raise UserError(f"moments: {self.n} images are too few for a covariance; 2 or more fit")
        mean = self.mean()
        return (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def moments_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two sets' moments; UserError when either holds too few images."""
    return frechet_distance(a.mean(), a.cov(), b.mean(), b.cov())


def frechet_distance(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """|mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^½), on the CPU in float64.

    The trace of (S1 S2)^½ is that of (S1^½ S2 S1^½)^½, whose argument is symmetric; the roots of its
    eigenvalues are the singular values of S2^½ S1^½. Unlike a general matrix root this needs no offset on
    singular covariances, and singular values, unlike roots of eigenvalues, are exact where they are small.
    """
    mu1, s1, mu2, s2 = (x.detach().cpu().double() for x in (mu1, s1, mu2, s2))
    cross = torch.linalg.svdvals(_symmetric_root(s2) @ _symmetric_root(s1)).sum()
    distance = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal sets differ from 0 by rounding, of either sign


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def kid(
    features_a: Tensor,
    features_b: Tensor,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance (Bińkowski et al. 2018): mean and deviation, over random subsets, of the unbiased MMD².

    Kernel (x·y / D + 1)³. Subsets are drawn without replacement from a generator of `seed`. Near 0, of
    either sign, for one distribution; the deviation is 0 where a subset is the whole set. UserError when a
    subset would be larger than a set of features, or has under two images.
    """
    smallest = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smallest or subsets < 1:
        raise UserError(
            f"kid: {subsets} subsets of {subset_size} images asked of {smallest}; 2 to {smallest} fit"
        )
    a, b = features_a.double(), features_b.double()
    draw = np.random.default_rng(seed)
    pairs = ((_subset(a, subset_size, draw), _subset(b, subset_size, draw)) for _ in range(subsets))
    values = [_squared_mmd(x, y) for x, y in pairs]
    return float(np.mean(values)), float(np.std(values))


def _subset(features: Tensor, size: int, draw: np.random.Generator) -> Tensor:
    chosen = draw.choice(len(features), size, replace=False)
    return features[torch.from_numpy(chosen).to(features.device)]


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD² of equally many features: pairs of an image with itself are left out."""
    n = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return (within / (n * (n - 1)) - 2 * _kernel(x, y).mean()).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: Tensor, fake: Tensor, k: int = PRECISION_RECALL_K) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), each in 0..1, 1 is best.

    Precision: the share of generated features within the k-nearest-neighbour ball of some real feature;
    recall: the share of real ones within a ball of some generated feature. UserError when a set has k or
    fewer.
    """
    precision = (_balls_holding(fake, real, _squared_radii(real, k)) > 0).double().mean().item()
    recall = (_balls_holding(real, fake, _squared_radii(fake, k)) > 0).double().mean().item()
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = DENSITY_COVERAGE_K) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020) over real k-nearest-neighbour balls.

    Density: real balls that hold a generated feature, averaged over these and divided by k (1 for equal
    distributions, may exceed it); coverage: the share of real balls that hold any, 0..1. UserError when there
    are k or fewer real features, or no generated one.
    """
    radii = _squared_radii(real, k)
    density = _balls_holding(fake, real, radii).double().mean().item() / k
    nearest = _by_rows(real, fake, lambda distances: distances.amin(1))
    return density, (nearest < radii).double().mean().item()


def _balls_holding(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(len(points),) int64: how many of the balls around the centres hold each point."""
    return _by_rows(points, centres, lambda distances: (distances < radii).sum(1))


def _squared_radii(centres: Tensor, k: int) -> Tensor:
    """(n,) squared distance of each centre to its k-th neighbour, itself not counted."""
    if not 1 <= k < len(centres):
        raise UserError(f"k: neighbour {k} asked of {len(centres)} images; 1 to {len(centres) - 1} fit")
    return _by_rows(centres, centres, lambda distances: distances.kthvalue(k + 1, 1).values)


def _by_rows(x: Tensor, y: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` of the squared distances (rows, len(y)) of blocks of x's rows, joined, in bounded memory."""
    if not len(x) or not len(y):
        raise UserError(f"features: {len(x)} against {len(y)} images; at least 1 of each is needed")
    x, y = x.double(), y.double()
    norms = y.square().sum(1)
    rows = max(1, DISTANCE_BLOCK // len(y))
    return torch.cat([reduce(b.square().sum(1, keepdim=True) + norms - 2 * b @ y.T) for b in x.split(rows)])


class ClassCoverage(NamedTuple):
    """How the generated classes' shares stand against the real ones."""

    total_variation: float  # half the sum of |differences of shares|, 0..1, 0 is best
    missing: list[int]  # classes whose generated share is below a tenth of the real one


def label_histogram(labels: Tensor, classes: int) -> Tensor:
    """Labels (n,) to counts (classes,), int64; the ranks' histograms add up to that of all images.

    Not by `bincount`, which on a GPU waits to learn how many classes there are.
    """
    return (labels[:, None] == torch.arange(classes, device=labels.device)).sum(0)


def class_coverage(real_hist: Tensor, fake_hist: Tensor) -> ClassCoverage:
    """Total variation and missing classes of two label histograms (classes,) of any totals above 0.

    A class is missing when its generated share is under a tenth of its real share; a tenth itself, compared in
    whole numbers, is not.
    """
    if real_hist.shape != fake_hist.shape or real_hist.sum() < 1 or fake_hist.sum() < 1:
        got = [f"{h.sum()} images in {len(h)} classes" for h in (real_hist, fake_hist)]
        raise UserError(f"class coverage: two filled histograms of the same classes expected, got {got}")
    real, fake = real_hist.cpu(), fake_hist.cpu()
    missing = torch.nonzero(MISSING_PART * fake * real.sum() < real * fake.sum()).flatten().tolist()
    differences = (real.double() / real.sum() - fake.double() / fake.sum()).abs()
    return ClassCoverage(differences.sum().item() / 2, missing)
