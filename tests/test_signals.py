"""Signals: the first is heeded at a safe point, an echo of it is not a second one, a second one ends at once."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from faults import plants
from faults.processes import Job
from faults.runs import LOADING, logged, rounds_there, train
from launching import wait_for

from fdiff import signals
from fdiff.errors import Interrupted
from fdiff.signals import ECHO_S, Stop


@pytest.fixture
def clock(monkeypatch) -> dict[str, float]:
    now = {"s": 100.0}
    monkeypatch.setattr(signals.time, "monotonic", lambda: now["s"])
    monkeypatch.setattr(signals.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    return now


def test_the_first_signal_is_noted_and_heeded_when_it_is_safe(clock):
    stop = Stop()
    stop.check()
    stop.note(signal.SIGUSR2, None)
    with pytest.raises(Interrupted) as raised:
        stop.check()
    assert raised.value.status == 128 + signal.SIGUSR2


def test_an_echo_within_a_second_is_the_same_request(clock):
    stop = Stop()
    stop.note(signal.SIGINT, None)
    clock["s"] += ECHO_S - 0.1
    stop.note(signal.SIGINT, None)
    assert stop.number == signal.SIGINT


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_with_its_own_status(clock, second):
    stop = Stop()
    stop.note(signal.SIGINT, None)
    clock["s"] += ECHO_S + 0.1
    with pytest.raises(SystemExit) as raised:
        stop.note(second, None)
    assert raised.value.code == 128 + second


def test_outside_of_a_run_signals_do_what_they_did():
    before = signal.getsignal(signal.SIGTERM)
    with signals.heeded():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# --- real ranks ----------------------------------------------------------------------------------------------------

ROUNDS = ("--run.checkpoint_every", 100)  # only the signal brings about a checkpoint


def started(folder: Path, ranks: int, fault=None, more=()) -> Job:
    job = Job(train("run", "udec", 10_000, *ROUNDS, *more), ranks, folder, fault)
    wait_for(lambda: logged(folder / "run"), 60, "a round")
    return job


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_commits_the_last_complete_round(tmp_path, ranks):
    job = started(tmp_path, ranks)
    for rank in range(ranks):
        job.signal(rank, signal.SIGINT)
    assert job.wait(60) and set(job.statuses()) == {130} and not job.left_over
    complete = logged(tmp_path / "run")[-1]["round"]
    assert rounds_there(tmp_path / "run") == [complete]
    assert len(job.errors()) == 1 and f"stopped by SIGINT; round {complete} is committed" in job.errors()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_whole_process_group_leaves_the_loaders_at_work(tmp_path, number):
    """As torchrun and Slurm send it; the loaders' processes must not end before the step does."""
    job = started(tmp_path, 1, partial(plants.hold_in_round, 2, 2.0), LOADING)
    wait_for(lambda: (tmp_path / "held").exists(), 60, "round 2")
    os.killpg(job.pids[0], number)
    assert job.wait(60) and job.statuses() == [128 + number], job.said()
    assert rounds_there(tmp_path / "run") == [1] and not job.left_over


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_step(tmp_path, number):
    job = started(tmp_path, 1, partial(plants.hold_in_round, 2, 600.0))
    wait_for(lambda: (tmp_path / "held").exists(), 60, "round 2")
    job.signal(0, number)
    time.sleep(ECHO_S + 0.2)
    assert job.alive() == [0], "the first one waits for the step"
    began = time.monotonic()
    job.signal(0, number)
    assert job.wait(20) and job.statuses() == [128 + number]
    assert job.ended_s[0] - began < 5 and rounds_there(tmp_path / "run") == []
    assert os.path.exists(tmp_path / "run" / "rounds.jsonl")
