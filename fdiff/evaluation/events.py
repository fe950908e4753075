"""The scores of a run as curves for TensorBoard: what `RUN/scores.jsonl` says, in the way of scoring written last."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fdiff.errors import UserError
from fdiff.evaluation.scoring import WORST, Row, summary
from fdiff.evaluation.warnings import newest_scores, scored_as
from fdiff.federation import read_log, score_tag, write_scores

log = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]


def refresh_events(run_dir: Path) -> None:
    """Have the run's events say what its log of scores says; where that cannot be, warn, as the scores are kept."""
    try:
        write_scores(run_dir, score_curves(read_log(run_dir, "scores")))
    except (OSError, UserError) as error:
        log.warning("TensorBoard shows no new scores: %s", error)


def score_curves(rows: Sequence[Row]) -> Curves:
    """(round, value) by tag: of each extractor and kind of weights the mean over the models, and of each client."""
    last = {(row["extractor"], row["local"]): scored_as(row) for row in rows}
    groups: dict[tuple[str, bool, bool, int], list[Row]] = {}
    for row in newest_scores(rows):
        if scored_as(row) == last[row["extractor"], row["local"]]:
            groups.setdefault((row["extractor"], row["local"], row["ema"], row["round"]), []).append(row)
    curves: Curves = {}
    for (extractor, local, ema, round), those in sorted(groups.items()):
        kinds = ["local"] * local + ["average"] * ema
        for name, value in _means(those).items():
            curves.setdefault(score_tag(extractor, name, *kinds), []).append((round, value))
        for row in those if len(those) > 1 else []:
            for name in set(row["scores"]) & {*WORST, "missing_classes"}:
                tag = score_tag(extractor, name, *kinds, f"client-{row['client']:04d}")
                curves.setdefault(tag, []).append((round, _number(row, name)))
    return curves


def _means(rows: Sequence[Row]) -> dict[str, float]:
    names = [name for name in rows[0]["scores"] if all(name in row["scores"] for row in rows)]
    found = {name: float(summary(rows, name)["mean"]) for name in names if name in WORST}
    if "missing_classes" in names:
        found["missing_classes"] = sum(_number(row, "missing_classes") for row in rows) / len(rows)
    return found


def _number(row: Row, name: str) -> float:
    score = row["scores"][name]
    return float(len(score) if isinstance(score, list) else score)
