"""A sweep file: a preset, fields over it, lists of values of which every combination is a run, and how to score.

    preset: mini
    fields: {federation: {rounds: 5}}
    grid:
      method: [full, udec]
      federation.clients: [5, 10]
    score: {images: 200, sampler: ddim, steps: 20, rounds: [1, 5]}

A value of a group, like `model: [{bottleneck_blocks: 1}, {}]`, is several fields at once. `score.rounds` are the rounds
that are scored, by default the last one. With `score.local` the models of clients with private parts are scored as they
were before the last average, as the paper did. `score.total_images` are drawn of all models of a run together, in place
of `score.images` of each. Where and how it runs, the group `runtime`, is not the file's: it comes with the call, and is
the same for all runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from fdiff.config import Config, RuntimeConfig, from_dict, to_dict
from fdiff.config_file import lay_over, read_fields
from fdiff.errors import UserError
from fdiff.evaluation import DISTANCES, default_extractor, models_of, sampling_config
from fdiff.federation import private_parts
from fdiff.presets import preset

SHIPPED = Path(__file__).parent
KEYS = ("preset", "fields", "grid", "score")
MAX_CELLS = 1000
MAX_NAME = 100  # characters of a cell's name, which a folder and a column of the table bear


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its name, which is its folder's, its configuration, and what of that the grid varies."""

    name: str
    config: Config
    point: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How the runs are scored; None leaves the choice as `fdiff evaluate` does. `rounds`: by default the last."""

    images: int | None = None
    total_images: int | None = None
    local: bool = False
    sampler: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    extractor: str | None = None
    rounds: tuple[int, ...] = ()

    def sampling(self, config: Config) -> Config:
        """The configuration of a run as its images are drawn to be scored. UserError if that cannot be."""
        return sampling_config(config, sampler=self.sampler, steps=self.steps, batch_size=self.batch_size)

    def is_local(self, config: Config) -> bool:
        """Whether the models of a run are scored before the average: those of clients that keep private parts."""
        return self.local and bool(private_parts(config))

    def images_of(self, config: Config) -> int | None:
        """Images that are drawn of each model of a run; None: as many as the test split has, at most 10,000."""
        return self.images if self.total_images is None else max(1, self.total_images // len(models_of(config)))

    def extractor_of(self, config: Config) -> str:
        """The name of the extractor."""
        return self.extractor or default_extractor(config.data)


@dataclass(frozen=True)
class Sweep:
    """The runs of a file, in the order of its grid, and how they are scored."""

    cells: list[Cell]
    score: Score

    def rounds(self, cell: Cell) -> tuple[int, ...]:
        """The rounds of a cell that are scored."""
        return self.score.rounds or (cell.config.federation.rounds,)


def find(name: str) -> Path:
    """The file of that name, or the one that ships with fdiff; UserError lists those."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise UserError(f"file: {name!r} is no file and not one of those that ship with fdiff: {', '.join(shipped)}")


def read(file: Path, out: Path, runtime: RuntimeConfig) -> Sweep:
    """The sweep of a file, its run folders under `out`; UserError names the file and the key that is wrong.

    A combination that comes twice is one cell.
    """
    given = read_fields(file, "file")
    try:
        return _sweep(given, out, runtime)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _sweep(given: Mapping[Any, Any], out: Path, runtime: RuntimeConfig) -> Sweep:
    if unknown := set(given) - set(KEYS):
        raise UserError(f"{min(map(str, unknown))}: no such key; a sweep has grid, and may have preset, fields, score")
    if not isinstance(given.get("grid"), dict) or not given["grid"]:
        raise UserError("must have the key grid, with fields")
    base = to_dict(_preset(given["preset"]) if "preset" in given else Config())
    _put(base, _table(given, "fields"))
    grid = _grid(given["grid"])
    for field, instead in (("runtime", "give it by flags, --runtime.*"), ("run.dir", "give --out")):
        group, _, name = field.partition(".")
        unlike = base[group] != to_dict(RuntimeConfig()) if field == "runtime" else base[group][name] is not None
        if unlike or any(key == field or key.startswith(f"{field}.") for key in grid):
            raise UserError(f"{field}: is not for a sweep's file; {instead}")
    base["runtime"] = to_dict(runtime)
    score = _score(_table(given, "score"))
    points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    cells: dict[Config, Cell] = {}
    for point in points:
        cell = _cell(base, point, score, out)
        cells.setdefault(replace(cell.config, run=replace(cell.config.run, dir=None)), cell)
    return Sweep(list(cells.values()), score)


