"""Sweeps: what a file means, that complete runs are skipped and interrupted ones go on, and the table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
import yaml
from jobs import fdiff, in_turn, rows

from fdiff.errors import UserError
from fdiff.sweeps import Result, as_csv, as_latex, as_text, find, read
from fdiff.sweeps.grid import SHIPPED

TINY = {
    "federation": {"rounds": 2, "local_epochs": 1},
    "data": {"limit": 64, "image_side": 8, "test_limit": 100},
    "model": {"dim": 8, "dim_mults": [1, 2], "head_dim": 8},
    "optim": {"batch_size": 8},
    "sample": {"sampler": "ddim", "steps": 2, "every": 0},
}


def sweep_file(folder: Path, **more) -> Path:
    file = folder / "tiny.yaml"
    grid = {"federation.clients": [2], "method": ["full", "udec"]}
    file.write_text(yaml.safe_dump({"fields": TINY, "grid": grid, "score": {"images": 100, "rounds": [1, 2]}, **more}))
    return file


def test_a_file_is_its_grid_over_its_fields_over_its_preset(tmp_path):
    grid = {"data.partition": ["iid", "label-skew"], "method": ["full", "udec"]}
    sweep = read(sweep_file(tmp_path, preset="mini", grid=grid), tmp_path / "out")
    assert [cell.name for cell in sweep.cells] == [
        f"partition-{p}_method-{m}" for p in ("iid", "label-skew") for m in ("full", "udec")
    ]
    cell = sweep.cells[3]
    assert (cell.config.method, cell.config.data.partition, cell.config.model.dim) == ("udec", "label-skew", 8)
    assert cell.config.optim.lr == 2e-3  # the preset's
    assert cell.config.run_dir == tmp_path / "out" / cell.name
    assert sweep.rounds(cell) == (1, 2)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_files_that_ship_are_sound(path, tmp_path):
    sweep = read(find(path.stem), tmp_path)
    assert len({cell.name for cell in sweep.cells}) == len(sweep.cells) >= 1
    assert path.read_text().startswith("# ")
    if "methods" in path.stem:
        assert len(sweep.cells) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"grid": {"method": "full"}}, "grid.method: 'full' is not a list"),
        ({"grid": {"method": ["half"]}}, "method: 'half' is not valid; choose one of full"),
        ({"grid": {"data.partiton": ["iid"]}}, "data.partiton: no such field"),
        ({"score": {"n": 5}}, "score: {'n': 5} is not valid; it may have images"),
        ({"score": {"rounds": [9]}}, "score.rounds: 9 is beyond the 2 rounds"),
        ({"preset": "maxi"}, "'maxi' is not a preset"),
        ({"gird": 1}, "must have the key grid"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line(tmp_path, more, expected):
    with pytest.raises(UserError, match="(?s)") as refused:
        read(sweep_file(tmp_path, **more), tmp_path)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(UserError, match="'none' is no file .* mini-methods"):
        find("none")


LINE = Result(
    cell="a", method="udec", partition="label-skew", clients=5, local_epochs=2, round=15, metric="fd_fmnist", ema=False,
    score=70.24, deviation=28.31, worst=120.5, communicated_parameters=1_234_567, saving=0.736, wire_bytes=5_000_000,
    seconds=61.2,
)  # fmt: skip


def test_the_table_says_the_same_as_text_csv_and_latex():
    other = dataclasses.replace(LINE, method="full", deviation=None, worst=None)
    text = as_text([other, LINE])
    assert "fd_fmnist" in text and "70.24 ± 28.31" in text and "1,234,567" in text and "73.6%" in text
    widths = {len(line) for line in text.splitlines()[1:]}
    assert len(widths) == 1  # right-aligned to one edge
    (first, second) = csv.DictReader(io.StringIO(as_csv([other, LINE])))
    assert (first["deviation"], second["deviation"], second["wire_bytes"]) == ("", "28.31", "5000000")
    latex = as_latex([LINE])
    assert r"70.24 $\pm$ 28.31" in latex and r"73.6\%" in latex and r"fd_fmnist" in latex.splitlines()[0]
    assert latex.count(r"\\") == 2


@pytest.mark.slow
def test_a_sweep_skips_what_is_complete_and_goes_on_with_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep_file(tmp_path)
    command = ["sweep", "tiny.yaml", "--out", "out", "--runtime.threads", 1]
    first = in_turn(2, [command], tmp_path)[0]
    first[0].check()
    runs = [tmp_path / "out" / f"clients-2_method-{method}" for method in ("full", "udec")]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert first[0].out.endswith(table) and "wire MB" in table
    assert [(r["round"], r["client"]) for r in rows(runs[1], "scores")] == [(1, 0), (1, 1), (2, 0), (2, 1)]

    # As if it had been killed: the second run is in its last round, the first one's scores are not taken.
    (runs[0] / "scores.jsonl").unlink()
    for name in ("rounds", "clients"):
        log = rows(runs[1], name)
        (runs[1] / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log if r["round"] < 2))
    last = runs[1] / "checkpoints" / "round-000002"
    last.rename(tmp_path / "lost")
    kept = (runs[0] / "rounds.jsonl").read_bytes()
    again = fdiff(*command, cwd=tmp_path).check()
    assert (runs[0] / "rounds.jsonl").read_bytes() == kept  # not trained again
    assert last.exists() and len(rows(runs[1])) == 2
    assert [row["round"] for row in rows(runs[0], "scores")] == [1, 2]

    def scores(text: str) -> list[str]:
        return [line.split()[5] for line in text.splitlines()[2:]]

    assert scores(again.out) == scores(table)

    sweep_file(tmp_path, fields={**TINY, "optim": {"batch_size": 4}})
    other = fdiff(*command, cwd=tmp_path)
    assert other.status == 1 and "give another --out" in other.err
    assert "optim.batch_size = 8, the sweep has 4" in other.err
