"""Sweeps: that complete runs are skipped and interrupted ones go on, and the table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT, clean_env, in_turn, rows
from launchers import PYTHON, rounds, started, wait_for
from progress_bars import recorded
from tiny_sweep import ALONE, LINE, TINY, sweep_file

from fdiff.comm import SoloCommunicator
from fdiff.commands import sweep as command
from fdiff.commands.flags import parse
from fdiff.config import RuntimeConfig
from fdiff.errors import Interrupted, RunError, UserError
from fdiff.federation.logs import append_jsonl
from fdiff.runtime.signals import Stop
from fdiff.sweeps import as_csv, as_latex, as_text, bring_to_end, read, result, running

CPU = torch.device("cpu")


def test_the_table_says_the_same_as_text_csv_and_latex():
    other = dataclasses.replace(LINE, method="full", deviation=None, worst=None)
    text = as_text([other, LINE])
    assert "fd_fmnist" in text and "70.24 ± 28.31" in text and "1,234,567" in text and "73.6%" in text
    told = (
        "100 images a model (ddim, 20 steps) against 500 of the test split; extractor fmnist-cnn 0123456789ab, "
        "images resized from 16 pixels"
    )
    assert text.splitlines()[1] == told
    widths = {len(line) for line in text.splitlines()[2:]}
    assert len(widths) == 1  # right-aligned to one edge
    (first, second) = csv.DictReader(io.StringIO(as_csv([other, LINE])))
    assert (first["deviation"], second["deviation"], second["wire_bytes"]) == ("", "28.31", "5000000")
    assert (first["n"], first["split"], first["checksum"], first["resized_from"]) == (
        "100", "the test split", "0123456789abcdef", "16",
    )  # fmt: skip
    latex = as_latex([LINE])
    assert r"70.24 $\pm$ 28.31" in latex and r"73.6\%" in latex and r"fd_fmnist" in latex.splitlines()[0]
    assert latex.count(r"\\") == 2 and f"% {told}" in latex.splitlines()
    elsewhere = dataclasses.replace(LINE, n=200)
    assert [line for line in as_text([LINE, elsewhere]).splitlines() if "images a model" in line] == [
        told, told.replace("100 images", "200 images"),
    ]  # fmt: skip


def test_what_the_grid_varies_has_a_column():
    lines = [dataclasses.replace(LINE, varied={"data.beta": beta}) for beta in (0.1, 0.5)]
    heading, first, second = as_text(lines).splitlines()[2:]
    assert heading.split()[:3] == ["method", "partition", "data.beta"]
    assert [line.split()[2] for line in (first, second)] == ["0.1", "0.5"]
    assert [row["data.beta"] for row in csv.DictReader(io.StringIO(as_csv(lines)))] == ["0.1", "0.5"]
    assert r"label-skew & 0.1 & 5" in as_latex(lines)


# --- a small one, carried out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A folder with tiny.yaml and what two ranks made of it: FULL and UDEC, each scored after its two rounds."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        words = ["sweep", "tiny.yaml", "--out", "out", "--runtime.threads", 1]
        first, second = in_turn(2, [words], folder)[0]
    assert (first.check().out, second.check().out) == ((folder / "out" / "table.txt").read_text(), "")
    return folder


@pytest.fixture
def swept(complete, tmp_path, monkeypatch) -> Path:
    """A copy of that, to go on in."""
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go_on(**more: Any) -> None:
    """`fdiff sweep tiny.yaml --out out` on one rank."""
    command.run("tiny.yaml", ALONE, SoloCommunicator(), CPU, out=Path("out"), **more)


def table() -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))


FULL, UDEC = (Path("out") / f"clients-2_method-{method}" for method in ("full", "udec"))


@pytest.mark.slow
def test_the_table_has_costs_and_facts_of_every_scored_round(swept):
    lines = table()
    assert [(line["method"], line["round"]) for line in lines] == [(m, r) for m in ("full", "udec") for r in "12"]
    assert sorted((r["round"], r["client"]) for r in rows(UDEC, "scores")) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(line["n"], line["resized_from"], line["sampler"], line["steps"]) for line in lines} == {
        ("100", "8", "ddim", "2")
    }
    assert "test split" in lines[0]["split"] and len(lines[0]["checksum"]) == 64
    for full, udec in zip(lines[:2], lines[2:], strict=True):  # N and saving are of the same rounds
        assert float(full["saving"]) == 0
        ratio = int(udec["communicated_parameters"]) / int(full["communicated_parameters"])
        assert float(udec["saving"]) == pytest.approx(1 - ratio)
        assert int(udec["wire_bytes"]) < int(full["wire_bytes"]) and float(udec["seconds"]) > 0
    assert lines[2]["saving"] != lines[3]["saving"]


@pytest.mark.slow
def test_what_is_complete_is_skipped_even_without_its_checkpoints(swept, monkeypatch):
    before = Path("out/table.txt").read_bytes()
    shutil.rmtree(FULL / "checkpoints")
    monkeypatch.setattr(running.federation, "run", None)
    monkeypatch.setattr(running, "Scoring", None)
    go_on()
    assert Path("out/table.txt").read_bytes() == before


@pytest.mark.slow
def test_a_sweep_goes_on_with_what_is_not_complete(swept, monkeypatch):
    """As if killed twice: FULL's scores are not taken, UDEC is in its last round. A bar shows how the scoring goes."""
    before, bars = table(), recorded(monkeypatch)
    (FULL / "scores.jsonl").unlink()
    for name in ("rounds", "clients"):
        keep(UDEC / f"{name}.jsonl", lambda row: row["round"] < 2)
    shutil.rmtree(UDEC / "checkpoints" / "round-000002")
    log = (FULL / "rounds.jsonl").read_bytes()
    go_on()
    assert (FULL / "rounds.jsonl").read_bytes() == log  # not trained again
    assert (UDEC / "checkpoints" / "round-000002").exists() and len(rows(UDEC)) == 2
    assert same_scores(table(), before)
    drawn = [bar for bar in bars if bar.unit == " images"]  # the others are of training
    assert [bar.desc for bar in drawn] == ["round 1", "round 2", "round 2"]
    assert [bar.total for bar in drawn] == [100, 100, 200] == [pytest.approx(bar.n) for bar in drawn]


