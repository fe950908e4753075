"""Which scores are asked for, whether there are images enough for them, and their values from the statistics of both.

Pure arithmetic over `metrics`; every value is stored beside the facts that it depends on, by `scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fdiff.errors import UserError
from fdiff.evaluation.extractors import Extractor
from fdiff.evaluation.features import FeatureStatistics
from fdiff.evaluation.metrics import (
    DENSITY_COVERAGE_K,
    KID_SUBSET_SIZE,
    class_coverage,
    density_coverage,
    kid,
    moments_distance,
    precision_recall,
)

METRICS = ("frechet", "kid", "neighbours", "classes")
OF_FEATURES = ("kid", "neighbours")  # the others need moments and counts only


@dataclass(frozen=True)
class MetricSet:
    """An extractor and the metrics that are taken with it."""

    extractor: Extractor
    metrics: tuple[str, ...]

    @property
    def needs_features(self) -> bool:
        """Whether features of generated images have to come together on rank 0."""
        return any(m in OF_FEATURES for m in self.metrics)

    def check(self, images: int, real: int) -> None:
        """UserError unless so many generated and real images are enough for every metric, before any is drawn."""
        needed = {"frechet": 2, "kid": 4, "neighbours": DENSITY_COVERAGE_K + 1}
        for metric in self.metrics:
            least = needed.get(metric, 1)
            for flag, n in (("--images", images), ("data.test_limit", real)):
                if n < least:
                    raise UserError(
                        f"{flag}: {n} images are too few for {metric}; {least} or more fit, or choose other --metrics"
                    )

    def scores(
        self,
        real: FeatureStatistics,
        fake: FeatureStatistics,
        real_features: Tensor,
        fake_features: Tensor | None,
    ) -> dict[str, Any]:
        """The metrics by name; of features (n, D) and (m, D), which may be None where `needs_features` is false."""
        found: dict[str, Any] = {}
        if "frechet" in self.metrics:
            found[self.extractor.metric_name] = moments_distance(real.moments, fake.moments)
        if fake_features is not None:
            found |= self._of_features(real_features, fake_features)
        if "classes" in self.metrics:
            coverage = class_coverage(real.labels, fake.labels)
            found |= {"total_variation": coverage.total_variation, "missing_classes": coverage.missing}
        return found

    def _of_features(self, real_features: Tensor, fake_features: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "kid" in self.metrics:
            found |= _kid(real_features, fake_features)
        if "neighbours" in self.metrics:
            found["precision"], found["recall"] = precision_recall(real_features, fake_features)
            found["density"], found["coverage"] = density_coverage(real_features, fake_features)
        return found


def choose_metrics(extractor: Extractor, asked: Sequence[str] | None, private: bool) -> MetricSet:
    """The metrics asked for, by default all that apply; UserError if one asked for does not.

    Of `private` test images only moments and counts are known outside of their clients.
    """
    impossible = {}
    if not extractor.classifies:
        impossible["classes"] = f"{extractor.name} has no classifier for labels; use fmnist-cnn"
    if private:
        why = "features of real images stay with their clients (data.partition private); use frechet, classes"
        impossible |= dict.fromkeys(OF_FEATURES, why)
    for metric in asked or ():
        if metric not in METRICS:
            raise UserError(f"--metrics: {metric!r} is not a metric; choose of {','.join(METRICS)}")
        if metric in impossible:
            raise UserError(f"--metrics: {metric}: {impossible[metric]}")
    return MetricSet(extractor, tuple(m for m in METRICS if m in (asked or METRICS) and m not in impossible))


def _kid(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """KID over the usual subsets of 1000, or of half of the images where there are not twice as many."""
    size = min(KID_SUBSET_SIZE, len(real) // 2, len(fake) // 2)
    mean, deviation = kid(real, fake, subset_size=size)
    return {"kid": mean, "kid_deviation": deviation, "kid_subset_size": size}
