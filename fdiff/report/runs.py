"""A run as its folder tells it, which may come from anybody: configuration, logs, sample grids. Reads only."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import pstdev
from typing import Any

from PIL import Image

from fdiff.config import Config
from fdiff.errors import UserError, first_line
from fdiff.evaluation import Row, described, find_warnings, newest_scores, scored_as
from fdiff.federation import (
    check_ranks,
    find_gaps,
    images_of,
    read_config,
    read_log,
    read_regular,
    read_setting,
)

MAX_PIXELS = 64_000_000  # of a sample grid
MAX_PLANNED = 10_000_000  # clients times rounds, for which the plan of every method takes minutes


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    `grids` are PNG images by round; `scores` the newest of each model and way of scoring, in the order of writing.
    """

    name: str
    folder: Path
    config: Config
    setting: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    scores: list[Row]
    grids: dict[int, bytes]

    @property
    def ranks(self) -> int:
        """The ranks on which it was last started, 1 if nobody wrote that down."""
        return max(1, len(self.setting.get("ranks", [])))

    @property
    def images(self) -> dict[int, int] | None:
        """Training images of each client, if somebody wrote that down."""
        return images_of(self.setting, self.config.federation.clients)

    @property
    def seconds(self) -> dict[str, float]:
        """Time of all rounds by phase."""
        phases = list(self.rounds[-1]["seconds"]) if self.rounds else []
        return {phase: sum(r["seconds"].get(phase, 0.0) for r in self.rounds) for phase in phases}

    def sent_until(self) -> dict[int, float]:
        """MB that all ranks together had sent by the end of each round."""
        totals = itertools.accumulate(r["wire_bytes"] / 1e6 for r in self.rounds)
        return dict(zip((r["round"] for r in self.rounds), totals, strict=True))

    @property
    def device_hours(self) -> float | None:
        """Hours of all rounds times the ranks, each with a device of its own; None where it was not written down."""
        if not all("ranks" in row for row in self.rounds):
            return None
        return sum(sum(row["seconds"].values()) * row["ranks"] for row in self.rounds) / 3600

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that a rank has taken, of its device's memory or, without one, of the host's."""
        return max((row["peak_memory"] for row in self.rounds if "peak_memory" in row), default=None)

    @property
    def began(self) -> datetime | None:
        """When its first round began."""
        return datetime.fromisoformat(self.rounds[0]["began"]) if self.rounds and "began" in self.rounds[0] else None

    @property
    def dropped(self) -> list[tuple[int, int, str]]:
        """(round, client, why) where a round went on without a client whose training had failed."""
        return [(r["round"], int(client), why) for r in self.rounds for client, why in r.get("dropped", {}).items()]

    def by_client(self, name: str) -> dict[int, list[tuple[int, float]]]:
        """(round, value) of a column of the clients' log, by client."""
        found: dict[int, list[tuple[int, float]]] = {}
        for row in self.clients:
            found.setdefault(row["client"], []).append((row["round"], row[name]))
        return found

    @property
    def extractors(self) -> list[str]:
        """The extractors with which it is scored."""
        return sorted({row["extractor"] for row in self.scores if not row["local"]})

    def scored(self, extractor: str, ema: bool, local: bool = False) -> dict[int, list[Row]]:
        """The rows of scores by round, of all clients or of the global model, in the way that was written last.

        After the average, or with `local` before it.
        """
        rows = [row for row in self.scores if row["extractor"] == extractor and row["local"] == local]
        found: dict[int, list[Row]] = {}
        for row in rows:
            if row["ema"] == ema and scored_as(row) == scored_as(rows[-1]):
                found.setdefault(row["round"], []).append(row)
        return dict(sorted(found.items()))

    def averaged(self, name: str, extractor: str, ema: bool) -> list[tuple[int, float]]:
        """(round, mean over the models) of a score."""
        rounds = self.scored(extractor, ema)
        having = {r: [number(row, name) for row in rows if name in row["scores"]] for r, rows in rounds.items()}
        return [(r, sum(v) / len(v)) for r, v in having.items() if v]

    def spread_of_loss(self) -> float | None:
        """The deviation of the last round's loss over the clients that trained in it; None of fewer than two."""
        losses = [row["loss"] for row in self.clients if row["round"] == self.rounds[-1]["round"]]
        return pstdev(losses) if len(losses) > 1 else None

    def told(self) -> list[str]:
        """What must be said beside its scores: a line for each extractor."""
        rounds = [self.scored(extractor, False) for extractor in self.extractors]
        return [described(of_extractor[max(of_extractor)][0]) for of_extractor in rounds if of_extractor]

    def warnings(self) -> list[str]:
        """The signs of failure that its scores show."""
        rows = [row for local in (False, True) for _, rows in self.last_scored(local) for row in rows]
        return find_warnings(rows, self.config, self.folder)

    def last_scored(self, local: bool = False) -> Iterator[tuple[bool, list[Row]]]:
        """The rows of the last round of each extractor and kind of weights, behind whether those are the average."""
        for extractor in sorted({row["extractor"] for row in self.scores}):
            for ema in (False, True):
                if rounds := self.scored(extractor, ema, local):
                    yield ema, rounds[max(rounds)]