@pytest.mark.slow
def test_a_kill_between_the_last_row_and_its_checkpoint_costs_only_that_round(swept):
    before = table()
    keep(FULL / "scores.jsonl", lambda row: row["round"] < 2)
    shutil.rmtree(FULL / "checkpoints" / "round-000002")
    assert len(rows(FULL)) == 2  # the log already has the round
    go_on()
    assert [row["round"] for row in rows(FULL)] == [1, 2] and (FULL / "checkpoints" / "round-000002").exists()
    assert same_scores(table(), before)


@pytest.mark.slow
def test_scores_that_were_taken_otherwise_stay_out_of_the_table(swept):
    before = table()
    for run in (FULL, UDEC):
        wrong = [{**row, "scores": {"fd_fmnist": 1e6}} for row in rows(run, "scores")]
        ways = ({"n": 99}, {"steps": 4}, {"sampler": "ddpm"})
        others = [{**row, **how} for row in wrong for how in ways]
        others += [{**row, "local": not row["local"]} for row in wrong]
        others += [{**row, "extractor": "inception", "scores": {"fid": 1.0}} for row in wrong]
        others += [{**row, "scores": {"kid": 1.0}} for row in wrong]
        others += [{**row, "ema": True} for row in wrong]
        append_jsonl(run / "scores.jsonl", others)
    go_on()
    assert same_scores(table(), before)

    sweep_file(swept, score={"rounds": [2], "local": True})  # as many as there are real ones, the run's sampler
    go_on()
    assert same_scores(table(), [line for line in before if line["round"] == "2"])


