"""What a page shows of its runs, function by function: scales and bands, marks in tables, grids cut by client."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from run_folders import CONFIG, round_row, write_rows, write_run

from fdiff.config import Config, DataConfig, SampleConfig
from fdiff.data import save_grid
from fdiff.federation.duration import duration
from fdiff.report import Run, facts, read_run, render
from fdiff.report.charts import Curve, curves
from fdiff.report.grids import MOST_CLIENTS, MOST_ROUNDS, gallery, real_images, spread


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "run", grids=0))


# --- curves


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<]+)</text>", svg)


def test_a_loss_is_on_a_logarithmic_scale_unless_one_is_not_above_zero():
    falling, zero = ({"a": Curve([(1, 1.0), (2, 0.1), (3, last)])} for last in (0.01, 0.0))
    assert {"0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"} <= {*texts(curves(falling, "loss", log=True))}
    assert texts(curves(zero, "loss", log=True)) == texts(curves(zero, "loss"))


@pytest.mark.parametrize(
    ("runs", "clients", "lines", "bands"), [(1, 12, 12, 0), (1, 13, 0, 1), (8, 2, 16, 0), (9, 2, 0, 0), (9, 13, 0, 0)]
)
def test_many_clients_are_a_band_and_those_of_many_runs_are_left_out(runs, clients, lines, bands):
    one = Curve([(1, 2.0), (2, 1.0)], (), [[(1, 2.0 + c), (2, 1.0)] for c in range(clients)])
    svg = curves({str(run): one for run in range(runs)}, "loss")
    assert (svg.count("stroke-opacity: 0.45"), svg.count("fill-opacity: 0.2")) == (lines, bands)
    assert len(re.findall(r"stroke-width: 2\b", svg)) == runs


def test_a_long_run_is_drawn_in_few_points_to_its_end():
    (line,) = re.findall(
        r'-raw"><title>a</title>\s*<path d="([^"]*)"',
        curves({"a": Curve([(r, 1 / r) for r in range(1, 100_001)])}, "loss"),
    )
    few = re.findall(
        r'-raw"><title>a</title>\s*<path d="([^"]*)"', curves({"a": Curve([(r, 1 / r) for r in (1, 100_000)])}, "loss")
    )[0]
    assert line.count("L") <= 401 and line.split()[-1] == few.split()[-1]


# --- tables


def of_losses(run: Run, losses: Sequence[float | None]) -> facts.Fact:
    runs = [replace(run, rounds=[] if loss is None else [round_row(1, loss=loss)], clients=[]) for loss in losses]
    return next(fact for fact in facts.overview(runs, [0.0] * len(runs)) if fact.name == "loss")


@given(st.lists(st.none() | st.integers(1, 60_000).map(lambda n: n / 1e5), min_size=1, max_size=6))
def test_the_best_of_a_row_is_marked_as_it_is_shown(run, losses):
    fact = of_losses(run, losses)
    shown = {cell for cell in fact.cells if cell != facts.NONE}
    assert fact.cells == [facts.NONE if loss is None else f"{loss:.4f}" for loss in losses]
    expected = {i for i, cell in enumerate(fact.cells) if len(shown) > 1 and cell == min(shown)}
    assert fact.best == expected


def test_loss_and_scores_have_their_deviation_over_the_clients(run):
    clients = [{**row, "loss": 0.5 + 0.2 * row["client"]} for row in run.clients]
    scores = [{**row, "scores": {**row["scores"], "fd_fmnist": 10.0 + 2 * row["client"]}} for row in run.scores]
    shown = {fact.name: fact.cells for fact in facts.overview([replace(run, clients=clients, scores=scores)], [0.0])}
    assert shown["loss"] == ["0.5000 ± 0.1000"] and shown["fd_fmnist"] == ["11.00 ± 1.00"]
    assert shown["date"] == shown["device-hours"] == shown["peak memory of a rank"] == [facts.NONE]


def test_date_hours_and_memory_are_those_of_the_rows(run):
    more = {"began": "2026-11-28T09:05:00+00:00", "ranks": 4, "peak_memory": 3 * 2**30}
    rounds = [round_row(1, **more), round_row(2, **{**more, "ranks": 2, "peak_memory": 2**30})]
    shown = {fact.name: fact.cells[0] for fact in facts.overview([replace(run, rounds=rounds)], [0.0])}
    assert (shown["date"], shown["duration"]) == ("2026-11-28 09:05", "13 s")
    assert (shown["device-hours"], shown["peak memory of a rank"]) == ("0.011", "3.00 GiB")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "60 s"),
        (60, "1 min"),
        (3599.7, "60 min"),
        (7500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds, said):
    assert duration(seconds) == said


def test_fields_that_differ_are_apart_from_those_that_do_not(run):
    other = replace(run, config=replace(CONFIG, method="full"))
    differ, same = facts.fields([run, other])
    assert [(fact.name, fact.cells) for fact in differ] == [("method", ["udec", "full"])]
    assert ("optim.lr", "0.0001") in same and "method" not in dict(same)
    assert facts.fields([run])[0] == []


# --- sample grids


def with_grid(run: Run, config: Config, images: torch.Tensor, columns: int, folder: Path, rounds: int = 1) -> Run:
    save_grid(folder / "grid.png", images, columns)
    png = (folder / "grid.png").read_bytes()
    return replace(run, config=config, grids=dict.fromkeys(range(1, 1 + rounds), png))


def pixels(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (8, 3), (28, 1), (64, 3)])
@pytest.mark.parametrize(("method", "clients", "n"), [("udec", 3, 5), ("full", 2, 16), ("full", 2, 5), ("full", 2, 1)])
def test_a_grid_is_cut_by_model_and_shows_its_images_as_they_are(run, tmp_path, side, channels, method, clients, n):
    config = replace(CONFIG, method=method, sample=SampleConfig(images=n))
    config = replace(config, federation=replace(CONFIG.federation, clients=clients))
    models = clients if method == "udec" else 1
    images = torch.randint(256, (models * n, channels, side, side), dtype=torch.uint8)
    columns = n if method == "udec" else math.ceil(math.sqrt(n))
    (shot,) = gallery(with_grid(run, config, images, columns, tmp_path), 1).shots
    names = [f"client {c}" for c in range(clients)] if method == "udec" else ["global model"]
    assert [strip.caption for strip in shot.strips] == [f"{name}, raw weights, round 1" for name in names]
    for i, strip in enumerate(shot.strips):
        sheet, across = pixels(strip.url), math.ceil(math.sqrt(n))
        assert sheet.shape[1] == across * (side + 1) - 1 and strip.width >= 80 * across
        for k, image in enumerate(images[i * n : (i + 1) * n]):
            top, left = k // across * (side + 1), k % across * (side + 1)
            shown = sheet[top : top + side, left : left + side]
            assert np.array_equal(shown, np.broadcast_to(image.permute(1, 2, 0).numpy(), shown.shape))


def test_a_grid_of_another_layout_is_shown_whole(run, tmp_path):
    """As one of another number of clients, or a stranger's."""
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    (shot,) = gallery(with_grid(run, CONFIG, images, 3, tmp_path), 1).shots
    (strip,) = shot.strips
    assert strip.caption == "all images, raw weights, round 1" and strip.url.startswith("data:image/png;base64,")
    assert pixels(strip.url).shape == (2 + 2 * 58, 2 + 3 * 58, 3)


