"""A run that came from somebody else: what is not as fdiff writes it is named by file and line; no file leaks."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from run_folders import CONFIG, client_row, round_row, score_row, write_rows, write_run

from fdiff import checkpoint
from fdiff.commands import report as command
from fdiff.commands import verify
from fdiff.config import to_dict
from fdiff.errors import UserError, printable
from fdiff.federation import find_gaps, log_problem
from fdiff.federation.validate import check_global
from fdiff.model import describe_model, layout_of
from fdiff.report import charts, read_run, render
from fdiff.report.charts import Curve
from fdiff.sweeps import results
from fdiff.sweeps.grid import Score

NAN, DEEP, VAST = float("nan"), "[" * 100_000, "9" * 5000
NO_ROWS = ["null", "[]", '"text"', "3", "{", DEEP, '{"loss": 1}', '{"round": "2"}', "\0", f'{{"round": {VAST}}}']


def without(row: dict, name: str) -> dict:
    return {field: value for field, value in row.items() if field != name}


def huge(row: dict, name: str) -> str:
    """The row with a number that JSON writes and no float holds."""
    return json.dumps({**row, name: "HERE"}).replace('"HERE"', "1e400")


MAY_LACK = ("round", "dropped", "bytes_by_purpose")
ROUND, CLIENT, SCORE = round_row(2), client_row(1, 1), score_row(1, 1)
ROWS = [  # a log, a row that stands in its second line, and what is said of it
    *(("rounds", without(ROUND, name), f"has no {name}") for name in ROUND if name not in MAY_LACK),
    *(("clients", without(CLIENT, name), f"has no {name}") for name in CLIENT if name != "round"),
    *(("scores", without(SCORE, name), f"has no {name}") for name in SCORE if name not in ("round", "resized_from")),
    ("rounds", {**ROUND, "round": 0}, "round is 0, it must be a round's number"),
    ("rounds", {**ROUND, "loss": None}, "loss is null, it must be a finite number"),
    ("rounds", {**ROUND, "loss": True}, "loss is true, it must be a finite number"),
    ("rounds", {**ROUND, "loss": NAN}, "loss is NaN, it must be a finite number"),
    ("rounds", huge(ROUND, "loss"), "loss is Infinity, it must be a finite number"),
    ("rounds", {**ROUND, "seconds": [1]}, "seconds is [1], it must be a table of finite numbers"),
    ("rounds", {**ROUND, "seconds": {"train": "\x1b[2J"}}, r'seconds is {"train": "\u001b[2J"}, it must be'),
    ("rounds", {**ROUND, "communicated_parameters": 10**400}, "communicated_parameters is 1000"),
    ("rounds", {**ROUND, "communicated_parameters": 0.5}, "it must be a whole number"),
    ("rounds", {**ROUND, "bytes_by_purpose": 5}, "bytes_by_purpose is 5, it must be a table of finite numbers"),
    ("rounds", {**ROUND, "seconds": {"a\nb": 1.0}}, "it must be a table of finite numbers"),
    ("rounds", {**ROUND, "dropped": {"x": "why"}}, "it must be a table of text by client"),
    ("rounds", {**ROUND, "dropped": ["0"]}, "it must be a table of text by client"),
    ("clients", {**CLIENT, "client": []}, "client is [], it must be a whole number"),
    ("scores", {**SCORE, "client": -1}, "client is -1, it must be a whole number or null"),
    ("scores", {**SCORE, "ema": 0}, "ema is 0, it must be true or false"),
    ("scores", {**SCORE, "scores": []}, "scores is [], it must be a table of numbers"),
    ("scores", {**SCORE, "scores": {"fd_fmnist": [1]}}, "it must be a table of numbers"),
    ("scores", {**SCORE, "scores": {"fd_fmnist": NAN}}, "it must be a table of numbers"),
    ("scores", {**SCORE, "scores": {"missing_classes": 3}}, "with missing_classes a list"),
    ("scores", {**SCORE, "scores": {"\ud800": 3}}, "it must be a table of numbers"),
    ("scores", {**SCORE, "extractor": '"><script>'}, "it must be a word"),
    ("scores", {**SCORE, "resized_from": "8"}, "it must be a whole number or null"),
    *((log, line, "line 2 is no row of a log") for log in ("rounds", "scores") for line in NO_ROWS),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


def refused(run: Path) -> str:
    """Why a run cannot be read: one line, however long what is wrong is."""
    with pytest.raises(UserError) as raised:
        read_run(run)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    return str(raised.value)


def test_the_run_of_these_tests_is_sound(sound):
    assert find_gaps(sound) == [] and log_problem(sound, "scores") == "" and len(read_run(sound).grids) == 2


@pytest.mark.parametrize(("log", "row", "said"), ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, sound, log, row, said):
    for name in ("config.yaml", "setting.json", *(f"{other}.jsonl" for other in ("rounds", "clients", "scores"))):
        (tmp_path / name).write_bytes((sound / name).read_bytes())
    first = (sound / f"{log}.jsonl").read_text().splitlines()[0]
    write_rows(tmp_path / f"{log}.jsonl", [first, row])
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / log}.jsonl: line 2") and said in message
    assert message.endswith("; remove that line" if log == "scores" else f"--run.dir {tmp_path} makes it whole again")
    assert message in [*find_gaps(tmp_path), log_problem(tmp_path, "scores")]  # as verify says it


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        *((text, "is no table") for text in ("null", "[]", "3", '"text"')),
        *((text, "is no JSON") for text in ("{", "", DEEP, VAST, b"\xff")),
        ('{"ranks": 5}', "ranks is 5, it must be a list of ranks, each with host and device"),
        ('{"ranks": [{"host": "a"}]}', "it must be a list of ranks"),
        ('{"ranks": [null]}', "it must be a list of ranks"),
        ('{"clients": [{"images": 1e400}]}', "it must be a list of clients, each with its images"),
        ('{"clients": [{"images": 5, "labels": [5]}]}', "it must be a list of clients"),
        ('{"torch": null}', "torch is null, it must be text"),
        (json.dumps({"ranks": [{"host": "a", "device": "b"}] * 3}), "2 clients cannot occupy 3 ranks"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_setting_is_named_by_its_file(run, setting, said):
    (run / "setting.json").write_bytes(setting if isinstance(setting, bytes) else setting.encode())
    message = refused(run)
    assert message.startswith(f"{run / 'setting.json'}: ") and said in message


@pytest.mark.parametrize(
    "name", ["rounds.jsonl", "scores.jsonl", "setting.json", "config.yaml", "samples/round-000001.png"]
)
def test_what_is_no_regular_file_is_not_waited_for(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    assert "config.yaml" in refused(run) if name == "config.yaml" else f"{name}: is not a regular file" in refused(run)
    if name.endswith("rounds.jsonl"):
        assert find_gaps(run) == [f"{run / name}: is not a regular file; remove it"]


@pytest.mark.parametrize("name", ["rounds.jsonl", "setting.json", "samples/round-000001.png"])
def test_a_vast_file_is_refused_before_memory_is_taken(run, name):
    os.truncate(run / name, 2**40)
    assert f"{name}: has {2**40} bytes, and at most" in refused(run)


def test_a_run_too_large_to_plan_is_refused_at_once(run):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        re.sub(r"\brounds: 2", "rounds: 1000000", re.sub(r"\bclients: 2", "clients: 99", config))
    )
    assert "config.yaml: 1000000 rounds of 99 clients are more than a report plans" in refused(run)


# --- pictures ---------------------------------------------------------------------------------------------------------


def embedded(page: str) -> list[bytes]:
    return [base64.b64decode(url) for url in re.findall(r"data:image/png;base64,([^\"]*)", page)]


def test_pictures_are_decoded_and_written_again(run):
    """The pixels alone are passed on: no text, no colour profile, no bytes behind the end."""
    noted = PngImagePlugin.PngInfo()
    noted.add_text("Comment", "secret", zip=False)
    pixels = Image.fromarray(np.random.RandomState(0).randint(256, size=(9, 7, 3), dtype=np.uint8))
    picture = run / "samples" / "round-000001.png"
    pixels.save(picture, pnginfo=noted, icc_profile=b"secret profile", exif=b"Exif\0\0secret")
    picture.write_bytes(picture.read_bytes() + b"secret")
    first = embedded(render([read_run(run)]))[1]  # behind real images
    with Image.open(io.BytesIO(first)) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(pixels)) and not shown.info
    assert b"secret" not in first and b"IHDR" in first


def large(path: Path) -> None:
    """81 million pixels in 10 KB."""
    Image.new("1", (9000, 9000)).save(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "leads out of the run"),
        (lambda path: path.symlink_to("../../secret.png"), "leads out of the run"),
        (lambda path: path.symlink_to(path.name), "is not a PNG image of this run"),
        (lambda path: path.symlink_to("none"), "is not a PNG image of this run"),
        (lambda path: path.symlink_to("../config.yaml"), "is not a PNG image of this run"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: path.write_text("no picture"), "is not a PNG image of this run"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "is not a PNG image of this run"),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "GIF"), "is not a PNG image of this run"),
        (large, "9000×9000 pixels are more than 64,000,000"),
    ],
)
def test_a_picture_that_is_none_of_the_run_is_refused(run, make, said):
    Image.new("RGB", (9, 9)).save(run.parent / "secret.png")
    picture = run / "samples" / "round-000002.png"
    picture.unlink()
    make(picture)
    message = refused(run)
    assert message.startswith(f"{picture}: ") and said in message and message.endswith("remove it")


def test_a_folder_of_pictures_elsewhere_is_not_passed_on(run):
    (run / "samples").rename(run.parent / "elsewhere")
    (run / "samples").symlink_to("../elsewhere")
    assert "leads out of the run" in refused(run)


def test_a_link_within_the_run_and_a_linked_run_are_shown(run, tmp_path):
    (run / "samples" / "round-000003.png").symlink_to("round-000001.png")
    (tmp_path / "link").symlink_to(run)
    grids = read_run(tmp_path / "link").grids
    assert list(grids) == [1, 2, 3] and grids[3] == grids[1]


# --- checkpoints and sweeps read rows, too ----------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [None, [], 3, {"dropped": []}, {"dropped": {"x": "why"}}, {"dropped": {"0": 3}}])
def test_a_checkpoint_whose_row_of_the_round_is_none_is_damaged(tmp_path, metrics):
    """`evaluate --local` asks it which clients were dropped."""
    layout = checkpoint.layout_table(layout_of(describe_model(CONFIG)))
    header = {"round": 1, "config": to_dict(CONFIG), "layout": layout, "images": [32, 32], "metrics": metrics}
    with pytest.raises(checkpoint.Damaged, match="global.h5: its header does not say which clients were dropped; use"):
        check_global(tmp_path, header, {})


@pytest.mark.parametrize("resized", [{}, {"resized_from": 8}])
def test_a_score_of_images_that_were_not_resized_counts_in_a_sweep(resized):
    score = {**without(SCORE, "resized_from"), **resized}
    assert results._is_as_wanted(score, Score(images=99, sampler="ddim", steps=4), CONFIG)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_bad_run_is_refused_and_the_others_are_shown(sound, tmp_path, capsys, caplog):
    bad, worse = write_run(tmp_path / "bad"), write_run(tmp_path / "worse")
    write_rows(bad / "rounds.jsonl", ["null"])
    (worse / "setting.json").write_text("[]")
    with pytest.raises(UserError, match="worse/setting.json: is no table") as raised:
        command.run([bad, sound, worse], out=tmp_path / "page.html")
    assert raised.value.status == 2
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert [r.message for r in caplog.records] == [f"fdiff: error: {find_gaps(bad)[0]}"]
    assert "<title>fdiff: run</title>" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="bad/rounds.jsonl: line 1 is no row"):
        command.run([bad])
    assert not (bad / "report.html").exists()


def test_verify_names_a_bad_row_of_every_log(run, monkeypatch, capsys):
    write_rows(run / "rounds.jsonl", [round_row(1), "[]"])
    write_rows(run / "scores.jsonl", [{**SCORE, "ema": None}])
    monkeypatch.setattr(verify, "folders", lambda path: [])
    with pytest.raises(verify.RunError, match="2 problems"):
        verify.run(run)
    damaged = capsys.readouterr().out.splitlines()
    assert "rounds.jsonl: line 2 is no row of a log" in damaged[0]
    assert "scores.jsonl: line 1: ema is null, it must be true or false" in damaged[1]


EVIL = '"><script>alert(1)</script>\'&amp;\ud800\x1b[31m$\\frac{\r\n\u202ecod\u2066\u200b\u2028'


class Elements(HTMLParser):
    """The names of a page's elements and of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.update((tag, *(name for name, _ in attributes)))