@pytest.mark.slow
def test_of_two_ways_that_both_fit_a_line_has_one(swept):
    """The same n against another test split, as `fdiff evaluate --root` takes it, of one of two clients."""
    before, row = table(), rows(UDEC, "scores")[-1]
    append_jsonl(UDEC / "scores.jsonl", [{**row, "n_real": 101, "scores": {"fd_fmnist": 1e6}}])
    go_on()
    assert same_scores(table(), before)  # the other client was scored anew, and so was this one
    assert all(float(line["score"]) < 1e5 for line in table())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "runtime", "expected"),
    [
        ({"optim": {"batch_size": 4}}, {}, "optim.batch_size = 8, the sweep has 4"),
        ({"run": {"seed": 7}}, {}, "run.seed = 0, the sweep has 7"),
        ({}, {"precision": "float64"}, "runtime.precision = 'float32', the sweep has 'float64'"),
        ({"federation": {"rounds": 1, "local_epochs": 1}}, {}, "federation.rounds = 2, the sweep has 1"),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_has_no_line(swept, fields, runtime, expected):
    sweep_file(swept, fields={**TINY, **fields}, score={"images": 100})
    with pytest.raises(RunError) as refused:
        command.run("tiny.yaml", RuntimeConfig(threads=1, **runtime), SoloCommunicator(), CPU, out=Path("out"))
    assert str(refused.value).count(expected) == 2 and str(refused.value).count("give another --out") == 2
    assert table() == []


@pytest.mark.slow
def test_more_rounds_go_on_and_other_places_do_not_matter(swept):
    before = table()
    longer = {**TINY, "federation": {"rounds": 3, "local_epochs": 1}}
    sweep_file(swept, fields=longer, score={"images": 100, "rounds": [1, 3], "local": True})
    command.run("tiny.yaml", RuntimeConfig(threads=1, timeout_s=99.0), SoloCommunicator(), CPU, out=Path("out"))
    assert [line["round"] for line in table()] == ["1", "3"] * 2
    assert same_scores(table()[::2], before[::2])


@pytest.mark.slow
def test_a_signal_stops_the_scoring_and_keeps_what_is_scored(swept, monkeypatch):
    before = table()
    sweep = read(Path("tiny.yaml"), Path("out"), ALONE)
    keep(UDEC / "scores.jsonl", lambda row: row["round"] < 2)
    stop = Stop()

    def kept(path: Path, new: list[dict[str, Any]]) -> None:
        append_jsonl(path, new)
        stop.note(signal.SIGUSR2, None)

    monkeypatch.setattr(running, "append_jsonl", kept)
    with pytest.raises(Interrupted) as stopped:
        bring_to_end(sweep, sweep.cells[1], SoloCommunicator(), CPU, swept / "cache", stop)
    assert stopped.value.status == 128 + signal.SIGUSR2 and stopped.value.agreed
    again = command._interrupted(stopped.value)
    assert str(again).endswith("call the same sweep again to go on") and again.agreed
    assert [row["client"] for row in rows(UDEC, "scores") if row["round"] == 2] == [0]
    assert [line.round for line in result(sweep, sweep.cells[1])] == [1]  # not of half of the clients
    monkeypatch.undo()
    monkeypatch.chdir(swept)
    go_on()
    assert [row["client"] for row in rows(UDEC, "scores") if row["round"] == 2] == [0, 1]  # the first not again
    assert same_scores(table(), before)


@pytest.mark.parametrize(
    ("score", "fields", "expected"),
    [
        ({"images": 1}, {}, "--images: 1 images are too few for frechet"),
        ({"images": 100}, {"data": {**TINY["data"], "test_limit": 1}}, "data.test_limit: 1 images are too few"),
        ({"images": 100, "extractor": "fmnist-cnn"}, {"data": {**TINY["data"], "channels": 3}}, "1 channel"),
    ],
)
def test_what_cannot_be_scored_is_not_trained(tmp_path, monkeypatch, score, fields, expected):
    monkeypatch.chdir(tmp_path)
    sweep_file(tmp_path, fields={**TINY, **fields}, score=score)
    with pytest.raises(UserError, match=f"clients-2_method-full: .*{expected}"):
        go_on()
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda: (UDEC / "config.yaml").write_text("a: [1"), "config.yaml"),
        (lambda: (UDEC / "config.yaml").write_text("{}\nmodel: 5\n"), "config.yaml"),
        (lambda: (UDEC / "scores.jsonl").write_text("nothing\n"), "scores.jsonl: line 1 is no row"),
    ],
)
def test_a_damaged_cell_fails_alone_and_by_its_file(swept, damage, says):
    before = table()
    damage()
    keep(FULL / "scores.jsonl", lambda row: row["round"] < 2)  # the other one has something to do
    with pytest.raises(RunError) as failed:
        go_on()
    assert says in str(failed.value) and "clients-2_method-udec" in str(failed.value)
    assert "method-full" not in str(failed.value) and "Error" not in str(failed.value)
    assert same_scores(table(), before[:2])


