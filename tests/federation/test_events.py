"""What TensorBoard reads of a run: one point a round after a resume, the scores of the log, a row in its own table."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import CONFIG, client_row, round_row, score_row, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fdiff.config import RunConfig
from fdiff.evaluation.events import refresh_events, score_curves
from fdiff.federation import events


@pytest.fixture(autouse=True)
def each_file_is_younger(monkeypatch):
    """Files are read in the order of their names, which have whole seconds."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def read(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard")).Reload()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in read(run).Scalars(tag)]


def start(run: Path, last_round: int, losses: dict[int, float]) -> None:
    """A start of the run that goes on after that round, and has these losses."""
    written = events.Events(run, CONFIG, last_round)
    for number, loss in losses.items():
        more = {"loss": loss, "bytes_by_purpose": {"parameters": 10 * number, "pictures": 1}}
        written.round(round_row(number, **more), [client_row(number, 0, loss=loss + 1)])
    written.close()


def test_a_round_that_is_done_again_has_one_point_that_of_the_last_start(tmp_path):
    start(tmp_path, 0, {1: 0.5, 2: 0.4, 3: 0.3})
    start(tmp_path, 1, {2: 0.45, 3: 0.35, 4: 0.25})
    start(tmp_path, 4, {})
    assert curve(tmp_path, "round/loss") == [(1, 0.5), (2, 0.45), (3, 0.35), (4, 0.25)]
    assert curve(tmp_path, "client-0000/loss") == [(1, 1.5), (2, 1.45), (3, 1.35), (4, 1.25)]
    assert curve(tmp_path, "seconds/train") == [(n, 6.5) for n in range(1, 5)]
    assert curve(tmp_path, "bytes/parameters") == [(n, 10.0 * n) for n in range(1, 5)]
    assert curve(tmp_path, "bytes/pictures") == [(n, 1.0) for n in range(1, 5)]


def log(run: Path, *rows: dict) -> None:
    write_rows(run / "scores.jsonl", list(rows))
    refresh_events(run)


def test_a_model_that_is_scored_again_has_one_point_and_a_resume_takes_away_those_of_later_rounds(tmp_path):
    start(tmp_path, 0, {1: 0.5, 2: 0.4})
    rows = [score_row(number, None, scores={"fd_fmnist": 9.0 / number, "missing_classes": [3, 4]}) for number in (1, 2)]
    log(tmp_path, *rows)
    log(tmp_path, *rows, score_row(2, None, scores={"fd_fmnist": 4.0, "missing_classes": []}))
    assert curve(tmp_path, "score-fmnist-cnn/fd_fmnist") == [(1, 9.0), (2, 4.0)]
    assert curve(tmp_path, "score-fmnist-cnn/missing_classes") == [(1, 2.0), (2, 0.0)]
    start(tmp_path, 1, {2: 0.45})
    assert curve(tmp_path, "score-fmnist-cnn/fd_fmnist") == [(1, 9.0)]
    log(tmp_path, *rows)
    assert curve(tmp_path, "score-fmnist-cnn/fd_fmnist") == [(1, 9.0), (2, 4.5)]
    assert curve(tmp_path, "round/loss") == [(1, 0.5), (2, 0.45)]
    assert len(list((tmp_path / "tensorboard").glob("*.scores"))) == 1


def test_scores_are_the_mean_over_the_models_in_the_way_that_was_written_last():
    def rows(**how):
        return [score_row(1, c, scores={"fd_fmnist": 10.0 + c, "missing_classes": [3] * c}, **how) for c in (0, 1)]

    curves = score_curves([*rows(n=5), *rows(), *rows(ema=True), *rows(local=True)])
    for kind in ("", "-average", "-local"):
        assert curves[f"score-fmnist-cnn{kind}/fd_fmnist"] == [(1, 10.5)]
        assert curves[f"score-fmnist-cnn{kind}-client-0001/fd_fmnist"] == [(1, 11.0)]
        assert curves[f"score-fmnist-cnn{kind}/missing_classes"] == [(1, 0.5)]
    assert len(curves) == 3 * 3 * 2


def test_each_run_is_a_row_of_the_table_with_its_configuration_and_what_came_of_it(tmp_path):
    for lr in (1e-4, 3e-4):
        config = replace(CONFIG, optim=replace(CONFIG.optim, lr=lr), run=RunConfig(seed=7, dir=str(tmp_path)))
        events.Events(tmp_path / str(lr), config, 0).close()
        events.Events(tmp_path / str(lr), config, 2).close()  # a resume
        found = read(tmp_path / str(lr)).SummaryMetadata
        data = {
            tag: HParamsPluginData.FromString(found(tag).plugin_data.content)
            for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
        }
        hparams = data["_hparams_/session_start_info"].session_start_info.hparams
        assert hparams["optim.lr"].number_value == lr and hparams["method"].string_value == "udec"
        assert hparams["model.dim_mults"].string_value == "[1, 2]" and hparams["run.seed"].number_value == 7
        assert not {"run.dir", "federation.rounds", "runtime.threads"} & set(hparams)  # which a resume may change
        metrics = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
        assert metrics == events.results() and "score-fmnist-cnn-average/fd_fmnist" in metrics


@pytest.mark.parametrize("broken", ["file", "link", "log"])
def test_scores_are_kept_where_tensorboard_cannot_have_them(tmp_path, caplog, broken):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir(), elsewhere.mkdir()
    if broken == "file":
        (run / "tensorboard").write_text("")
    elif broken == "link":
        (run / "tensorboard").symlink_to(elsewhere)
    log(run, score_row(1, None), *(["[]"] if broken == "log" else []))
    assert list(elsewhere.iterdir()) == [] and len((run / "scores.jsonl").read_text().splitlines()) >= 1
    told = [record.message for record in caplog.records]
    assert len(told) == (broken != "link") and all("TensorBoard shows no new scores: " in line for line in told)
