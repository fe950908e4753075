"""That training works, as the scores see it: twenty rounds beat one, and one that never learned, on every metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import fdiff, on_ranks, rows

from fdiff.config import DataConfig
from fdiff.data import open_source
from fdiff.evaluation.extractors import load_extractor
from fdiff.evaluation.features import ImageFeatures, features_of_source
from fdiff.evaluation.metric_set import METRICS, MetricSet

RUN = """
--preset mini --method full --federation.rounds 20 --federation.local_epochs 1 --data.limit 1000 --model.dim 8
--model.dim_mults [1,2] --optim.batch_size 16 --optim.ema 0 --run.keep_checkpoints 20 --runtime.threads 1
--sample.every 0 --sample.steps 10 --sample.batch_size 100 --data.test_limit 200 --run.dir run
""".split()


def of_noise() -> dict[str, Any]:
    """The scores of images whose pixels are drawn at random."""
    metrics, cpu = MetricSet(load_extractor("fmnist-cnn"), METRICS), torch.device("cpu")
    source = open_source(DataConfig(image_side=16, test_limit=200), "test")
    real = features_of_source(metrics.extractor, source, cpu, None)
    pixels = torch.randint(256, (200, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = ImageFeatures.of(metrics.extractor, pixels)
    return metrics.scores(real.statistics(), noise.statistics(), real.features, noise.features)


@pytest.mark.slow
@pytest.mark.rare  # a minute and more; that each step is right is held against the oracle in test_parity.py
@pytest.mark.timeout(900)
def test_twenty_rounds_beat_one_and_noise_on_every_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    on_ranks(1, "train", *RUN, cwd=tmp_path, timeout_s=800)[0].check()
    for round in (1, 20):
        folder = tmp_path / "run" / "checkpoints" / f"round-{round:06d}"
        fdiff("evaluate", folder, "--runtime.threads", 1, cwd=tmp_path).check()
    first, last = (row["scores"] for row in rows(tmp_path / "run", "scores"))
    for worse in (first, of_noise()):
        for metric in ("fd_fmnist", "kid"):
            assert last[metric] < 0.5 * worse[metric]
        for metric in ("precision", "recall", "density", "coverage"):
            assert last[metric] > max(0.03, 2 * worse[metric]), metric
        assert last["total_variation"] < worse["total_variation"] - 0.1
        assert len(last["missing_classes"]) < len(worse["missing_classes"])
