"""A run's logs: what a kill cut short spoils nothing, what is no row is named, and a checkpoint makes them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_folders import client_row, round_row, write_rows

from fdiff import checkpoint, federation
from fdiff import config as cfg
from fdiff.comm import SoloCommunicator
from fdiff.errors import UserError
from fdiff.federation import logs, run_files, snapshot


def row(number: int, **more: object) -> dict[str, object]:
    return {"round": number, "loss": 0.1 * number, **more}


def text(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


@given(st.integers(1, 5), st.integers(0, 60))
def test_a_line_that_was_cut_short_is_completed_or_dropped(tmp_path_factory, rows: int, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "rounds.jsonl"
    before = [row(n, name="ü" * n) for n in range(1, rows + 1)]
    whole = text(before).encode()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    kept = logs.read_jsonl(path)
    logs.append_jsonl(path, [row(9)])
    assert logs.read_jsonl(path) == [*kept, row(9)] and kept == before[: len(kept)]
    assert path.read_bytes().endswith(b"\n") and len(path.read_text().splitlines()) == len(kept) + 1


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": 1}', '{"round": "1"}', "\0\0\0", "[" * 100_000])
def test_a_line_that_is_no_row_is_named_with_the_remedy(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(text([round_row(1)]) + line + "\n" + text([round_row(3)]))
    with pytest.raises(
        UserError, match=r"rounds.jsonl: line 2 is no row of a log; fdiff train --resume --run.dir .*"
    ) as raised:
        run_files.read_log(tmp_path, "rounds")
    assert run_files.find_gaps(tmp_path) == [str(raised.value)]


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [([1, 2, 3], ""), ([1, 3], "lacks round 2"), ([2, 3], "lacks round 1"), ([1, 2, 2], "has round 2 twice"), ([], "")],
)
def test_rounds_that_are_missing_or_come_twice_are_found(tmp_path: Path, numbers: list[int], problem: str) -> None:
    write_rows(tmp_path / "rounds.jsonl", [round_row(n) for n in numbers])
    write_rows(tmp_path / "clients.jsonl", [client_row(n, c) for n in numbers for c in (0, 1)])
    found = run_files.find_gaps(tmp_path)
    assert len(found) == 2 * bool(problem) and all(problem in line for line in found)


@pytest.mark.parametrize("damaged", [None, "", text([row(1)]), text([row(1), row(1), row(2)]), "{\n" + text([row(2)])])
def test_a_checkpoint_makes_the_logs_whole(tmp_path: Path, damaged: str | None) -> None:
    rounds, clients = [row(1), row(2)], [row(n, client=c) for n in (1, 2) for c in (0, 1)]
    if damaged is not None:
        (tmp_path / "rounds.jsonl").write_text(damaged)
    (tmp_path / "clients.jsonl").write_text(text([*clients, row(3, client=0)]))  # of a round that is not in it
    (tmp_path / "scores.jsonl").write_text(text([row(2)]) + "{")
    assert logs.restore_logs(tmp_path, 2, {"rounds": rounds, "clients": clients}) == ["rounds.jsonl"]
    assert logs.read_jsonl(tmp_path / "rounds.jsonl") == rounds
    assert logs.read_jsonl(tmp_path / "clients.jsonl") == clients
    assert (tmp_path / "scores.jsonl").read_text() == text([row(2)])
    assert logs.restore_logs(tmp_path, 2, {"rounds": rounds, "clients": clients}) == []


def test_of_a_checkpoint_that_holds_no_rows_the_log_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text(text([row(1), row(2), row(3)]))
    assert logs.restore_logs(tmp_path, 2, None) == []
    assert logs.read_jsonl(tmp_path / "rounds.jsonl") == [row(1), row(2)]


def test_a_long_run_does_not_carry_all_its_rows_from_checkpoint_to_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Four rows fit here: those of one round, with three clients."""
    monkeypatch.setattr(snapshot, "MAX_ROWS", 4)
    config = cfg.Config(
        federation=cfg.FederationConfig(clients=3, rounds=2, local_epochs=1),
        data=cfg.DataConfig(image_side=8, limit=12),
        model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
        sample=cfg.SampleConfig(every=0),
        run=cfg.RunConfig(dir=str(tmp_path / "run")),
    )
    federation.run(config, SoloCommunicator(), torch.device("cpu"))
    folders = [generation.path for generation in checkpoint.generations(tmp_path / "run")]
    assert ["logs" in checkpoint.read_generation(folder)[1] for folder in folders] == [True, False]
    assert [row["round"] for row in logs.read_jsonl(tmp_path / "run" / "rounds.jsonl")] == [1, 2]
