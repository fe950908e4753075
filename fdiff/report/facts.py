"""The page's tables: a row for each fact, a cell for each run, the best value of a row marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fdiff.config import flat, to_dict
from fdiff.evaluation import DISTANCES, summaries
from fdiff.evaluation import Row as ScoreRow
from fdiff.federation import GIB, duration
from fdiff.report.runs import Run, number

NONE = "–"
Better = Callable[..., float]  # min or max

SCORES: dict[str, tuple[str, str, Better | None]] = {  # name: its title, what its values say, which of them is better
    **{name: ("FID" if name == "fid" else name, "lower is better", min) for name in DISTANCES.values()},
    "kid": ("KID", "lower is better", min),
    "precision": ("precision", "1 is best", max),
    "recall": ("recall", "1 is best", max),
    "density": ("density", "1 as real", None),
    "coverage": ("coverage", "1 is best", max),
    "total_variation": ("classes, total variation", "0 is best", min),
    "missing_classes": ("missing classes", "0 is best", min),
}


@dataclass(frozen=True)
class Fact:
    """A row: what its cells say, and which of them are the best."""

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Score:
    """A score of the models of a run's last scored round: their mean, and what a cell shows of them."""

    mean: float
    text: str


def overview(runs: Sequence[Run], savings: Sequence[float | None]) -> list[Fact]:
    """What each run is, what came of it, and what it cost; `savings` are the shares of N against FULL."""
    known = _known(runs)
    return [
        Fact("method", [run.config.method for run in runs]),
        Fact("partition", [run.config.data.partition for run in runs]),
        Fact("clients", [str(run.config.federation.clients) for run in runs]),
        Fact("local epochs", [str(run.config.federation.local_epochs) for run in runs]),
        Fact("rounds", [f"{len(run.rounds)} of {run.config.federation.rounds}" for run in runs]),
        _compared("loss", [run.rounds[-1]["loss"] if run.rounds else None for run in runs], _losses(runs), min),
        *(fact for fact in known if fact.name.startswith((*DISTANCES.values(), "FID", "missing classes"))),
        *_costs(runs, savings),
    ]


def scores(runs: Sequence[Run]) -> list[Fact]:
    """Every score of the last scored round."""
    return _known(runs)


def _costs(runs: Sequence[Run], savings: Sequence[float | None]) -> Iterator[Fact]:
    def compared(name: str, values: Sequence[float | None], show: Callable[..., str], better: Better = min) -> Fact:
        return _compared(name, values, [NONE if value is None else show(value) for value in values], better)

    ended = [run if run.rounds else None for run in runs]
    yield compared("N", [run and sum(r["communicated_parameters"] for r in run.rounds) for run in ended], "{:,}".format)
    yield compared("saving", savings, "{:.1%}".format, max)
    sent = [run and sum(r["wire_bytes"] for r in run.rounds) / 1e6 for run in ended]
    yield compared("sent", sent, "{:,.1f} MB".format)
    yield Fact("date", [f"{run.began:%Y-%m-%d %H:%M}" if run.began else NONE for run in runs])
    yield compared("duration", [run and sum(run.seconds.values()) for run in ended], duration)
    yield compared("device-hours", [run and run.device_hours for run in ended], _hours)
    yield compared("peak memory of a rank", [run.peak_memory for run in runs], lambda n: f"{n / GIB:.2f} GiB")


def phases(runs: Sequence[Run]) -> list[Fact]:
    """Seconds by phase, of all rounds and of one."""
    names = dict.fromkeys(phase for run in runs for phase in run.seconds)
    found = []
    for name in names:
        seconds = [run.seconds.get(name) for run in runs]
        cells = [
            NONE if s is None else f"{duration(s)} ({s / len(run.rounds):,.2f} s a round)"
            for s, run in zip(seconds, runs, strict=True)
        ]
        found.append(_compared(name, seconds, cells, min))
    return found


def fields(runs: Sequence[Run]) -> tuple[list[Fact], list[tuple[str, str]]]:
    """The fields of the configuration in which runs differ, and those with one value in all of them."""
    values = [{name: str(value) for name, value in flat(to_dict(run.config)).items()} for run in runs]
    names = dict.fromkeys(name for of_run in values for name in of_run)
    rows = {name: [of_run.get(name, NONE) for of_run in values] for name in names}
    differ = [Fact(name, cells) for name, cells in rows.items() if len(set(cells)) > 1]
    return differ, [(name, cells[0]) for name, cells in rows.items() if len(set(cells)) == 1]


def _compared(name: str, values: Sequence[float | None], cells: list[str], better: Better | None) -> Fact:
    """A row whose best cells are marked, those that show the same number with them; none where all do."""
    shown = [None if value is None else cell.split(" ±")[0] for value, cell in zip(values, cells, strict=True)]
    known = [value for value in values if value is not None]
    if better is None or len({number for number in shown if number is not None}) < 2:
        return Fact(name, cells)
    best = shown[values.index(better(known))]
    return Fact(name, cells, frozenset(i for i, number in enumerate(shown) if number == best))


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


def _losses(runs: Sequence[Run]) -> list[str]:
    return [_spread(run.rounds[-1]["loss"], run.spread_of_loss(), 4) if run.rounds else NONE for run in runs]


def _spread(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def _known(runs: Sequence[Run]) -> list[Fact]:
    """A row for every score that some run has, of the raw weights and of their moving average."""
    found = []
    for name, (title, _, better) in SCORES.items():
        for extractor in sorted({extractor for run in runs for extractor in run.extractors}):
            for ema in (False, True):
                of_runs = [_score(run, name, extractor, ema) for run in runs]
                if any(of_runs):
                    several = len({e for run in runs for e in run.extractors}) > 1 and name not in DISTANCES.values()
                    row = title + (f" by {extractor}" if several else "") + (", average" if ema else "")
                    means, cells = [s and s.mean for s in of_runs], [s.text if s else NONE for s in of_runs]
                    found.append(_compared(row, means, cells, better))
    return found


def _score(run: Run, name: str, extractor: str, ema: bool) -> Score | None:
    rounds = run.scored(extractor, ema)
    rows = [row for row in rounds[max(rounds)] if name in row["scores"]] if rounds else []
    if not rows:
        return None
    if name == "missing_classes":
        return Score(sum(number(row, name) for row in rows) / len(rows), _missing(rows))
    summary = summaries([{**row, "scores": {name: row["scores"][name]}} for row in rows])[name]
    digits = 2 if name in DISTANCES.values() else 4 if name == "kid" else 3
    return Score(summary["mean"], _spread(summary["mean"], summary["deviation"] if len(rows) > 1 else None, digits))


def _missing(rows: Sequence[ScoreRow]) -> str:
    """The classes that the models do not draw: each one's, or of many models how many lack some."""
    lacking = [row for row in rows if row["scores"]["missing_classes"]]
    if len(lacking) > 5:
        return f"{len(lacking)} of {len(rows)} clients lack some"
    found = []
    for row in lacking:
        model = "" if row["client"] is None else f"client {row['client']}: "
        found.append(model + ", ".join(map(str, row["scores"]["missing_classes"])))
    return "; ".join(found) or "none"
