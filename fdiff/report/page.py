"""The page: what is drawn of which runs, and the template that it goes into. One string; it needs no network."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from fdiff import __version__
from fdiff.errors import UserError, printable
from fdiff.evaluation import DISTANCES
from fdiff.federation import forecast_run
from fdiff.model import parts_of
from fdiff.plan import methods_for
from fdiff.report import charts, facts
from fdiff.report.charts import Curve
from fdiff.report.facts import SCORES
from fdiff.report.grids import gallery, real_images
from fdiff.report.runs import Run, named_apart, number

MOST_SPLITS = 12  # heat maps of who holds which images
T = TypeVar("T")
Groups = list[tuple[list[str], T]]  # the names of the runs that share something, and what that is


def render(runs: Sequence[Run], root: Path | None = None) -> str:
    """The HTML page of these runs, side by side; `root` is where their data set's test images are, to be shown."""
    runs = named_apart(runs)
    environment = Environment(
        loader=PackageLoader("fdiff.report"), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    costs = [_costs(run) for run in runs]
    savings = [of_run.get(run.config.method, {}).get("saving") for run, of_run in zip(runs, costs, strict=True)]
    differ, same = facts.fields(runs)
    splits = _grouped(runs, [_split(run) for run in runs])
    return environment.get_template("page.html.j2").render(
        runs=runs,
        lines_of_clients=charts.LINES_OF_CLIENTS,
        runs_with_clients=charts.RUNS_WITH_CLIENTS,
        version=__version__,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        key=[(run.name, charts.colour(i)) for i, run in enumerate(runs)],
        warnings=[(run.name, warning) for run in runs for warning in run.warnings()],
        facts=facts.overview(runs, savings),
        curves=list(_curves(runs)),
        scores=facts.scores(runs),
        told=_grouped(runs, [tuple(run.told()) for run in runs]),
        real=_real(runs, root),
        galleries=[gallery(run, len(runs)) for run in runs],
        splits=[(names, _heat_map(split)) for names, split in splits[:MOST_SPLITS]],
        more_splits=max(0, len(splits) - MOST_SPLITS),
        communication=[(names, _bars(shown)) for names, shown in _grouped(runs, _communication(runs, costs))],
        time=_time(runs),
        phases=facts.phases(runs),
        by_bytes=list(_by_bytes(runs)),
        differ=differ,
        same=same,
        environments=_grouped(runs, [tuple(_environment(run)) for run in runs]),
    )


def _shown(value: Any) -> Any:
    """Text without what would turn round the text about it or end its line, escaped; markup of our own as it is."""
    return printable(value) if type(value) is str else value


def _grouped(runs: Sequence[Run], values: Sequence[T]) -> Groups[T]:
    """Each value once, with the names of the runs that have it, in the order of the first of them."""
    found: Groups[T] = []
    at: dict[Hashable, int] = {}
    for run, value in zip(runs, values, strict=True):
        if value not in at:
            at[value] = len(found)
            found.append(([], value))
        found[at[value]][0].append(run.name)
    return found


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    """The loss, and every score that some run has."""
    losses = {
        run.name: Curve([(r["round"], r["loss"]) for r in run.rounds], (), list(run.by_client("loss").values()))
        for run in runs
    }
    if any(losses.values()):
        yield charts.curves(losses, "loss of the last local epoch", log=True)
    extractors = sorted({extractor for run in runs for extractor in run.extractors})
    for (name, (title, best, _)), extractor in itertools.product(SCORES.items(), extractors):
        curves = {run.name: _score_curve(run, name, extractor) for run in runs}
        if any(curves.values()):
            told = len(extractors) > 1 and name not in DISTANCES.values()  # a distance's name tells its extractor
            yield charts.curves(curves, f"{title}{f' by {extractor}' if told else ''} ({best})")


def _by_bytes(runs: Sequence[Run]) -> Iterator[str]:
    """Distances over what had been sent by then, of runs that are scored."""
    for name, extractor in itertools.product(DISTANCES.values(), sorted({e for run in runs for e in run.extractors})):
        curves = {run.name: _score_curve(run, name, extractor) for run in runs}
        sent = {run.name: run.sent_until() for run in runs}
        moved = {run: curve.over(sent[run]) for run, curve in curves.items()}
        if any(moved.values()):
            yield charts.curves(moved, f"{name} (lower is better)", "MB on the wire so far")


def _score_curve(run: Run, name: str, extractor: str) -> Curve:
    """The mean over the models, and where there are several the raw one of each client."""
    clients: dict[int, list[tuple[int, float]]] = {}
    for round, rows in run.scored(extractor, ema=False).items():
        for row in rows:
            if row["client"] is not None and name in row["scores"]:
                clients.setdefault(row["client"], []).append((round, number(row, name)))
    raw, average = (run.averaged(name, extractor, ema) for ema in (False, True))
    return Curve(raw, average, list(clients.values()))


def _real(runs: Sequence[Run], root: Path | None) -> Groups[tuple[Any, str]]:
    """Real images of each data set, or why there are none."""
    of_data: dict[Hashable, list[Run]] = {}
    for run in runs:
        config = run.config
        what = (config.data.dataset, config.data.root, config.data.partition == "private", config.data.image_side)
        of_data.setdefault((*what, config.sample.images), []).append(run)
    return [([run.name for run in those], real_images(those[0].config, root)) for those in of_data.values()]


def _split(run: Run) -> tuple[str, tuple[tuple[tuple[str, int], ...], ...]]:
    """The partition's name, and the images of each client by label, or in all where labels stay with the clients."""
    rows = run.setting.get("clients", [])
    private = any("labels" not in row for row in rows)
    counts = ({"images": row["images"]} if private else row["labels"] for row in rows)
    return run.config.data.partition, tuple(tuple(of_client.items()) for of_client in counts)


def _heat_map(split: tuple[str, tuple[tuple[tuple[str, int], ...], ...]]) -> str:
    name, counts = split
    return charts.heat_map([dict(c) for c in counts], f"images of each client by label, {name}") if counts else ""


def _costs(run: Run) -> dict[str, dict[str, Any]]:
    """What each method would communicate with this run's configuration."""
    costs = {}
    for method in dict.fromkeys([*methods_for(parts_of(run.config)), run.config.method]):
        with suppress(UserError):  # what it shares may be nothing for the run's compression
            costs[method] = forecast_run(replace(run.config, method=method), run.ranks, images=run.images)
    return costs


def _communication(runs: Sequence[Run], costs: Sequence[dict[str, dict[str, Any]]]) -> list[Hashable]:
    """What `charts.bars` draws of each run: N of each method, the run's own highlighted."""
    found: list[Hashable] = []
    for run, of_run in zip(runs, costs, strict=True):
        millions = tuple((method, cost["communicated_parameters"] / 1e6) for method, cost in of_run.items())
        notes = tuple((method, f"−{cost['saving']:.1%}" if cost["saving"] else "") for method, cost in of_run.items())
        found.append((millions, run.config.method, notes))
    return found


def _bars(shown: Any) -> str:
    millions, own, notes = shown
    return charts.bars(dict(millions), "N, million parameters in all rounds", own, dict(notes))


def _time(runs: Sequence[Run]) -> str:
    seconds = {run.name: run.seconds for run in runs if run.seconds}
    return charts.stacked(seconds, "seconds in all rounds") if seconds else ""


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    """Versions, and where the ranks run, neighbours that run alike in one line."""
    for name in ("fdiff", "torch", "python", "system", "communicator"):
        if name in run.setting:
            yield name, str(run.setting[name])
    places = enumerate((rank["host"], rank["device"]) for rank in run.setting.get("ranks", []))
    for (host, device), those in itertools.groupby(places, key=lambda place: place[1]):
        first, *others = (rank for rank, _ in those)
        yield f"ranks {first} to {others[-1]}" if others else f"rank {first}", f"{host}: {device}"
