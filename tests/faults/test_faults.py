"""The short fault suite: nothing is lost, nothing hangs, nothing damaged is loaded. See faults/__main__.py.

And the suite itself: what it would miss.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from array_files import ARRAYS, HEADER, write_one

from faults import __main__ as command
from faults import damage, forging, injections, resuming, runs, suite
from faults.ledger import Row, enter
from faults.processes import Job
from faults.suite import FAULTS, Fault, run
from fdiff.checkpoint.file import read_file

# Half a minute and more each, of what other modules show in fewer cases: tests/launch/test_requeue.py and
# tests/federation/test_resume.py signal jobs of launchers, and resume them on other numbers of ranks.
RARE = ("locks", "slurm", "torchrun", "resumes")
# Cases after those of the short suite: other seeds of faults that it has shown in every kind.
MORE = {"commits": 16, "ranks": 12, "segfaults": 4, "stopped": 3, "clients": 8, "damage": 16, "resumes": 12}


def inject(name: str, count: int, first: int = 0) -> None:
    if reason := FAULTS[name].needs():
        pytest.skip(reason)
    row, _ = run(name, count, first)
    assert row.passed, (row.cells(), row.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.rare] * (n in RARE)) for n in FAULTS])
def test_fault(name):
    inject(name, FAULTS[name].short)


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MORE)
def test_more_cases_of_a_fault(name):
    inject(name, MORE[name], first=FAULTS[name].short)


# --- the suite itself ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_rank_leaves_behind_is_counted_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("forked_jobs.PATIENCE_S", 0.5)
    job = Job(runs.train("run", "full", 1), 2, tmp_path, injections.leave_a_process)
    assert job.wait(60) and job.statuses() == [0, 0]
    assert job.left_over == 2
    assert Job(runs.train("run", "full", 1), 1, tmp_path).wait(60)


@pytest.mark.slow
def test_a_result_that_is_not_bit_equal_is_silent_damage(tmp_path):
    row = Row("x")
    job = Job(runs.train("run", "full", 1, "--run.seed", 1), 1, tmp_path)
    assert job.wait(60) and not runs.equal(tmp_path / "run", 1, "full") and runs.committed(tmp_path, "run") == 1
    assert not runs.goes_on(row, tmp_path / "run", 1, "full", "--optim.lr", 1e-6) and row.notes


def test_a_row_passes_only_with_everything_found_and_nothing_lost():
    good = Row("x", injected=2, detected=2)
    assert good.passed and not Row("x").passed
    for wrong in ({"detected": 1}, {"lost": 1}, {"silent": 1}, {"hung": 1}, {"left_over": 1}):
        assert not replace(good, **wrong).passed
    assert not replace(good, control=True).passed and replace(good, control=True, lost=1).passed


def test_rows_of_several_calls_add_up_in_the_ledger(tmp_path):
    ledger = tmp_path / "ledger.md"
    enter(ledger, "ranks", Row("killed", 3, 3, worst_s=2.0), FAULTS)
    enter(ledger, "commits", Row("cut", 1, 1), FAULTS)
    enter(ledger, "ranks", Row("killed", 2, 1, lost=1, worst_s=1.0, notes=["n"]), FAULTS)
    rows = ["| cut | 1 | 1 | 0 | 0 | 0 | 0 |  |", "| killed | 5 | 4 | 1 | 0 | 0 | 0 | 2.0 |"]
    assert ledger.read_text().splitlines()[2:] == rows


def test_an_error_of_the_suite_fails_its_row_and_no_other(monkeypatch, capsys):
    def broken(row, cases, folder):
        row.saw(True)
        raise OSError("no such thing")

    monkeypatch.setitem(FAULTS, "ranks", Fault("broken", broken, 1, 1))
    monkeypatch.setitem(FAULTS, "clients", Fault("fine", lambda row, cases, folder: row.saw(True), 1, 1))
    assert command.main(["--only", "ranks", "clients"]) == 1
    said = capsys.readouterr().out
    assert "ranks: FAILED" in said and "no such thing" in said and "clients: passed" in said
    assert "| broken | 2 | 1 |" in said


def test_a_fault_that_cannot_be_injected_is_said_to_be_skipped(monkeypatch, capsys):
    fine = Fault("fine", lambda row, cases, folder: row.saw(True), 1, 1)
    monkeypatch.setitem(FAULTS, "clients", fine)
    monkeypatch.setitem(FAULTS, "disks", replace(fine, needs=lambda: "no root"))
    assert command.main(["--only", "clients", "disks"]) == 0
    assert "disks: SKIPPED, no root" in capsys.readouterr().out
    assert command.main(["--full", "--only", "clients", "disks"]) == 1


def test_the_counts_of_the_short_suite_reach_every_method_and_place():
    short = {name: range(fault.short) for name, fault in FAULTS.items()}
    assert {(i % 3) for i in short["ranks"]} == {0, 1, 2} and {i % 4 for i in short["ranks"]} == {0, 1, 2, 3}
    assert {(kind, i // 8 % 2) for i in short["damage"] for kind in [damage.KINDS[i % 8]]} == {
        (kind, forged) for kind in damage.KINDS for forged in (0, 1)
    }
    firsts = [resuming.first_stop(i) for i in range(FAULTS["resumes"].full // resuming.STOPS)]
    assert len(set(firsts[: FAULTS["resumes"].short // resuming.STOPS])) == 4
    assert all({firsts[i] for i in range(m, 32, 4)} == set(range(1, resuming.FIRST + 1)) for m in range(4))
    assert suite.FAULTS["torchrun"].full + suite.FAULTS["slurm"].full == 50


def test_forged_files_have_checksums_that_are_right(tmp_path):
    file = write_one(tmp_path)
    before = read_file(file)
    forging.replace(file, "parts/encoder", ARRAYS["parts/encoder"] + 1, manifest=True)
    assert damage.loads_otherwise(file, before)
    forging.replace(file, "header", forging.as_array({**HEADER, "version": 2, "note": "forged"}), manifest=True)
    assert read_file(file)[1]["note"] == "forged"
    forging.replace(file, "step", ARRAYS["step"] + 1, manifest=False)
    assert not damage.loads_otherwise(file, before)