def page_of(run: Path, text: str) -> str:
    """The page of two runs in which a stranger says this wherever something can be said."""
    write_rows(run / "rounds.jsonl", [round_row(1, loss=1e99, dropped={"0": text}), round_row(2, loss=-1e99)])
    write_rows(run / "scores.jsonl", [score_row(2**62, 0, split=text, scores={"fd_fmnist": 1e99, "n": 1e-99})])
    clients = [{"images": 2**62, "labels": {"Ü": 2**62, "1": 0}}]
    setting = {"torch": text, "ranks": [{"host": text, "device": text}], "clients": clients}
    (run / "setting.json").write_text(json.dumps(setting))
    read = read_run(run)
    config = replace(read.config, data=replace(read.config.data, root=text))
    folder = Path("/nowhere") / text.replace("/", "-").replace("\ud800", "\udcff")
    return render([replace(read, config=config, folder=folder), replace(read, folder=Path("/nowhere/other"))])


def test_text_of_a_stranger_is_text_on_the_page(run):
    """Tags, quotes, marks that turn text round and letters that no file can hold, in every text that the page shows."""
    page = page_of(run, EVIL)
    assert page.count("<script>") == 1 and "alert(1)" in page and page.encode()
    assert printable(page, keep="\n") == page
    assert Elements(page).found == Elements(page_of(run, "plain")).found


def test_a_drawing_shows_a_strangers_text(run):
    drawn = charts.heat_map([{EVIL: 3}], EVIL) + charts.bars({EVIL: 1.0}, "N", EVIL, {EVIL: "−1%"})
    drawn += charts.stacked({EVIL: {EVIL: 1.0}}, "s") + charts.curves({EVIL: Curve([(1, 2)]), "b": Curve([])}, "loss")
    assert printable(drawn, keep="\n") == drawn and drawn.encode() and "<script" not in drawn
    assert r"\u202ecod" in drawn