def _table(given: Mapping[Any, Any], key: str) -> Any:
    """What stands under a key; a key with nothing under it is an empty table."""
    return {} if given.get(key) is None else given[key]


def _preset(name: Any) -> Config:
    if not isinstance(name, str):
        raise UserError(f"preset: {name!r} is not the name of a preset")
    return preset(name)


def _grid(grid: Mapping[Any, Any]) -> dict[str, list[Any]]:
    """The values of each field; of every combination, the last field changing fastest, a cell is made."""
    for field, values in grid.items():
        if not isinstance(field, str):
            raise UserError(f"grid: {field!r} is not a field; they are like federation.clients")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{field}: {values!r} is not a list of values")
    if (cells := math.prod(map(len, grid.values()))) > MAX_CELLS:
        raise UserError(f"grid: has {cells} combinations; a sweep has at most {MAX_CELLS}")
    return dict(grid)


def _cell(base: Mapping[str, Any], point: Mapping[str, Any], score: Score, out: Path) -> Cell:
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in base.items()}
    for field, value in point.items():
        group, dot, name = field.partition(".")
        _put(values, {group: {name: value}} if dot else {field: value})
    name = _name(point)
    config = from_dict(values)
    _check_scored(name, config, score.rounds)
    score.sampling(config)  # better refused now than when the training is done
    kept = max(config.run.keep_checkpoints, config.federation.rounds if score.rounds else 0)
    local = config.run.keep_local or score.is_local(config)
    run = replace(config.run, dir=str(out / name), keep_checkpoints=kept, keep_local=local)
    return Cell(name, replace(config, run=run), point)


def _name(point: Mapping[str, Any]) -> str:
    """The name of a combination, and of its folder, which lies nowhere else and is no other one's."""
    name = "_".join(f"{field.rpartition('.')[2]}-{told(value)}" for field, value in point.items())
    plain = re.sub(r"[^\w.,+=\[\] -]", "-", name)[:MAX_NAME]
    return name if plain == name else f"{plain}-{blake3(name.encode()).hexdigest()[:8]}"


def told(value: Any) -> str:
    """A value of the grid as names and tables have it: several fields as `a=1,b=2`, none as `default`."""
    if isinstance(value, dict):
        return ",".join(f"{name}={told(v)}" for name, v in value.items()) or "default"
    return str(value)


def _check_scored(name: str, config: Config, rounds: Sequence[int]) -> None:
    """UserError unless there will be a checkpoint of each of these rounds."""
    last = config.federation.rounds
    if rounds and max(rounds) > last:
        raise UserError(f"score.rounds: {max(rounds)} is beyond the {last} rounds of {name}")
    if unsaved := [round for round in rounds if not config.saves(round)]:
        raise UserError(
            f"score.rounds: {unsaved[0]} has no checkpoint in {name}, whose run.checkpoint_every is "
            f"{config.run.checkpoint_every}; it must be a multiple of that, or the last round"
        )


def _put(values: dict[str, Any], fields: Any) -> None:
    """Put fields over the values, in place; UserError if they are none."""
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"fields: {fields!r} is not a group of fields")
    lay_over(values, fields)


def _score(given: Any) -> Score:
    known = list(Score.__dataclass_fields__)
    if not isinstance(given, dict) or set(given) - set(known):
        raise UserError(f"score: {given!r} is not valid; it may have {', '.join(known)}")
    extractor, rounds, local = given.get("extractor"), given.get("rounds", []), given.get("local", False)
    for key in ("images", "total_images"):
        if not (given.get(key) is None or _positive(given[key])):
            raise UserError(f"score.{key}: {given[key]!r} is not valid; it must be a whole number, at least 1")
    if given.get("images") is not None and given.get("total_images") is not None:
        raise UserError("score.total_images: is not valid beside score.images; give one of them")
    if not isinstance(local, bool):
        raise UserError(f"score.local: {local!r} is not valid; it must be true or false")
    if extractor not in (None, *DISTANCES):
        raise UserError(f"score.extractor: {extractor!r} is not valid; choose one of {', '.join(DISTANCES)}")
    if not (isinstance(rounds, list) and all(map(_positive, rounds))):
        raise UserError(f"score.rounds: {rounds!r} is not valid; it must be a list of rounds, from 1")
    return Score(**{**given, "rounds": tuple(sorted(set(rounds)))})


def _positive(value: Any) -> bool:
    return type(value) is int and value >= 1