@pytest.mark.slow
def test_a_log_that_was_emptied_is_made_whole(swept):
    before = table()
    (UDEC / "rounds.jsonl").write_text("")
    go_on()
    assert [line["communicated_parameters"] for line in table()] == [line["communicated_parameters"] for line in before]


# --- as a job of its own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks_per_node", "3"], "2 clients cannot occupy 3 ranks"),
        (["--federation.rounds", "3"], "--sweep: the file says what runs; besides it give only --run.dir"),
        (["--array", "a.yaml"], "--array: 'a.yaml' does not go with --sweep"),
        (["--sweep", "none"], "'none' is no file and not one of those that ship"),
    ],
)
def test_a_sweep_that_would_fail_in_the_queue_is_refused_before_it(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_file(tmp_path)
    asked = parse(["submit", "--cluster", "local", "--sweep", "tiny.yaml", *words])
    with pytest.raises(UserError, match=named):
        asked.run(**asked.arguments)
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.rare  # what requeues is the same as on Slurm: tests/launch/test_requeue.py
def test_a_submitted_sweep_requeues_itself_and_goes_on(tmp_path):
    longer = {**TINY, "federation": {"rounds": 12, "local_epochs": 1}}
    sweep_file(tmp_path, fields=longer, score={"images": 100})
    words = ["--sweep", "tiny.yaml", "--run.dir", "out", "--runtime.threads", "1"]
    command = [*PYTHON, "submit", "--cluster", "local", "--tasks_per_node", "2", "--wait", *words]
    env = clean_env(PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(tmp_path / "cache"))
    runs = [tmp_path / run for run in (FULL, UDEC)]
    with started(command, tmp_path, env) as job:
        wait_for(lambda: rounds(runs[0]) >= 2, 180, "two rounds")
        for pid in sweeping(tmp_path):
            os.kill(pid, signal.SIGUSR2)
        assert job.wait(240) == 0, job.printed
        assert "restart 1" in job.printed and "COMPLETED  round 24/24" in job.printed
    assert [rounds(run) for run in runs] == [12, 12]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_text())))
    assert [(line["method"], line["round"]) for line in lines] == [("full", "12"), ("udec", "12")]


def sweeping(folder: Path) -> list[int]:
    """The processes `python -m fdiff sweep` that run in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (process / "cwd").resolve() == folder.resolve()
            found += [int(process.name)] * (ours and b"-m\0fdiff\0sweep" in (process / "cmdline").read_bytes())
        except OSError:  # it ended while we looked
            continue
    return found


def keep(log: Path, wanted: Any) -> None:
    """Only the rows that are wanted stay in a log."""
    found = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in found if wanted(row)))


def same_scores(found: list[dict[str, str]], expected: list[dict[str, str]]) -> bool:
    def facts(lines: list[dict[str, str]]) -> list[Any]:
        return [(x["cell"], x["round"], x["n"], x["steps"], pytest.approx(float(x["score"]), rel=1e-4)) for x in lines]

    return facts(found) == [(x["cell"], x["round"], x["n"], x["steps"], float(x["score"])) for x in expected]
