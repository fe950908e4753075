"""What the scores of a run say beyond their values: the signs of failure that the paper names.

Reads the logs of a run folder; computes nothing with images and talks to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdiff.config import Config
from fdiff.evaluation.extractors import DISTANCES, FEATURES, knows_clothes
from fdiff.evaluation.scoring import summary
from fdiff.federation import communicated, payload_of, plan_of, read_log
from fdiff.plan import NeedsImages, new_clients

WIDE_SPREAD = 1 / 3  # of the clients' mean; the paper's are at 0.19 and 0.27 on iid data, at 0.40 to 1.1 on skewed
PATIENCE = 2  # scored rounds without a better distance before it counts as no progress


def distance_name(row: dict[str, Any]) -> str | None:
    """The name of the Fréchet distance in a row of scores, if it was taken."""
    return next((name for name in DISTANCES.values() if name in row["scores"]), None)


def newest_scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that score the same model in the same way, the one written last; in the order of writing."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["round"], row["client"], row["ema"], scored_as(row))
        last.pop(key, None)
        last[key] = row
    return list(last.values())


def scored_as(row: dict[str, Any]) -> tuple[Any, ...]:
    """All that must be equal for the scores of two models, or of two rounds, to compare."""
    facts = ("local", "n", "split", "n_real", "extractor", "checksum", "resized_from", "sampler", "steps")
    return tuple(row.get(fact) for fact in facts)


def find_warnings(rows: Sequence[dict[str, Any]], config: Config, run_dir: Path | None) -> list[str]:
    """One line for each sign of failure in a checkpoint's rows of scores and in the logs of its run."""
    found = _without_meaning(rows, config) + _never_selected(rows)
    for kind in dict.fromkeys((row["ema"], scored_as(row)) for row in rows):
        found += _spread([row for row in rows if (row["ema"], scored_as(row)) == kind])
    if run_dir is not None:
        found += _no_progress(rows, read_log(run_dir, "scores"))
        found += _other_savings(config, read_log(run_dir, "rounds"))
    return found


def _without_meaning(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """What the numbers cannot mean, by the extractor and by the numbers of images."""
    found = []
    facts = ("extractor", "n", "n_real")
    for extractor, n, real in dict.fromkeys(tuple(row[f] for f in facts) for row in rows if row.keys() >= {*facts}):
        name = DISTANCES.get(extractor)
        if name and min(n, real) <= FEATURES[extractor] and any(name in row["scores"] for row in rows):
            found.append(
                f"{name} of {n} images against {real} real ones is too high, as {extractor} has {FEATURES[extractor]} "
                "features: compare it with scores of as many images only"
            )
        if extractor == "fmnist-cnn" and not knows_clothes(config.data):
            found.append(
                f"fmnist-cnn knows clothes only: its scores of {config.data.dataset} order the runs on these images at "
                "best, and its missing classes are none of theirs"
            )
    return found


def mean_distance(rows: Sequence[dict[str, Any]]) -> float:
    """The mean over the models of one round of their Fréchet distance, of those for which it was taken."""
    name, having = _distances(rows)
    return float(summary(having, name)["mean"])


def _distances(rows: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The name of the Fréchet distance that was taken, and the rows that have it: a later scoring may lack it."""
    name = next(filter(None, map(distance_name, rows)), "")
    return name, [row for row in rows if name in row["scores"]]


def _never_selected(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The clients whose private parts nobody has trained."""
    never = sorted({row["client"] for row in rows if row.get("selected") == 0})
    if not never:
        return []
    which = f"clients {', '.join(map(str, never))}" if len(never) <= 16 else f"{len(never)} clients"
    return [f"never selected, and left out of mean and deviation: {which}; their private parts are as the run began"]


def _spread(rows: list[dict[str, Any]]) -> list[str]:
    name, having = _distances(rows)
    if len(having) < 2:
        return []
    facts = summary(having, name)
    share = facts["deviation"] / facts["mean"] if facts["mean"] else 0.0
    if share <= WIDE_SPREAD:
        return []
    return [
        f"the clients differ widely in {name}{_which(rows[0])}: deviation {share:.0%} of the mean, client "
        f"{facts['worst_client']} at {facts['worst']:.1f}; only full and usplit leave all clients one model"
    ]


def _no_progress(rows: Sequence[dict[str, Any]], log: Sequence[dict[str, Any]]) -> list[str]:
    """For each way of scoring whether the newest rounds are no better than one before them."""
    found = []
    for row in {(r["ema"], scored_as(r)): r for r in rows if distance_name(r)}.values():
        same = [r for r in log if r["ema"] == row["ema"] and scored_as(r) == scored_as(row)]
        like = [r for r in same if r["round"] <= row["round"]]
        by_round: dict[int, list[dict[str, Any]]] = {}
        for other in newest_scores([r for r in like if distance_name(r)]):
            by_round.setdefault(other["round"], []).append(other)
        means = [mean_distance(by_round[r]) for r in sorted(by_round)]
        if len(means) > PATIENCE and min(means[-PATIENCE:]) >= min(means[:-PATIENCE]):
            found.append(
                f"{distance_name(row)}{_which(row)} has stopped improving: {min(means[:-PATIENCE]):.1f} before, "
                f"{min(means[-PATIENCE:]):.1f} at best in the last {PATIENCE} scored rounds"
            )
    return found


def _other_savings(config: Config, log: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the run communicated what its plan says; a client that was left out makes the difference, say.

    Held against the plan are all rounds of the log: a run that was given more of them later has some that the
    configuration in an older checkpoint does not count.
    """
    payload, fed, seed = payload_of(config), config.federation, config.run.seed
    planned = {}
    for number in (r["round"] for r in log):
        try:
            plan = plan_of(config, number, tuple(payload.sizes))
        except NeedsImages:  # which the run had, and held its bytes against the plan itself
            return []
        new = new_clients(plan, fed.clients, seed, fed.fraction)
        planned[number] = communicated(plan, payload, new)
    wrong = [r for r in log if r["communicated_parameters"] != planned[r["round"]]]
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"savings differ from the plan in {len(wrong)} of {len(log)} rounds, first in round {first['round']}: "
        f"{first['communicated_parameters']:,} parameters, planned {planned[first['round']]:,}"
    ]


def _which(row: dict[str, Any]) -> str:
    return (" of the moving averages" if row["ema"] else "") + (" before the average" if row.get("local") else "")
