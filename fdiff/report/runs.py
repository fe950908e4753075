"""A run as its folder tells it: configuration, setting, logs, scores, sample grids. Reads only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fdiff.config import Config, from_dict
from fdiff.errors import UserError
from fdiff.federator import read_jsonl
from fdiff.forecast import forecast
from fdiff.verdict import distance_of, mean_distance, newest, warnings


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `grids` are PNG files by round; `scores` the newest of each model and way of scoring."""

    name: str
    folder: Path
    config: Config
    setting: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    grids: dict[int, Path]

    @property
    def seconds(self) -> dict[str, float]:
        """Time of all rounds by phase."""
        phases = list(self.rounds[-1]["seconds"]) if self.rounds else []
        return {phase: sum(r["seconds"].get(phase, 0.0) for r in self.rounds) for phase in phases}

    def by_client(self, name: str) -> dict[int, list[tuple[int, float]]]:
        """(round, value) of a column of the clients' log, by client."""
        found: dict[int, list[tuple[int, float]]] = {}
        for row in self.clients:
            found.setdefault(row["client"], []).append((row["round"], row[name]))
        return found

    def scored(self, ema: bool) -> dict[int, list[dict[str, Any]]]:
        """The rows of scores by round: of all clients or the global model, after the average, scored the last way."""
        rows = [r for r in self.scores if r["ema"] == ema and not r["local"]]
        ways = [(r["n"], r["checksum"], r["sampler"], r["steps"]) for r in rows]
        found: dict[int, list[dict[str, Any]]] = {}
        for row, way in zip(rows, ways, strict=True):
            if way == ways[-1]:
                found.setdefault(row["round"], []).append(row)
        return found

    def averaged(self, name: str, ema: bool) -> list[tuple[int, float]]:
        """(round, mean over the models) of a score."""
        rounds = self.scored(ema)
        having = {r: [row["scores"][name] for row in rows if name in row["scores"]] for r, rows in rounds.items()}
        return [(r, sum(v) / len(v)) for r, v in sorted(having.items()) if v]

    def facts(self) -> dict[str, str]:
        """The row of this run in the table of runs."""
        fed, cost = self.config.federation, forecast(self.config, max(1, len(self.setting.get("ranks", []))))
        sent = sum(sum(r["sent_bytes"].values()) for r in self.rounds)
        return {
            "method": self.config.method,
            "partition": self.config.data.partition,
            "clients": str(fed.clients),
            "local epochs": str(fed.local_epochs),
            "rounds": f"{len(self.rounds)} of {fed.rounds}",
            "loss": f"{self.rounds[-1]['loss']:.4f}" if self.rounds else "–",
            "score": self.score_text(),
            "N": f"{sum(r['communicated_parameters'] for r in self.rounds):,}",
            "saving": f"{cost['saving']:.1%}",
            "sent": f"{sent / 1e6:,.1f} MB",
            "time": f"{sum(self.seconds.values()):,.0f} s",
        }

    def score_text(self) -> str:
        """The last round's distance, mean over the models, and of which weights."""
        best = []
        for ema in (False, True):
            rounds = self.scored(ema)
            rows = rounds[max(rounds)] if rounds else []
            if rows and (name := distance_of(rows[0])):
                best.append(f"{name} {mean_distance(rows):.2f}{' (average)' if ema else ''}")
        return ", ".join(best) or "–"

    def warnings(self) -> list[str]:
        """The signs of failure that its scores show."""
        last = max((r["round"] for r in self.scores), default=0)
        return warnings([r for r in self.scores if r["round"] == last], self.config, self.folder)


def read_run(folder: Path) -> Run:
    """The run in a folder; UserError if it is none, or not readable."""
    try:
        config = from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        setting = _json_or_empty(folder / "setting.json")
        logs = [read_jsonl(folder / f"{name}.jsonl") for name in ("rounds", "clients", "scores")]
    except OSError as error:
        raise UserError(f"{folder}: is not a run folder of fdiff train ({error.strerror}: config.yaml)") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: cannot be read as a run ({' '.join(str(error).split())})") from None
    rounds, clients, scores = logs
    grids = dict(sorted(_grids(folder / "samples")))
    return Run(folder.resolve().name, folder, config, setting, rounds, clients, newest(scores), grids)


def _grids(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("round-*.png"):
        yield int(path.stem.removeprefix("round-")), path


def _json_or_empty(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