def number(row: Row, name: str) -> float:
    """A score as a number: of a list, how many."""
    score = row["scores"][name]
    return len(score) if isinstance(score, list) else score


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those whose folders have one name named by as much of their paths as tells them apart."""
    paths = [run.folder.resolve().parts for run in runs]

    def name(path: tuple[str, ...]) -> str:
        tails = (path[-n:] for n in range(1, len(path) + 1))
        alone = (tail for tail in tails if sum(other[-len(tail) :] == tail for other in paths) == 1)
        return str(Path(*next(alone, path)))

    return [replace(run, name=name(path)) for run, path in zip(runs, paths, strict=True)]


def read_run(folder: Path) -> Run:
    """The run in a folder; UserError names the file, and the line, that is not as `fdiff` writes it."""
    config, setting = read_config(folder), read_setting(folder)
    logs = [read_log(folder, name) for name in ("rounds", "clients", "scores")]
    if gaps := find_gaps(folder):
        raise UserError(gaps[0])
    rounds, clients, scores = logs
    grids = {round: _read_grid(path, folder) for round, path in sorted(_grids(folder / "samples"))}
    run = Run(folder.resolve().name, folder, config, setting, rounds, clients, newest_scores(scores), grids)
    _check_size(run)
    return run


def _check_size(run: Run) -> None:
    """UserError if the run has more ranks than clients, or more of rounds and clients than can be planned in time."""
    fed = run.config.federation
    try:
        check_ranks(run.config, run.ranks)
    except UserError as error:
        raise UserError(f"{run.folder / 'setting.json'}: {error}") from None
    if fed.rounds * fed.clients > MAX_PLANNED:
        raise UserError(
            f"{run.folder / 'config.yaml'}: {fed.rounds} rounds of {fed.clients} clients are more than a report plans "
            f"({MAX_PLANNED} in all); make it of a smaller run"
        )


def _grids(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("round-*.png"):
        if name := re.fullmatch(r"round-([0-9]+)\.png", path.name):
            yield int(name[1]), path


def _read_grid(path: Path, run_dir: Path) -> bytes:
    """A sample grid, decoded and written again as PNG: nothing that a file holds beside its pixels is passed on."""
    try:
        if not path.resolve().is_relative_to(run_dir.resolve()):
            raise ValueError("it is a link that leads out of the run")
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(read_regular(path)), formats=["PNG"]) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
            pixels = image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the decoder raise anything
        raise UserError(f"{path}: is not a PNG image of this run ({first_line(error)}); remove it") from None
    pixels.info = {}  # a colour profile would be written, too
    written = io.BytesIO()
    pixels.save(written, "PNG", compress_level=1)  # what the page shows is made of it: see `grids`
    return written.getvalue()
