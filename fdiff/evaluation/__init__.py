"""How good the images are: features, Fréchet distance and other scores, and warnings about them.

Open `scoring.py` first: all ranks draw images, rank 0 scores them. `metrics.py` has the formulas.
"""

from __future__ import annotations

from fdiff.evaluation.events import refresh_events
from fdiff.evaluation.extractors import DISTANCES, INCEPTION_FILE, default_extractor, find_inception_weights
from fdiff.evaluation.scoring import (
    Model,
    Row,
    Scoring,
    ScoringRequest,
    described,
    images_by_default,
    models_of,
    sampling_config,
    steps_of,
    summaries,
    summary,
)
from fdiff.evaluation.warnings import distance_name, find_warnings, mean_distance, newest_scores, scored_as
