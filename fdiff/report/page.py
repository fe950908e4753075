"""The page: what is drawn of which runs, and the template that it goes into. One string; it needs no network."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fdiff import __version__
from fdiff.config import flat, to_dict
from fdiff.errors import UserError, printable
from fdiff.evaluation import DISTANCES
from fdiff.federation import forecast_run
from fdiff.model import parts_of
from fdiff.plan import methods_for
from fdiff.report import charts
from fdiff.report.charts import Curve
from fdiff.report.runs import Run, named_apart, number

SCORES = {  # name: what the chart's axis says of it, and of its values
    "fd_fmnist": ("fd_fmnist", "lower is better"),
    "fid": ("FID", "lower is better"),
    "kid": ("KID", "lower is better"),
    "precision": ("precision", "1 is best"),
    "recall": ("recall", "1 is best"),
    "density": ("density", "1 as real"),
    "coverage": ("coverage", "1 is best"),
    "total_variation": ("classes, total variation", "0 is best"),
    "missing_classes": ("missing classes", "0 is best"),
}


def render(runs: Sequence[Run]) -> str:
    """The HTML page of these runs, side by side."""
    runs = named_apart(runs)
    environment = Environment(
        loader=PackageLoader("fdiff.report"), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    return environment.get_template("page.html.j2").render(
        runs=runs,
        version=__version__,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        facts=[run.facts() for run in runs],
        curves=list(_curves(runs)),
        told=[(run.name, line) for run in runs for line in run.told()],
        grids=[_grids(run) for run in runs],
        partitions=[_partition(run) for run in runs],
        communication=[_communication(run) for run in runs],
        time=_time(runs),
        by_bytes=list(_by_bytes(runs)),
        fields=_fields(runs),
        environments=[_environment(run) for run in runs],
    )


def _shown(value: Any) -> Any:
    """Text without what would turn round the text about it or end its line, escaped; markup of our own as it is."""
    return printable(value) if type(value) is str else value


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    """The loss, and every score that some run has."""
    losses = {
        run.name: Curve([(r["round"], r["loss"]) for r in run.rounds], (), list(run.by_client("loss").values()))
        for run in runs
    }
    if any(losses.values()):
        yield charts.curves(losses, "loss of the last local epoch")
    extractors = sorted({extractor for run in runs for extractor in run.extractors})
    for (name, (title, best)), extractor in itertools.product(SCORES.items(), extractors):
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


def _grids(run: Run) -> list[dict[str, Any]]:
    """The sample grids by round, as data URLs."""
    return [
        {"round": round, "url": "data:image/png;base64," + base64.b64encode(png).decode()}
        for round, png in run.grids.items()
    ]


def _partition(run: Run) -> str:
    rows = run.setting.get("clients", [])
    if not rows:
        return ""
    private = any("labels" not in row for row in rows)
    counts = [{"images": row["images"]} if private else row["labels"] for row in rows]
    return charts.heat_map(counts, f"images of each client by label, {run.config.data.partition}")


def _communication(run: Run) -> str:
    """N of each method with this run's configuration, the run's own method highlighted."""
    methods = dict.fromkeys([*methods_for(parts_of(run.config)), run.config.method])
    costs = {}
    for method in methods:
        with suppress(UserError):  # what it shares may be nothing for the run's compression
            costs[method] = forecast_run(replace(run.config, method=method), run.ranks, images=run.images)
    millions = {method: cost["communicated_parameters"] / 1e6 for method, cost in costs.items()}
    notes = {method: f"−{cost['saving']:.1%}" if cost["saving"] else "" for method, cost in costs.items()}
    return charts.bars(millions, "N, million parameters in all rounds", run.config.method, notes)


def _time(runs: Sequence[Run]) -> str:
    seconds = {run.name: run.seconds for run in runs if run.seconds}
    return charts.stacked(seconds, "seconds in all rounds") if seconds else ""


def _fields(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(field, its value in each run, whether the runs differ in it)."""
    values = [{name: str(value) for name, value in flat(to_dict(run.config)).items()} for run in runs]
    return [(name, [v[name] for v in values], len({v[name] for v in values}) > 1) for name in values[0]]


def _environment(run: Run) -> list[tuple[str, str]]:
    setting = run.setting
    known = [name for name in ("fdiff", "torch", "python", "system", "communicator") if name in setting]
    facts = [(name, str(setting[name])) for name in known]
    places = [f"{rank['host']}: {rank['device']}" for rank in setting.get("ranks", [])]
    return facts + [(f"rank {i}", place) for i, place in enumerate(places)]
