"""What a sweep file means, what in it is refused, and what its runs will cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_sweep import ALONE, LINE, TINY, sweep_file
from tools import sweep_tables

from fdiff.comm import SoloCommunicator
from fdiff.errors import UserError
from fdiff.runtime.signals import Stop
from fdiff.sweeps import as_text, bring_to_end, costs_table, find, read, result
from fdiff.sweeps.grid import SHIPPED


def test_a_file_is_its_grid_over_its_fields_over_its_preset(tmp_path):
    grid = {"data.partition": ["iid", "label-skew"], "method": ["full", "udec"]}
    sweep = read(sweep_file(tmp_path, preset="mini", grid=grid), tmp_path / "out", ALONE)
    assert [cell.name for cell in sweep.cells] == [
        f"partition-{p}_method-{m}" for p in ("iid", "label-skew") for m in ("full", "udec")
    ]
    cell = sweep.cells[3]
    assert (cell.config.method, cell.config.data.partition, cell.config.model.dim) == ("udec", "label-skew", 8)
    assert cell.config.optim.lr == 2e-3  # the preset's
    assert cell.config.run_dir == tmp_path / "out" / cell.name
    assert sweep.rounds(cell) == (1, 2)
    assert cell.config.runtime == ALONE


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_files_that_ship_are_sound(path, tmp_path):
    sweep = read(find(path.stem), tmp_path, ALONE)
    assert len({cell.name for cell in sweep.cells}) == len(sweep.cells) >= 1
    assert path.read_text().startswith("# ")
    if path.stem in ("methods", "mini-methods"):
        assert len(sweep.cells) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"grid": {"method": "full"}}, "grid.method: 'full' is not a list"),
        ({"grid": {"method": ["half"]}}, "method: 'half' is not valid; choose one of full"),
        ({"grid": {"data.partiton": ["iid"]}}, "data.partiton: no such field"),
        ({"score": {"n": 5}}, "score: {'n': 5} is not valid; it may have images"),
        ({"score": {"rounds": [9]}}, "score.rounds: 9 is beyond the 2 rounds"),
        ({"grid": {"run.checkpoint_every": [1, 3]}}, "score.rounds: 1 has no checkpoint in checkpoint_every-3"),
        ({"score": {"rounds": 2}}, "score.rounds: 2 is not valid; it must be a list of rounds"),
        ({"score": {"rounds": [0]}}, "score.rounds: [0] is not valid"),
        ({"score": {"local": 1}}, "score.local: 1 is not valid; it must be true or false"),
        ({"score": {"total_images": 0}}, "score.total_images: 0 is not valid; it must be a whole number, at least 1"),
        ({"score": {"images": 5, "total_images": 9}}, "score.total_images: is not valid beside score.images"),
        ({"grid": {"model": [{"bottleneck_blocs": 1}]}}, "model.bottleneck_blocs: no such field; did you mean"),
        ({"score": {"images": "lots"}}, "score.images: 'lots' is not valid; it must be a whole number"),
        ({"score": {"steps": 5000}}, "sample.steps: 5000 is not valid"),
        ({"score": {"sampler": "euler"}}, "sample.sampler: 'euler' is not valid"),
        ({"score": {"extractor": "vgg"}}, "score.extractor: 'vgg' is not valid; choose one of fmnist-cnn, inception"),
        ({"fields": {"runtime": {"precision": "bf16"}}}, "runtime: is not for a sweep's file"),
        ({"grid": {"runtime.precision": ["bf16"]}}, "runtime: is not for a sweep's file"),
        ({"preset": "maxi"}, "'maxi' is not a preset"),
        ({"gird": 1}, "gird: no such key; a sweep has grid"),
        ({"score": 0}, "score: 0 is not valid"),
        ({"grid": {".method": ["full"], "method": ["udec"]}}, "no such field"),
        ({"grid": {"data.root": ["$NOT_SET"]}}, "the variable NOT_SET is not set"),
        ({"preset": "2001-01-01"}, "'2001-01-01' is not a preset"),
        ({"grid": {}}, "must have the key grid, with fields"),
        ({"grid": {5: [1]}}, "grid: 5 is not a field"),
        ({"grid": {"run.dir": ["x", "y"]}}, "run.dir: is not for a sweep's file; give --out"),
        ({"fields": {"run": {"dir": "x"}}}, "run.dir: is not for a sweep's file; give --out"),
        ({"fields": {5: {}}}, "fields: {5: {}} is not a group of fields"),
        ({"grid": {"run.seed": list(range(20)), "data.seed": list(range(51))}}, "1020 combinations; a sweep has"),
        ({"preset": 5}, "preset: 5 is not the name of a preset"),
        ({"fields": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}}, "more than 8 levels deep"),
        ({"fields": {"x": "y" * 70_000}}, "has more than 65536 bytes"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line(tmp_path, more, expected):
    with pytest.raises(UserError, match="(?s)") as refused:
        read(sweep_file(tmp_path, **more), tmp_path, ALONE)
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    assert str(tmp_path / "tiny.yaml") in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grid: {method: [full]}\ngrid: {method: [udec]}", "line 2: 'grid' is there twice"),
        ("grid: {run.seed: [1e0]}", "run.seed: 1.0 is not valid"),
        ("grid: {run.seed: [2001-01-01]}", "run.seed: '2001-01-01' is not valid"),
        ("grid: {run.seed: [1]}\non: push", "on: no such key"),
        ("grid: {run.seed: [1]}\npreset: !!timestamp 2001-01-01", "preset: datetime.date(2001, 1, 1) is not the name"),
    ],
)
def test_what_yaml_itself_takes_otherwise_is_refused(tmp_path, text, expected):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        read(tmp_path / "grid.yaml", tmp_path, ALONE)
    assert expected in str(refused.value) and str(tmp_path / "grid.yaml") in str(refused.value)


def test_a_few_lines_that_stand_for_gigabytes_are_refused(tmp_path):
    bomb = "".join(f" a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9))
    (tmp_path / "bomb.yaml").write_text(f"grid:\n{bomb}")
    with pytest.raises(UserError, match="line 3: an alias"):
        read(tmp_path / "bomb.yaml", tmp_path, ALONE)


def test_every_cell_has_a_folder_of_its_own_under_out(tmp_path):
    roots = ["../../x", "../../y", "/x", "plain", "z" * 300]
    sweep = read(sweep_file(tmp_path, grid={"data.root": roots}), tmp_path / "out", ALONE)
    folders = [cell.config.run_dir for cell in sweep.cells]
    assert len(set(folders)) == len(roots) and {folder.parent for folder in folders} == {tmp_path / "out"}
    assert folders[3].name == "root-plain" and all(len(folder.name) < 120 for folder in folders)
    assert [cell.config.data.root for cell in sweep.cells] == roots


def test_values_of_a_group_are_several_fields_at_once(tmp_path):
    grid = {"model": [{}, {"bottleneck_blocks": 4, "bottleneck_attention": "none"}], "method": ["ulatdec"]}
    paper, other = read(sweep_file(tmp_path, grid=grid), tmp_path / "out", ALONE).cells
    assert paper.name == "method-ulatdec_model-default" and paper.config.model.bottleneck_blocks == 2
    assert other.name == "method-ulatdec_model-bottleneck_attention=none,bottleneck_blocks=4"
    assert (other.config.model.bottleneck_blocks, other.config.model.dim) == (4, TINY["model"]["dim"])
    varied = dataclasses.replace(LINE, varied={"model": other.point["model"]})
    assert "bottleneck_attention=none,bottleneck_blocks=4" in as_text([varied]).splitlines()[3].split()


def test_the_images_of_a_run_are_divided_among_its_models(tmp_path):
    grid = {"federation.clients": [2, 50], "method": ["full", "udec"]}
    sweep = read(sweep_file(tmp_path, grid=grid, score={"total_images": 5000}), tmp_path / "out", ALONE)
    assert [sweep.score.images_of(cell.config) for cell in sweep.cells] == [5000, 2500, 5000, 100]


def test_only_models_of_clients_with_private_parts_are_scored_before_the_average(tmp_path):
    sweep = read(sweep_file(tmp_path), tmp_path / "out", ALONE)
    assert [cell.config.run.keep_local for cell in sweep.cells] == [False, True]


def test_what_a_sweep_costs_is_said_before(tmp_path):
    fields = {**TINY, "federation": {"rounds": 3, "local_epochs": 4, "clients": 2}}
    sweep = read(sweep_file(tmp_path, fields=fields), tmp_path / "out", ALONE)
    heading, full, udec, total, *_ = costs_table(sweep).splitlines()
    assert heading.split("  ")[0] == "run" and total.startswith("all 2 runs")
    trained, calls = 3 * 4 * 64, 2 * 2 * 100  # rounds × epochs × images; scored rounds × steps × images of each model
    assert [line.split()[1:3] for line in (full, udec)] == [[str(trained), str(calls)], [str(trained), str(2 * calls)]]
    assert total.split()[3:5] == [f"{2 * trained:,}", f"{3 * calls:,}"]


def test_a_value_given_twice_is_one_cell(tmp_path):
    grid = {"method": ["full", "udec", "full"], "optim.lr": [1, 1.0]}
    assert [c.config.method for c in read(sweep_file(tmp_path, grid=grid), tmp_path, ALONE).cells] == ["full", "udec"]


def test_rounds_that_are_saved_can_be_scored(tmp_path):
    """Of two rounds the second is saved though it is no multiple of three: it is the last."""
    fields = {**TINY, "run": {"checkpoint_every": 3}}
    sweep = read(sweep_file(tmp_path, fields=fields, score={"rounds": [2]}), tmp_path, ALONE)
    assert sweep.rounds(sweep.cells[0]) == (2,)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(UserError, match="'none' is no file .* mini-methods"):
        find("none")


def test_the_readmes_tables_are_what_the_results_say():
    rows = sweep_tables.read_results()
    made, text = sweep_tables.tables(rows), sweep_tables.README.read_text()
    assert {row["sweep"] for row in rows} == made.keys()
    assert all(f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text for name, table in made.items())


@pytest.mark.slow
@pytest.mark.rare  # a minute for each of the five
@pytest.mark.parametrize("name", sweep_tables.SWEEPS)
def test_the_first_cell_of_a_small_file_trains_and_is_scored(name, tmp_path, monkeypatch):
    """On fewer images, and in fewer rounds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cell, *_ = (sweep := read(find(name), tmp_path, ALONE)).cells
    clients = cell.config.federation.clients
    less = dataclasses.replace(
        cell.config,
        federation=dataclasses.replace(cell.config.federation, rounds=1, local_epochs=1),
        data=dataclasses.replace(cell.config.data, limit=100 * clients, test_limit=200),
    )
    score = dataclasses.replace(sweep.score, total_images=100 * clients, steps=2)
    small = dataclasses.replace(sweep, cells=[dataclasses.replace(cell, config=less)], score=score)
    bring_to_end(small, small.cells[0], SoloCommunicator(), torch.device("cpu"), None, Stop())
    [line] = result(small, small.cells[0])
    assert line.score > 0 and line.round == 1
