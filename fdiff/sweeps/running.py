"""One cell of a sweep: trained to its last round, scored, and what the table says of it, from its folder alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fdiff import checkpoint, federation
from fdiff.assembly import together
from fdiff.comm import Communicator
from fdiff.config import Config, RuntimeConfig, from_dict, to_dict
from fdiff.errors import UserError
from fdiff.federator import append_jsonl, read_jsonl
from fdiff.forecast import forecast
from fdiff.scoring import Scoring, Wanted, sampling_config, summary
from fdiff.signals import Stop
from fdiff.snapshot import open_checkpoint
from fdiff.sweeps.grid import Cell, Score, Sweep
from fdiff.verdict import distance_of, newest

MAY_DIFFER = ("run", "runtime")  # groups that say where and how it runs, not what it computes


@dataclass(frozen=True)
class Result:
    """A line of the table: a cell after a round. `deviation` and `worst` are None where all share one model."""

    cell: str
    method: str
    partition: str
    clients: int
    local_epochs: int
    round: int
    metric: str
    ema: bool
    score: float
    deviation: float | None
    worst: float | None
    communicated_parameters: int
    saving: float
    wire_bytes: int
    seconds: float


def bring_to_end(
    sweep: Sweep, cell: Cell, comm: Communicator, device: torch.device, runtime: RuntimeConfig, cache: Path, stop: Stop
) -> None:
    """Train and score what the cell's folder lacks; all ranks call it. Errors as `federation.run` and `Scoring`.

    UserError if the folder holds a run of another configuration.
    """
    together(comm, lambda: _check_same(cell.config))
    config = replace(cell.config, runtime=runtime)
    if together(comm, lambda: len(read_jsonl(config.run_dir / "rounds.jsonl"))) < config.federation.rounds:
        federation.run(config, comm, device, resume=True, stop=stop)
    if missing := together(comm, lambda: _missing(sweep, cell)):
        _score(sweep.score, missing, config, comm, device, cache)


def _check_same(config: Config) -> None:
    """UserError if the run folder holds a run of another configuration."""
    file = config.run_dir / "config.yaml"
    if not file.exists():
        return
    old, new = to_dict(from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))), to_dict(config)
    for field, was, now in ((f, old[f], new[f]) for f in new if f not in MAY_DIFFER and old[f] != new[f]):
        if isinstance(now, dict):
            name = next(n for n in now if was[n] != now[n])
            field, was, now = f"{field}.{name}", was[name], now[name]
        raise UserError(f"{file}: was made with {field} = {was!r}, the sweep has {now!r}; give another --out")


def _missing(sweep: Sweep, cell: Cell) -> list[int]:
    """The rounds that are not scored yet."""
    done = {row["round"] for row in _rows(sweep.score, cell.config.run_dir)}
    return [round for round in sweep.rounds(cell) if round not in done]


def _score(
    wanted: Score, rounds: list[int], config: Config, comm: Communicator, device: torch.device, cache: Path
) -> None:
    """Score the given rounds' checkpoints and append the rows to the run's log."""
    folder = checkpoint.folder(config.run_dir)
    saved = together(comm, lambda: [open_checkpoint(folder / checkpoint.generation_name(r)) for r in rounds])
    chosen = {"sampler": wanted.sampler, "steps": wanted.steps, "batch_size": wanted.batch_size}
    sampling = together(comm, lambda: replace(sampling_config(saved[0], **chosen), runtime=config.runtime))
    scoring = Scoring(comm, device, sampling, Wanted(wanted.images, wanted.extractor, metrics=("frechet",)), cache)
    for one in saved:
        rows = [row for ema in (False, True)[: 1 + one.has_ema] for row in scoring.score(one, ema)]
        together(comm, lambda rows=rows: append_jsonl(config.run_dir / "scores.jsonl", rows))


def _rows(wanted: Score, run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's scores that were taken as wanted."""
    return [
        row
        for row in newest(read_jsonl(run_dir / "scores.jsonl"))
        if distance_of(row)
        and not row["local"]
        and all(
            value is None or row[name] == value
            for name, value in (("n", wanted.images), ("sampler", wanted.sampler), ("extractor", wanted.extractor))
        )
        and (wanted.steps is None or row["sampler"] == "ddpm" or row["steps"] == wanted.steps)
    ]


# --- the table's lines -----------------------------------------------------------------------------------------------


def result(sweep: Sweep, cell: Cell, ranks: int) -> list[Result]:
    """The lines of a cell for the rounds that are scored so far, raw model before moving average; ranks as started."""
    config, found = cell.config, []
    rows = _rows(sweep.score, config.run_dir)
    log = read_jsonl(config.run_dir / "rounds.jsonl")
    saving = forecast(config, min(ranks, config.federation.clients))["saving"]
    for round in sweep.rounds(cell):
        for ema in (False, True):
            of_round = [row for row in rows if row["round"] == round and row["ema"] == ema]
            if of_round:
                found.append(_line(cell, of_round, [r for r in log if r["round"] <= round], saving))
    return found


def _line(cell: Cell, rows: list[dict[str, Any]], log: list[dict[str, Any]], saving: float) -> Result:
    fed, name = cell.config.federation, distance_of(rows[0])
    assert name is not None
    facts, many = summary(rows, name), len(rows) > 1
    return Result(
        cell=cell.name,
        method=cell.config.method,
        partition=cell.config.data.partition,
        clients=fed.clients,
        local_epochs=fed.local_epochs,
        round=rows[0]["round"],
        metric=name,
        ema=rows[0]["ema"],
        score=facts["mean"],
        deviation=facts["deviation"] if many else None,
        worst=facts["worst"] if many else None,
        communicated_parameters=sum(r["communicated_parameters"] for r in log),
        saving=saving,
        wire_bytes=sum(r["wire_bytes"] for r in log),
        seconds=sum(sum(r["seconds"].values()) for r in log),
    )
