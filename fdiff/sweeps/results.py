"""What a cell's folder says: which of its models are scored as the sweep wants, and the lines of the table.

Reads logs only; trains and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fdiff.config import Config, flat, to_dict
from fdiff.errors import UserError
from fdiff.evaluation import (
    DISTANCES,
    Model,
    Row,
    images_by_default,
    models_of,
    newest_scores,
    scored_as,
    steps_of,
    summary,
)
from fdiff.federation import MAY_CHANGE, find_gaps, forecast_run, read_config, read_log
from fdiff.sweeps.grid import Cell, Score, Sweep


@dataclass(frozen=True)
class Result:
    """A line of the table: a cell after a round. `deviation` and `worst` are None where all share one model.

    `varied` has the fields of the grid that no other column shows; `local` to `resized_from` are what a score is stored
    with. `saving` is of the rounds so far, as N is.
    """

    cell: str
    method: str
    partition: str
    clients: int
    local_epochs: int
    varied: dict[str, Any]
    round: int
    metric: str
    ema: bool
    score: float
    deviation: float | None
    worst: float | None
    local: bool
    n: int
    n_real: int
    split: str
    sampler: str
    steps: int
    extractor: str
    checksum: str
    resized_from: int | None
    communicated_parameters: int
    saving: float
    wire_bytes: int
    seconds: float


SHOWN = ("method", "data.partition", "federation.clients", "federation.local_epochs")  # fields with a column
FACTS = ("local", "n", "n_real", "split", "sampler", "steps", "extractor", "checksum", "resized_from")


def check_same(config: Config) -> None:
    """UserError if the run folder holds a run of another configuration."""
    file = config.run_dir / "config.yaml"
    if not file.exists():
        return
    try:
        made_with = read_config(config.run_dir)
    except UserError as error:
        raise UserError(f"{error}; put it right, or remove the folder to train it again") from None
    old, new = flat(to_dict(made_with)), flat(to_dict(config))
    for field, was, now in ((name, old[name], new[name]) for name in new):
        if was != now and not _may_differ(field, was, now):
            raise UserError(f"{file}: was made with {field} = {was!r}, the sweep has {now!r}; give another --out")


def _may_differ(field: str, was: Any, now: Any) -> bool:
    """Whether a run stays the cell's: as for a resumption, but not shorter than it was, nor in another arithmetic."""
    if field == "federation.rounds":
        return was < now
    return field != "runtime.precision" and field.startswith(MAY_CHANGE)


def missing(sweep: Sweep, cell: Cell) -> list[tuple[int, bool, list[Model]]]:
    """What is not scored yet: rounds, whether their moving averages are meant, and of which models."""
    found = []
    for round in sweep.rounds(cell):
        for ema in _kinds(cell.config):
            scored = {row["client"] for row in _rows(sweep.score, cell.config, round, ema)}
            models = _models(sweep.score, cell.config, round)
            found.append((round, ema, [model for model in models if model not in scored]))
    return [(round, ema, models) for round, ema, models in found if models]


def _models(wanted: Score, config: Config, round: int) -> list[Model]:
    """The models that are scored after a round; before its average only clients that trained in it have one."""
    if not wanted.is_local(config):
        return models_of(config)
    row = next((r for r in read_log(config.run_dir, "rounds") if r["round"] == round), None)
    return [c for c in row["selected"] if str(c) not in row["dropped"]] if row else models_of(config)


def result(sweep: Sweep, cell: Cell) -> list[Result]:
    """The lines of a cell for the rounds of which all models are scored, raw before moving average.

    UserError names the file of the folder that is not this cell's, or damaged.
    """
    config, found = cell.config, []
    check_same(config)
    if gaps := find_gaps(config.run_dir):
        raise UserError(gaps[0])
    log = read_log(config.run_dir, "rounds")
    for round in sweep.rounds(cell):
        for ema in _kinds(config):
            rows = _rows(sweep.score, config, round, ema)
            if len(rows) == len(_models(sweep.score, config, round)):
                found.append(_line(cell, rows, [r for r in log if r["round"] <= round]))
    return found


def _kinds(config: Config) -> tuple[bool, ...]:
    """Whether moving averages are meant: the raw models, and those where the run keeps them."""
    return (False, True) if config.optim.ema else (False,)


def _rows(wanted: Score, config: Config, round: int, ema: bool) -> list[Row]:
    """The newest row of each model of a round that was scored as wanted; all in one way, the one written last."""
    log = read_log(config.run_dir, "scores")
    fitting = [r for r in log if r["round"] == round and r["ema"] == ema and _is_as_wanted(r, wanted, config)]
    return newest_scores([row for row in fitting if scored_as(row) == scored_as(fitting[-1])])


def _is_as_wanted(row: Row, wanted: Score, config: Config) -> bool:
    """Whether a row is of scores as they are wanted."""
    sampling = wanted.sampling(config)
    expected = {
        "local": wanted.is_local(config),
        "n": wanted.images_of(config) or images_by_default(row["n_real"]),
        "sampler": sampling.sample.sampler,
        "steps": steps_of(sampling),
        "extractor": wanted.extractor_of(config),
    }
    return DISTANCES[expected["extractor"]] in row["scores"] and expected.items() <= row.items()


def _line(cell: Cell, rows: list[Row], log: list[dict[str, Any]]) -> Result:
    config, round, name = cell.config, rows[0]["round"], DISTANCES[rows[0]["extractor"]]
    facts, many = summary(rows, name), len(rows) > 1
    full = replace(config, method="full", federation=replace(config.federation, rounds=round))
    if len(log) < round:
        raise UserError(f"{config.run_dir / 'rounds.jsonl'}: lacks rounds before {round}, which is scored")
    moved, sent = (sum(r[name] for r in log) for name in ("communicated_parameters", "wire_bytes"))
    return Result(
        cell=cell.name,
        method=config.method,
        partition=config.data.partition,
        clients=config.federation.clients,
        local_epochs=config.federation.local_epochs,
        varied={field: value for field, value in cell.point.items() if field not in SHOWN},
        round=round,
        metric=name,
        ema=rows[0]["ema"],
        score=facts["mean"],
        deviation=facts["deviation"] if many else None,
        worst=facts["worst"] if many else None,
        **{fact: rows[0].get(fact) for fact in FACTS},
        communicated_parameters=moved,
        saving=1 - moved / forecast_run(full, ranks=1)["communicated_parameters_full"],
        wire_bytes=sent,
        seconds=sum(sum(r["seconds"].values()) for r in log),
    )
