"""Signals: the first is heeded at a safe point, an echo of it is not a second one, a second one ends at once."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import injections
from faults.processes import Job
from faults.runs import LOADING, logged, rounds_there, train
from jobs import arrays
from launchers import wait_for

from fdiff.errors import Interrupted, RunError
from fdiff.federation import host
from fdiff.federation.saved import open_checkpoint
from fdiff.runtime import signals
from fdiff.runtime.signals import ECHO_S, Stop


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
    with signals.heeding_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.heeding_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_is_gone_ends_its_ranks_at_the_next_safe_point():
    Stop(os.getppid()).check()
    with pytest.raises(RunError, match="the launcher that started the ranks is gone; go on with --resume"):
        Stop(os.getpid()).check()


# --- real ranks ----------------------------------------------------------------------------------------------------

ROUNDS = ("--run.checkpoint_every", 100)  # only the signal brings about a checkpoint


def started(folder: Path, ranks: int, fault=None, more=()) -> Job:
    job = Job(train("run", "udec", 10_000, *ROUNDS, *more), ranks, folder, fault)
    wait_for(lambda: logged(folder / "run"), 60, "a round")
    return job


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGHUP)])
def test_ctrl_c_and_a_closed_terminal_commit_the_last_complete_round(tmp_path, ranks, number):
    job = started(tmp_path, ranks)
    for rank in range(ranks):
        job.signal(rank, number)
    assert job.wait(60) and set(job.statuses()) == {128 + number} and not job.left_over
    complete = logged(tmp_path / "run")[-1]["round"]
    assert rounds_there(tmp_path / "run") == [complete]
    assert len(job.errors()) == 1
    assert f"stopped by {signal.Signals(number).name}; round {complete} is committed" in job.errors()[0]


def drop_one(rank: int) -> None:
    injections.fail_client("exception", (1,), 2, rank)


def drop_one_and_stop(last_step: int, rank: int) -> None:
    drop_one(rank)
    injections.stop_in_round(3, last_step, 0, rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "method", "reduction"), [(1, "udec", "fast"), (2, "usplit", "fast"), (4, "full", "ordered")]
)
def test_a_checkpoint_of_a_signal_is_what_a_saved_round_is(tmp_path, ranks, method, reduction):
    """With the mean of the moving averages as they were, though clients have trained on; one was dropped before."""
    flags = ("--optim.ema", 0.9, "--federation.on_client_failure", "drop", "--runtime.reduction", reduction)
    saved = Job(train("saved", method, 2, *flags), ranks, tmp_path, drop_one)
    stopped = Job(train("stopped", method, 9, *flags, *ROUNDS), ranks, tmp_path, partial(drop_one_and_stop, 8 // ranks))
    assert saved.wait(60) and set(saved.statuses()) == {0}, saved.said()
    assert stopped.wait(60) and set(stopped.statuses()) == {128 + signal.SIGTERM}, stopped.said()
    assert rounds_there(tmp_path / "stopped") == [2] and set(logged(tmp_path / "stopped")[1]["dropped"]) == {"1"}
    expected, found = (arrays(tmp_path / run, 2) for run in ("saved", "stopped"))
    assert "global/ema/decoder" in expected and found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert open_checkpoint(tmp_path / "stopped").has_ema


def stop_and_fail_to_average(rank: int) -> None:
    injections.stop_in_round(2, 1, 0, rank)
    if rank == 1:
        host.Host.shared_range = lambda *_: torch.empty(2**60)


@pytest.mark.slow
def test_a_rank_that_cannot_average_when_a_signal_comes_is_heard_on_all(tmp_path):
    job = Job(train("run", "full", 9, "--optim.ema", 0.9, *ROUNDS), 2, tmp_path, stop_and_fail_to_average)
    assert job.wait(30) and job.statuses() == [1, 1], job.said()
    assert len(job.errors()) == 1 and "error: moving average: RuntimeError" in job.errors()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_whole_process_group_leaves_the_loaders_at_work(tmp_path, number):
    """As torchrun and Slurm send it; the loaders' processes must not end before the step does."""
    job = started(tmp_path, 1, partial(injections.hold_in_round, 2, 2.0), LOADING)
    wait_for(lambda: (tmp_path / "held").exists(), 60, "round 2")
    os.killpg(job.pids[0], number)
    assert job.wait(60) and job.statuses() == [128 + number], job.said()
    assert rounds_there(tmp_path / "run") == [1] and not job.left_over


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_step(tmp_path, number):
    job = started(tmp_path, 1, partial(injections.hold_in_round, 2, 600.0))
    wait_for(lambda: (tmp_path / "held").exists(), 60, "round 2")
    job.signal(0, number)
    time.sleep(ECHO_S + 0.2)
    assert job.alive() == [0], "the first one waits for the step"
    began = time.monotonic()
    job.signal(0, number)
    assert job.wait(20) and job.statuses() == [128 + number]
    assert job.ended_s[0] - began < 5 and rounds_there(tmp_path / "run") == []
    assert os.path.exists(tmp_path / "run" / "rounds.jsonl")
