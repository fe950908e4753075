"""A start that is stopped within a round keeps the clients that are done; what nobody can use is left."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import arrays, rows
from ranks import run_ranks

from fdiff import checkpoint, federation
from fdiff import config as cfg
from fdiff.comm import Communicator, SoloCommunicator
from fdiff.errors import Interrupted, RunError
from fdiff.federation import federator
from fdiff.federation.client import Trainer
from fdiff.runtime.signals import Stop

CPU = torch.device("cpu")
CONFIG = cfg.Config(
    federation=cfg.FederationConfig(clients=5, rounds=2, local_epochs=1, fraction=0.8),
    data=cfg.DataConfig(image_side=8, limit=40),
    model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
    optim=cfg.OptimConfig(batch_size=4),
    sample=cfg.SampleConfig(every=0),
    runtime=cfg.RuntimeConfig(threads=1, reduction="ordered"),
    run=cfg.RunConfig(keep_checkpoints=2),
)
STEPS = 2  # of a client in a round


class StopAt(Stop):
    """Told to stop when it is asked for the nth time: once before a round's training, and once after every step."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.note(signal.SIGTERM, None)
        super().check()


def of(run: Path, **changes: object) -> cfg.Config:
    """The configuration in this run folder, with other fields of its groups."""
    config = replace(CONFIG, run=replace(CONFIG.run, dir=str(run)))
    for name, value in changes.items():
        group, _, field = name.partition("__")
        config = replace(config, **{group: replace(getattr(config, group), **{field: value}) if field else value})
    return config


def start(config: cfg.Config, comm: Communicator | None = None, stop: Stop | None = None) -> str:
    """Start a run again; what it says if it was stopped, else "". Its lock goes, as with the end of a process."""
    try:
        federation.run(config, comm or SoloCommunicator(), CPU, resume=True, stop=stop)
    except (Interrupted, RunError) as error:
        return str(error)
    finally:
        federator._leave_locks_to_parent()
    return ""


def steps_taken(config: cfg.Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """The steps of a start that goes on to the end."""
    taken, step = count(), Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *args: (next(taken), step(*args))[1])
        assert start(config) == ""
    return next(taken)


EVERYTHING = {"method": "udec", "optim__ema": 0.9, "federation__keep_optimizer": True, "run__keep_local": True}


COMPRESSED = {
    "method": "usplit", "compression__kind": "quantize", "compression__error_feedback": True, "optim__ema": 0.9,
    "federation__server": "adam", "federation__on_client_failure": "drop",
}  # fmt: skip
DROPPING = {"method": "usplit", "federation__on_client_failure": "drop"}


@pytest.mark.parametrize("changes", [EVERYTHING, DROPPING, COMPRESSED, {}])
@pytest.mark.parametrize("reduction", ["ordered", "fast"])
def test_stopped_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path, changes, reduction):
    """Each start has one client trained, and is stopped within the next."""
    changes = {**changes, "runtime__reduction": reduction}
    assert start(of(tmp_path / "whole", **changes)) == ""
    said = [start(of(tmp_path / "run", **changes), stop=StopAt(STEPS + 2))]
    while said[-1]:
        said.append(start(of(tmp_path / "run", **changes), stop=StopAt(STEPS + 2)))
    assert [re.findall(r"\d+", text.partition(";")[2].partition(";")[0]) for text in said[:-1]] == [
        *(["1", str(kept)] for kept in (1, 2, 3)), ["1"], *(["1", "2", str(kept)] for kept in (1, 2, 3))
    ]  # fmt: skip
    whole, run = (arrays(tmp_path / name, 2) for name in ("whole", "run"))
    assert whole.keys() == run.keys() and all(np.array_equal(whole[name], run[name]) for name in whole)
    for log in ("rounds", "clients"):
        kept = [[row.get("loss") for row in rows(tmp_path / name, log)] for name in ("whole", "run")]
        assert kept[0] == kept[1] and None not in kept[0]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def one_rank_done(comm: Communicator) -> str:
    """Rank 0 is done with both its clients when rank 1 is stopped in its second."""
    stop = StopAt(STEPS + 3) if comm.rank == 1 else Stop()
    said = start(of(Path("run"), method="ulatdec", federation__fraction=1.0), comm, stop)
    assert comm.rank == 0 or said
    return said


def going_on(comm: Communicator) -> str:
    return start(of(Path("run"), method="ulatdec", federation__fraction=1.0), comm)


@pytest.mark.slow
def test_every_rank_keeps_its_own_clients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (said,) = {text for text in run_ranks(one_rank_done, 2, tmp_path) if text}
    assert "clients kept of round 1: 4;" in said
    assert start(of(Path("whole"), method="ulatdec", federation__fraction=1.0)) == ""
    assert run_ranks(going_on, 2, tmp_path) == ["", ""]
    whole, run = (arrays(Path(name), 2) for name in ("whole", "run"))
    assert all(np.array_equal(whole[name], run[name]) for name in whole)


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run of which two clients of round 1 are kept."""
    assert "clients kept of round 1: 2;" in start(of(tmp_path / "run"), stop=StopAt(2 * STEPS + 2))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"sample__every": 1, "runtime__timeout_s": 99.0, "federation__rounds": 1}, 2),  # nothing that they saw
        ({"federation__rounds": 1, "optim__lr": 1e-3}, 4),
        ({"federation__rounds": 1, "method": "usplit"}, 4),
        ({"federation__rounds": 1, "runtime__reduction": "fast"}, 4),
        ({"federation__rounds": 1, "run__keep_local": True}, 4),
    ],
)
def test_they_train_again_if_the_request_is_another(stopped, changes, trained, monkeypatch):
    assert steps_taken(of(stopped, **changes), monkeypatch) == trained * STEPS


def test_they_train_again_if_the_file_is_damaged(stopped, monkeypatch):
    (file,) = stopped.glob("checkpoints/.partial-*/*")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"no longer what it was")
    assert steps_taken(of(stopped, federation__rounds=1), monkeypatch) == 4 * STEPS


def test_nothing_takes_them_for_a_checkpoint(stopped):
    assert checkpoint.generations(stopped) == []
    assert federation.newest_sound(stopped) is None


def test_a_start_that_comes_to_nothing_twice_is_not_to_be_started_again(tmp_path):
    """Another status than that of a signal ends what starts it again; a start that comes to something counts anew."""
    run = tmp_path / "run"
    assert "no round was complete; go on" in start(of(run), stop=StopAt(2))
    expected = "2 starts in a row came to no new round and no client; give the job more time or more ranks"
    assert expected in start(of(run), stop=StopAt(2))
    assert expected in start(of(run), stop=StopAt(2))
    assert "clients kept of round 1: 1; go on" in start(of(run), stop=StopAt(STEPS + 2))
    assert "clients kept of round 1: 1; go on" in start(of(run), stop=StopAt(2))
    shutil.rmtree(run)


def test_a_stop_while_the_grid_is_drawn_gives_up_the_grid(tmp_path):
    """The round is complete without it."""
    changes = {"sample__every": 1, "sample__sampler": "ddim", "sample__steps": 4, "sample__images": 2}
    said = start(of(tmp_path / "run", **changes), stop=StopAt(1 + 4 * STEPS + 2))
    assert "round 1 is committed; go on" in said and not list((tmp_path / "run" / "samples").iterdir())
    assert start(of(tmp_path / "run", **changes)) == ""
    assert [grid.name for grid in (tmp_path / "run" / "samples").iterdir()] == ["round-000002.png"]
