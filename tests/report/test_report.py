"""The report: one file, opened in a real browser; the pictures are there, nothing is fetched, nothing complains."""

from __future__ import annotations

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from browser import browser
from jobs import TINY, fdiff, in_turn, rows
from run_folders import write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fdiff.errors import UserError
from fdiff.federation.logs import append_jsonl
from fdiff.report import Run, charts, facts, read_run, render
from fdiff.report.charts import Curve, bars, curves, heat_map, stacked
from fdiff.report.runs import named_apart

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="chromium and chromedriver are not installed (apt install chromium-driver)",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """FULL with a moving average and UDEC, both scored, with a grid of each of two rounds; and an unscored one."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--federation.rounds", 2, "--sample.every", 1, "--data.partition", "label-skew", "--data.test_limit", 100]
    more += ["--data.limit", 200]
    requests = [
        ["train", *TINY, *more, "--method", "full", "--optim.ema", 0.9, "--run.dir", "full"],
        ["train", *TINY, *more, "--method", "udec", "--run.dir", "<b>udec", "--federation.clients", 2],
        ["train", *TINY, *more, "--federation.rounds", 1, "--run.dir", "unscored"],
        ["evaluate", "full", "--all_rounds", "--batch_size", 100, "--runtime.threads", 1],
        ["evaluate", "<b>udec", "--all_rounds", "--batch_size", 100, "--runtime.threads", 1],
    ]
    for done in in_turn(1, requests, folder):
        done[0].check()
    return folder


@pytest.fixture(scope="module")
def page(runs) -> Path:
    assert fdiff("report", "full", "<b>udec", "--out", "both.html", cwd=runs).check().out == "both.html\n"
    return runs / "both.html"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_opens_wide_and_narrow_light_and_dark(page, width, scheme):
    with browser() as chromium:
        chromium.emulate(width, 900, scheme)
        chromium.open(page)
        assert chromium.console() == []
        assert chromium.script("return performance.getEntriesByType('resource').length") == 0
        assert chromium.script("return document.documentElement.scrollWidth") <= width
        sizes = chromium.script(
            "return [...document.querySelectorAll('svg, img')].filter(e => e.checkVisibility()).map(e => {"
            "const b = e.getBoundingClientRect(); return [b.width, b.height, e.naturalWidth ?? 1]; })"
        )
        # loss and eight scores; real images, those of the global model and of two clients; a heat map and the
        # communication of each run; a score over bytes; the time
        assert len(sizes) == 9 + 4 + 2 * 2 + 2
        assert all(100 < w <= width and h > 40 and loaded > 0 for w, h, loaded in sizes), sizes
        first = chromium.script(
            "const t = document.querySelector('.wide'), c = t.querySelector('tbody th'); t.scrollLeft = 300;"
            "return [c.getBoundingClientRect().left - t.getBoundingClientRect().left, t.scrollLeft]"
        )
        assert 0 <= first[0] < 2 and (first[1] > 0 or width > 390)
        light_ink = chromium.script("return getComputedStyle(document.querySelector('svg text')).fill")
        paper = chromium.script("return getComputedStyle(document.body).backgroundColor")
        assert (brightness(light_ink) > brightness(paper)) == (scheme == "dark")
        assert abs(brightness(light_ink) - brightness(paper)) > 150


def brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.slow
@needs_browser
def test_the_slider_shows_the_grid_of_its_round(page):
    with browser() as chromium:
        chromium.open(page)
        shown = (
            "return [...document.querySelectorAll('.samples')].map(s => [...s.querySelectorAll('.strips')]"
            ".filter(i => i.offsetParent).map(i => i.dataset.round).concat(s.querySelector('output').textContent))"
        )
        assert chromium.script(shown) == [["2", "round 2"], ["2", "round 2"]]
        chromium.script(
            "const s = document.querySelector('.samples input'); s.value = 0; s.dispatchEvent(new Event('input'))"
        )
        assert chromium.script(shown) == [["1", "round 1"], ["2", "round 2"]]
        assert chromium.console() == []


@pytest.mark.slow
def test_the_page_is_self_contained_and_says_what_the_logs_say(runs, page):
    text = page.read_text()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert fetched and all(target.startswith(("data:", "#")) for target in fetched)
    assert "@import" not in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "&lt;b&gt;udec" in text and "<b>udec</" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    full, udec = read_run(runs / "full"), read_run(runs / "<b>udec")
    for run in (full, udec):
        assert f"{run.averaged('fd_fmnist', 'fmnist-cnn', False)[-1][1]:.2f}" in text
        (told,) = run.told()
        assert told.startswith("100 images a model (ddim, 4 steps) against 100 of ") and f"Scores of {told}" in text
        assert "extractor fmnist-cnn" in told and told.endswith("images resized from 8 pixels")
    assert f"{sum(r['communicated_parameters'] for r in udec.rounds):,}" in text
    held = [(client["images"], sum(client["labels"].values())) for client in full.setting["clients"]]
    assert sum(images for images, _ in held) == 200 and all(images == of_labels for images, of_labels in held)
    differs, same = text[text.index('id="configuration"') :].split("<details>", 1)
    assert "<th>method</th><td>full</td><td>udec</td>" in differs and "<th>optim.lr</th>" not in differs
    assert "<th>optim.lr</th><td>1e-05</td>" in same
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    kinds = [f"client {c}, raw weights" for c in (0, 1)]
    assert captions == [
        "real images, embedded Fashion-MNIST excerpt, test split",
        *(f"global model, moving average, round {round}" for round in (1, 2)),
        *(f"{kind}, round {round}" for round in (1, 2) for kind in kinds),
    ]


@pytest.mark.slow
def test_a_run_whose_clients_keep_parts_shows_each_and_warns(runs, monkeypatch):
    udec = read_run(runs / "<b>udec")
    drawn: dict[str, Curve] = {}

    def draw(of, label, *over, **how):
        drawn.setdefault(label, of["<b>udec"])
        return curves(of, label, *over, **how)

    monkeypatch.setattr(charts, "curves", draw)
    text = render([udec])
    of_distance = drawn["fd_fmnist (lower is better)"]
    assert [[round for round, _ in client] for client in of_distance.clients] == [[1, 2], [1, 2]]
    by_hand = [row["scores"]["fd_fmnist"] for row in udec.scores if row["round"] == 2]
    assert [client[1][1] for client in of_distance.clients] == by_hand
    assert of_distance.raw[1] == (2, pytest.approx(sum(by_hand) / 2))
    assert "the clients differ widely" not in text

    far = [{**row, "scores": {**row["scores"], "fd_fmnist": 10 + 90 * row["client"]}} for row in udec.scores]
    found = re.findall(r'<p class="warning">(.*?)</p>', render([replace(udec, scores=far)]))
    expected = "the clients differ widely in fd_fmnist: deviation 82% of the mean, client 1 at 100.0"
    assert any(expected in warning for warning in found)


@pytest.mark.slow
def test_the_scoring_that_was_written_last_is_shown_of_each_extractor(runs, tmp_path):
    """Round 2 in one way, then round 1 in another, then both by inception."""
    run = tmp_path / "run"
    shutil.copytree(runs / "full", run)
    first, last = (rows(run, "scores")[i] for i in (0, 2))
    assert (first["round"], last["round"], first["ema"], last["ema"]) == (1, 2, False, False)
    other = {**first, "n": 99, "scores": {"fd_fmnist": 5.0, "missing_classes": [3, 7]}}
    how = {"extractor": "inception", "checksum": "f" * 64, "scores": {"fid": 9.0, "kid": 0.5}}
    fid = [{**row, **how} for row in (first, last)]
    append_jsonl(run / "scores.jsonl", [other, *fid])
    found = read_run(run)
    assert found.averaged("fd_fmnist", "fmnist-cnn", False) == [(1, 5.0)]
    assert found.averaged("fid", "inception", False) == [(1, 9.0), (2, 9.0)]
    assert found.averaged("missing_classes", "fmnist-cnn", False) == [(1, 2.0)]
    scores = {fact.name: fact.cells[0] for fact in facts.scores([found])}
    assert scores.pop("missing classes by fmnist-cnn") == "3, 7"
    assert scores == {"fd_fmnist": "5.00", "FID": "9.00", "KID by inception": "0.5000"}
    text = render([found])
    assert "99 images a model" in text and "extractor inception ffffffffffff" in text
    assert 'aria-label="FID (lower is better) by round"' in text
    assert 'aria-label="KID by inception (lower is better) by round"' in text
    assert "<th>missing classes by fmnist-cnn</th><td>3, 7</td>" in text


@pytest.mark.slow
def test_tensorboard_has_the_scores_of_the_log_and_the_bytes_of_each_round(runs):
    for name in ("full", "<b>udec"):
        run, events = read_run(runs / name), EventAccumulator(str(runs / name / "tensorboard")).Reload()

        def points(tag, events=events):
            return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

        assert run.averaged("fd_fmnist", "fmnist-cnn", False) == points("score-fmnist-cnn/fd_fmnist")
        assert [(row["round"], row["bytes_by_purpose"]["pictures"]) for row in run.rounds] == points("bytes/pictures")
        assert [(row["round"], row["seconds"]["train"]) for row in run.rounds] == points("seconds/train")
        tags = events.Tags()["scalars"]
        assert ("score-fmnist-cnn-average/fd_fmnist" in tags) == (name == "full")
        assert ("score-fmnist-cnn-client-0001/fd_fmnist" in tags) == (name != "full")


@pytest.mark.slow
def test_dropped_clients_are_told_with_round_and_reason_and_nothing_where_none_was(runs, page):
    full, unscored = read_run(runs / "full"), read_run(runs / "unscored")
    assert "went on without" not in page.read_text()
    why = "OSError: [Errno 5] <img src=x onerror=alert(1)> & 'quoted'"
    failing = replace(full, rounds=[full.rounds[0], {**full.rounds[1], "dropped": {"0": "no memory", "3": why}}])
    escaped = "OSError: [Errno 5] &lt;img src=x onerror=alert(1)&gt; &amp; &#39;quoted&#39;"
    for shown, name in (([failing], ""), ([unscored, failing], "<td>full</td>")):
        text = render(shown)
        table = text[text.index('id="dropped"') : text.index('id="samples"')]
        told = re.findall(r"<tr>(.*?)</tr>", table)[1:]
        assert told == [
            f'{name}<td>2</td><td>{client}</td><td class="text">{reason}</td>'
            for client, reason in ((0, "no memory"), (3, escaped))
        ]
        assert "<img src=x" not in text


@pytest.mark.slow
@needs_browser
def test_a_long_reason_does_not_widen_the_page(runs, tmp_path):
    full = read_run(runs / "full")
    why = "OSError: " + "/unreadable" * 180
    file = tmp_path / "page.html"
    file.write_text(render([replace(full, rounds=[{**row, "dropped": {"1": why}} for row in full.rounds])]))
    with browser() as chromium:
        chromium.emulate(390, 900, "light")
        chromium.open(file)
        widths = "return [document.documentElement, document.querySelector('#dropped + .wide')].map(e => e.scrollWidth)"
        page, table = chromium.script(widths)
        assert page <= 390 and table <= 390 and chromium.console() == []


@pytest.mark.slow
def test_a_run_that_has_only_begun_and_a_folder_that_is_none(runs, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs / "full" / "config.yaml", begun)
    assert "no round yet" in render([read_run(begun)])
    assert "No scores yet" in render([read_run(runs / "unscored")])
    with pytest.raises(UserError, match="none: is not a run folder of fdiff train"):
        read_run(tmp_path / "none")
    (begun / "config.yaml").write_text("method: half")
    with pytest.raises(UserError, match="config.yaml: method: 'half' is not valid"):
        read_run(begun)


def test_drawings_take_the_colour_of_the_page_and_ids_of_their_own():
    drawings = [
        curves({"a": Curve([(1, 2.0), (2, 1.0)], [(1, 3.0)], [[(1, 2.5)]]), "b": Curve([(1, 1.0)])}, "loss"),
        heat_map([{"0": 3, "10": 5}, {"2": 1}], "images"),
        bars({"full": 3.0, "udec": 1.0}, "N", "udec", {"full": "", "udec": "−66 %"}),
    ]
    ids: list[str] = []
    for text in drawings:
        assert text.startswith("<svg role=") and "currentColor" in text and "#010203" not in text
        assert "width:" in text and not re.search(r'<svg[^>]* (width|height)="', text)
        ids += re.findall(r'\bid="([^"]*)"', text)
        known = set(re.findall(r'\bid="([^"]*)"', text))
        assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]*)", text)) <= known
    assert len(ids) == len(set(ids))
    assert all(f">{word}<" in drawings[1] for word in ("3", "5", "10", "label", "client"))


# --- runs side by side, none of them trained ------------------------------------------------------------------------


def side_by_side(folder: Path, *names: str) -> list[Run]:
    return [read_run(write_run(folder / name, grids=0)) for name in names]


def test_runs_are_named_by_the_part_of_their_paths_that_differs(tmp_path):
    runs = side_by_side(tmp_path, "A/full-seed0", "B/full-seed0", "B/x/udec", "C/x/udec", "alone")
    names = ["A/full-seed0", "B/full-seed0", "B/x/udec", "C/x/udec", "alone"]
    assert [run.name for run in named_apart(runs)] == names
    page = render(runs)
    assert all(page.count(f">{name}<") >= 5 for name in names)  # the table, the legends, samples, fields, time


@pytest.mark.parametrize(
    "name", ["_a", r"a$\frac$b", "nan", "7", "<b>", "图", "a name of 30 letters and more, and so on"]
)
def test_a_name_is_a_name_in_every_chart_and_is_not_read_as_anything(tmp_path, name, recwarn):
    runs = side_by_side(tmp_path, name, "other")
    shown = html.escape(name, quote=False)
    bars = stacked({run.name: run.seconds for run in runs}, "s")
    written = "".join(re.findall(r">([^<]+)</t(?:ext|span)>", bars)).replace(" ", "")
    assert shown.replace(" ", "") in written and "other" in written
    titles = re.findall(r"<title>(.*)</title>", curves({run.name: Curve([(1, 2.0)]) for run in runs}, "loss"))
    assert titles == [html.escape(name), "other"]
    assert not recwarn.list


def test_a_run_has_one_colour_in_all_charts_and_no_other_run_has_it(tmp_path):
    """Of eleven runs the first has no scores: those after it keep their colours."""
    names = [f"run-{i}" for i in range(11)]
    losses = curves({name: Curve([(1, 2.0)]) for name in names}, "loss")
    scores = curves({name: Curve([(1, 2.0)] if i else []) for i, name in enumerate(names)}, "fid")
    lines, fewer = (re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 2\b", svg) for svg in (losses, scores))
    assert lines == [charts.colour(i) for i in range(11)] and len(set(lines)) == 11
    assert fewer == lines[1:] and ">run-0<" not in scores


def test_bars_keep_their_width_beside_long_names():
    """The axes take most of the figure whatever the names: with names of 30 letters on one line they vanished."""
    for name in ("a", "x" * 30, "fashion-mnist-udec-label-skew-" * 4):
        svg = stacked({name: {"train": 1.0}}, "seconds")
        view = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        (bar,) = re.findall(r'id="\S*patch_3">\s*<path d="M ([\d.]+) \S+\s*L ([\d.]+)', svg)
        assert float(bar[1]) - float(bar[0]) > 0.4 * view
