"""What a run says of itself: the header before its first round, how far it is, and how long it will take."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from progress_bars import recorded
from run_folders import CONFIG

from fdiff.config import RunConfig
from fdiff.federation import progress
from fdiff.federation.header import END, header_lines
from fdiff.federation.memory import GIB, Memory

SIZES = {"encoder": 1_280_642, "bottleneck": 999_376, "decoder": 716_297}
NOTE = "embedded, 64 training images of 28x28, grey; the model sees 8x8 grey"
MEMORY = Memory(model=int(2 * GIB), shared=0, activations=int(GIB / 2), clients=int(GIB), checkpoint=0)
RANKS = [{"host": f"node-{i // 4}", "device": "H100"} for i in range(8)]
CLIENTS = [{"client": c, "images": n, "labels": {"0": n, "7": 0}} for c, n in enumerate((3_000, 50, 1_200))]


def header(ranks=RANKS, clients=CLIENTS, sizes=SIZES, sent=0, on_gpu=True, last_round=0, rounds=5) -> dict[str, str]:
    """What the lines say, by what they begin with."""
    config = replace(CONFIG, run=RunConfig(dir="runs/x"), federation=replace(CONFIG.federation, rounds=rounds))
    setting = {"communicator": "nccl", "ranks": ranks, "clients": clients}
    by_purpose = {"parameters": sent, "ema": 0}
    lines = header_lines(config, setting, [NOTE], sizes, by_purpose, MEMORY, on_gpu, last_round)
    return dict(line.split(": ", 1) for line in lines)


def test_the_header_says_all_that_is_known_before_the_first_round():
    assert header(sent=2_865_188) == {
        "run": "runs/x, 5 rounds",
        "ranks": "8 (4 × H100 on node-0, 4 × H100 on node-1), communicator nccl",
        "data": NOTE,
        "clients": "3, with 50 images (client 1) to 3,000 images (client 0)",
        "model": "unet, 2,996,315 parameters (encoder 1,280,642, bottleneck 999,376, decoder 716,297)",
        "method": "udec, shares decoder",
        "round": "local epochs 5, on the wire 2.9 MB",
        "memory": "at least 2.50 GiB of a rank's GPU and 1.00 GiB of the host",
        "end": END.removeprefix("end: "),
    }


def test_it_says_where_a_resumed_run_goes_on_and_what_a_cpu_needs():
    assert "end" not in header(last_round=4) and header(rounds=1)["run"] == "runs/x, 1 round"
    said = header(last_round=3, on_gpu=False)
    assert said["run"] == "runs/x goes on with round 4 of 5" and said["round"].endswith("on the wire nothing")
    assert said["memory"] == "at least 3.50 GiB a rank, beside the libraries and the images"


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=200), st.integers(1, 300), st.integers(1, 40))
def test_it_is_as_short_for_many_clients_ranks_and_parts(images, ranks, parts):
    clients = [{"client": c, "images": n} for c, n in enumerate(images)]
    everyone = [{"host": f"node-{i}", "device": "H100"} for i in range(ranks)]
    sizes = {"decoder": 5, **{f"part-{i}": 7 for i in range(parts)}}
    said = header(everyone, clients, sizes)
    assert all(len(line) < 200 for line in said.values())
    assert said["clients"].startswith(f"{len(images)}, ") and f"{max(images):,} images" in said["clients"]
    assert f"{min(images):,} images" in said["clients"] and "class" not in said["clients"]
    assert said["ranks"].startswith(f"{ranks} (") and ("on other nodes" in said["ranks"]) == (ranks > 4)
    assert said["model"].startswith(f"unet, {5 + 7 * parts:,} parameters") and ("part-0" in said["model"]) == (
        parts < 6
    )


# --- how far it is


def test_a_batch_log_has_a_line_each_while_even_where_this_rank_waits(monkeypatch, caplog):
    """Nothing is done while the block goes on: the others are waited for."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    with progress.progress("round 1/3", 4, "steps", shown=True) as advance:
        advance(2)
        time.sleep(0.4)
        advance(2)
        seen = len(caplog.records)
        time.sleep(0.4)
    lines = [record.message for record in caplog.records]
    assert 2 <= seen < len(lines) and lines[1].startswith("round 1/3: 2 of 4 steps, ")
    assert lines[-1] == "round 1/3: all 4 steps done here, other ranks may still be at theirs"
    time.sleep(0.2)
    assert len(caplog.records) == len(lines)  # nothing goes on behind the block


def test_no_line_comes_where_others_have_come_or_another_rank_says_it(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY_S", 0.3)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    progress.line_said()
    with progress.progress("round 1/3", 4, "steps", shown=True):
        for _ in range(10):
            time.sleep(0.1)
            progress.line_said()
    with progress.progress("round 1/3", 4, "steps", shown=False) as advance:
        advance(1)
        time.sleep(0.5)
    assert not caplog.records


def test_a_person_at_a_terminal_has_a_bar_and_no_lines(monkeypatch, caplog):
    bars = recorded(monkeypatch)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.progress("round 1/3 (2 h left)", 4, "steps", shown=True) as advance:
        advance(3)
    (bar,) = bars
    assert bar.n == 3 and "round 1/3 (2 h left)" in bar.terminal.getvalue() and not caplog.records


@pytest.mark.parametrize(
    ("done", "seconds", "said"),
    [(0, 90, "x: 0 of 1,200 steps"), (300, 90, "x: 300 of 1,200 steps, 4 min 30 s left of them")],
)
def test_a_line_says_the_time_left_once_it_can_be_known(done, seconds, said):
    assert progress.told("x", "steps", done, 1200, seconds) == said


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 50), st.floats(0.1, 1e4))
def test_the_time_left_is_that_of_the_mean_round_since_this_start(last, done, left, seconds):
    clock = iter([0.0, 100.0, 100.0 + seconds * done])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.time, "monotonic", lambda: next(clock))
        forecast = progress.Forecast(last + done + left)
        assert not forecast.known
        forecast.begin(last)
        assert forecast.after(last + done) == progress.duration(pytest.approx(seconds * left).expected)
    assert forecast.known and forecast.text(last + done + left) == "0.0 s"
