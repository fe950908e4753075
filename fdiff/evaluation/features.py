"""What scores need to know of images, real or generated: features, their moments, a histogram of labels.

Real images are turned into features where they are; features are kept in a cache on this machine, by data set, split,
shape and extractor. Knows nothing of models, and of ranks only that tallies add up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdiff.data import Source
from fdiff.evaluation.extractors import FMNIST_CLASSES, Extractor
from fdiff.evaluation.metrics import Moments, label_histogram

log = logging.getLogger(__name__)

BLOCK = 1024  # images read at once


@dataclass(frozen=True)
class ImageFeatures:
    """What an extractor saw of n images: features (n, D) float32, and labels (n,) int64, or (0,) from no classifier."""

    features: Tensor
    labels: Tensor

    @staticmethod
    def of(extractor: Extractor, images: Tensor) -> ImageFeatures:
        """What it sees of uint8 images (n, C, S, S), on their device."""
        return ImageFeatures(*extractor.see(images))

    @staticmethod
    def joined(parts: Iterable[ImageFeatures], extractor: Extractor, device: torch.device) -> ImageFeatures:
        """All of them in one, on the device; of none, that of no image."""
        none = ImageFeatures(torch.empty(0, extractor.feature_dim), torch.empty(0, dtype=torch.int64))
        parts = [none, *parts]
        labels = torch.cat([p.labels.to(device) for p in parts])
        return ImageFeatures(torch.cat([p.features.to(device) for p in parts]), labels)

    def statistics(self) -> FeatureStatistics:
        """Moments and histogram of these images."""
        return FeatureStatistics(Moments.of(self.features), label_histogram(self.labels, FMNIST_CLASSES).double())


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of features and a histogram (classes,) of labels, float64: the tallies of ranks add up."""

    moments: Moments
    labels: Tensor

    def to_flat(self) -> Tensor:
        """One new float64 tensor whose sum over ranks is that of all ranks' images."""
        return torch.cat([self.labels, self.moments.to_flat()])

    @staticmethod
    def from_flat(flat: Tensor) -> FeatureStatistics:
        """The inverse of `to_flat`, on the CPU."""
        flat = flat.cpu()
        return FeatureStatistics(Moments.from_flat(flat[FMNIST_CLASSES:]), flat[:FMNIST_CLASSES])


def features_of_source(extractor: Extractor, source: Source, device: torch.device, cache: Path | None) -> ImageFeatures:
    """What the extractor sees of all images of a source, on the CPU: from the folder `cache`, or anew."""
    file = cache and cache / f"{_key(extractor, source)}.safetensors"
    if file and (known := _read(file, extractor, len(source))):
        return known
    cuts = (np.arange(i, min(i + BLOCK, len(source))) for i in range(0, len(source), BLOCK))
    seen = (ImageFeatures.of(extractor, source.images(cut).to(device)) for cut in cuts)
    found = ImageFeatures.joined(seen, extractor, torch.device("cpu"))
    if file:
        _write(file, found)
    return found


def _key(extractor: Extractor, source: Source) -> str:
    """Of extractor, data set, split and shape, labels, and of what tells whether the images were replaced."""
    facts = [extractor.checksum, source.name, len(source), list(source.shape)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(np.ascontiguousarray(source.labels).tobytes())
    for block in source.identity():
        digest.update(block)
    return f"{extractor.name}-{digest.hexdigest()[:32]}"


def _read(file: Path, extractor: Extractor, n: int) -> ImageFeatures | None:
    try:
        arrays = load_file(file)
        seen = ImageFeatures(arrays["features"], arrays["labels"])
    except (OSError, KeyError, SafetensorError):
        return None
    return seen if seen.features.shape == (n, extractor.feature_dim) else None


def _write(file: Path, seen: ImageFeatures) -> None:
    """Best effort: a score does not fail because it cannot be had faster next time."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": seen.features, "labels": seen.labels}, temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        log.warning("the cache of real features %s cannot be written (%s)", file.parent, error)