@given(st.integers(1, 200), st.integers(-3, 300))
def test_what_is_spread_begins_and_ends_with_the_ends(count, most):
    chosen = spread(count, most)
    assert len(chosen) == max(1, min(count, most)) == len(set(chosen)) and chosen == sorted(chosen)
    assert chosen[0] == 0 and (chosen[-1] == count - 1 or len(chosen) == 1)
    apart = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    assert len(apart) <= 2 + 1 and (not apart or max(apart) - min(apart) <= 2)


@pytest.mark.parametrize(
    ("runs", "side", "clients", "rounds"), [(1, 8, MOST_CLIENTS, MOST_ROUNDS), (40, 8, 1, MOST_ROUNDS), (400, 64, 1, 1)]
)
def test_what_is_drawn_is_bounded_and_the_page_says_so(run, tmp_path, runs, side, clients, rounds):
    config = replace(CONFIG, sample=SampleConfig(images=4), federation=replace(CONFIG.federation, clients=100))
    images = torch.randint(256, (400, 3, side, side), dtype=torch.uint8)
    shown = gallery(with_grid(run, config, images, 4, tmp_path, rounds=50), runs)
    assert len(shown.shots) == rounds and {len(shot.strips) for shot in shown.shots} == {clients}
    assert shown.shots[-1].round == 50 and shown.shots[0].round == (1 if rounds > 1 else 50)
    assert shown.left_out == f"{clients} of 100 clients and {rounds} of 50 rounds shown; the others are in samples/"


def test_a_page_of_forty_runs_names_them_once_above_the_curves(run):
    page = render([replace(run, folder=Path(f"/runs/run-{i}")) for i in range(40)])
    assert page.count("<li><i") == 2 * 40 and len(page) < 2_000_000  # of the curves, and of those over bytes
    assert page.count("<h3>all runs</h3>") == 2  # one split, one bill


# --- real images


def test_real_images_are_those_of_a_data_set_that_comes_with_the_system(run):
    strip, why = real_images(replace(CONFIG, sample=SampleConfig(images=4)), None)
    assert why == "" and strip.caption == "real images, embedded Fashion-MNIST excerpt, test split"
    assert pixels(strip.url).shape == (17, 17, 3)


@pytest.mark.parametrize("dataset", ["folder", "fashion-mnist", "cifar10"])
def test_no_folder_that_only_the_run_names_is_read(tmp_path, dataset):
    """Whoever sends the run would else have images of the reader's disk on a page."""
    secret = tmp_path / "secret" / "test"
    secret.mkdir(parents=True)
    Image.new("L", (8, 8), 77).save(secret / "a.png")
    config = replace(CONFIG, data=DataConfig(dataset=dataset, root=str(tmp_path / "secret"), image_side=8, channels=1))
    strip, why = real_images(config, None)
    assert strip is None and why == f"fdiff report --root FOLDER shows the test images of {dataset} in that folder"
    strip, why = real_images(config, tmp_path / "secret")
    if dataset == "folder":
        assert (pixels(strip.url) == 77).all() and why == ""
    else:
        assert strip is None and why.startswith("none: data.root: ")


def test_private_silos_stay_where_they_are(tmp_path):
    data = DataConfig(partition="private", root=str(tmp_path / "{client}"), image_side=8)
    for root in (None, tmp_path):
        assert real_images(replace(CONFIG, data=data), root) == (
            None,
            "none, as private silos' images stay where they are",
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"began": "yesterday"}, 'began is "yesterday", it must be a time'),
        ({"ranks": -1}, "ranks is -1"),
        ({"peak_memory": 0.5}, "it must be a whole number"),
    ],
)
def test_new_fields_of_a_row_are_checked_like_the_others(tmp_path, more, said):
    folder = write_run(tmp_path / "run")
    write_rows(folder / "rounds.jsonl", [round_row(1, **more), round_row(2)])
    with pytest.raises(ValueError, match=re.escape(said)):
        read_run(folder)
