"""One cell of a sweep, trained to its last round and scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fdiff import checkpoint, federation
from fdiff.comm import Communicator
from fdiff.config import Config, DataConfig, stages_of
from fdiff.errors import UserError
from fdiff.evaluation import Model, Scoring, ScoringRequest, refresh_events
from fdiff.federation import (
    append_jsonl,
    check_ranks,
    find_gaps,
    infer_image_shape,
    newest_sound,
    on_rank_0,
    open_checkpoint,
    read_log,
    together,
)
from fdiff.runtime import Stop
from fdiff.sweeps.grid import Cell, Score, Sweep
from fdiff.sweeps.results import check_same, missing, result


def bring_to_end(
    sweep: Sweep, cell: Cell, comm: Communicator, device: torch.device, cache: Path | None, stop: Stop
) -> None:
    """Train and score what the cell's folder lacks; all ranks call it. Errors as `federation.run` and `Scoring`.

    UserError if the folder holds a run of another configuration. Interrupted where `stop` was asked for: what is
    scored by then is kept, as is the last complete round.
    """
    config = cell.config
    on_rank_0(comm, lambda: check_same(config))
    written = on_rank_0(comm, lambda: _rounds_written(config))
    if written and on_rank_0(comm, lambda: not missing(sweep, cell)):
        on_rank_0(comm, lambda: len(result(sweep, cell)))
        return
    # By the checkpoints, too: a round is written down before its checkpoint is there. A log with gaps is made whole.
    if not written or on_rank_0(comm, lambda: _last_round(config)) < config.federation.rounds:
        begun = on_rank_0(comm, config.run_dir.exists)
        federation.run(config, comm, device, resume=begun, stop=stop, brief=True)
    if lacking := on_rank_0(comm, lambda: missing(sweep, cell)):
        _score(sweep.score, lacking, config, comm, device, cache, stop)
    on_rank_0(comm, lambda: len(result(sweep, cell)))


def with_image_shapes(sweep: Sweep, comm: Communicator) -> Sweep:
    """The sweep with side and channels in each cell's configuration; all ranks call it. UserError names a cell."""
    known: dict[Any, DataConfig] = {}
    cells = []
    for cell in sweep.cells:
        config = cell.config
        what = (config.data, config.federation.clients, stages_of(config.model))
        with _naming(cell):
            known[what] = known.get(what) or infer_image_shape(config, comm).data
        cells.append(replace(cell, config=replace(config, data=known[what])))
    return replace(sweep, cells=cells)


def check_before_training(sweep: Sweep, comm: Communicator, device: torch.device, cache: Path | None) -> None:
    """UserError names a cell of which it is known before it is trained that it cannot be, or not be scored.

    All ranks call it. The features of the test splits that it takes are there when the cells are scored.
    """
    checked = set()
    for cell in sweep.cells:
        config = cell.config
        what = (config.data, config.federation.clients, sweep.score.images_of(config))
        if what in checked:
            continue
        if on_rank_0(comm, lambda cell=cell: _seems_complete(sweep, cell)):
            continue
        checked.add(what)
        with _naming(cell):
            together(comm, lambda config=config: check_ranks(config, comm.size))
            Scoring(comm, device, sweep.score.sampling(config), _request(sweep.score, config), cache)


@contextmanager
def _naming(cell: Cell) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        named = UserError(f"{cell.name}: {error}")
        named.agreed = error.agreed
        raise named from None


def _seems_complete(sweep: Sweep, cell: Cell) -> bool:
    """Whether nothing is left to do; a folder that is damaged tells when it is its turn."""
    try:
        return _rounds_written(cell.config) and not missing(sweep, cell)
    except UserError:
        return False


def _request(wanted: Score, config: Config) -> ScoringRequest:
    return ScoringRequest(wanted.images_of(config), wanted.extractor, metrics=("frechet",))


def _rounds_written(config: Config) -> bool:
    if find_gaps(config.run_dir):
        return False
    return len(read_log(config.run_dir, "rounds")) >= config.federation.rounds


def _last_round(config: Config) -> int:
    newest = newest_sound(config.run_dir)
    return newest.round if newest else 0


def _score(
    wanted: Score,
    lacking: list[tuple[int, bool, list[Model]]],
    config: Config,
    comm: Communicator,
    device: torch.device,
    cache: Path | None,
    stop: Stop,
) -> None:
    """Score these models, and append the rows of each to the run's log when it is done."""
    scoring = Scoring(comm, device, wanted.sampling(config), _request(wanted, config), cache)
    for round, ema, models in lacking:
        path = checkpoint.root(config.run_dir) / checkpoint.generation_name(round)
        saved = together(comm, lambda path=path: open_checkpoint(path))
        for rows in scoring.score(saved, ema, local=wanted.is_local(config), models=models, check=stop.check):
            together(comm, lambda rows=rows: append_jsonl(config.run_dir / "scores.jsonl", rows) if rows else None)
    if comm.rank == 0:
        refresh_events(config.run_dir)
