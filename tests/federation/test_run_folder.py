"""What the federator writes stays in the run folder, whatever links are there; locks where there are none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from fdiff import config as cfg
from fdiff import federation
from fdiff.comm import SoloCommunicator
from fdiff.data.pictures import save_grid
from fdiff.errors import UserError
from fdiff.federation import federator
from fdiff.federation.federator import Federator
from fdiff.federation.logs import append_jsonl, write_atomically


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file outside of the run folder."""
    file = tmp_path / "precious"
    file.write_text("{}")  # so that it may be taken for a log without lines
    return file


def federator_of(run: Path) -> Federator:
    return Federator(cfg.Config(run=cfg.RunConfig(dir=str(run))))


def row(round: int) -> dict:
    metrics = {"loss": 1.0, "images_per_s": 1.0, "wire_bytes": 1, "communicated_parameters": 1, "seconds": {}}
    return {"round": round, **metrics}


@pytest.mark.parametrize("name", [".config.yaml", "config.yaml", "setting.json", "rounds.jsonl", "clients.jsonl"])
def test_a_link_in_a_run_folder_is_not_followed(tmp_path, precious, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    kept = federator_of(run)
    kept.open(resume=True)
    kept.begin(0, {}, None)
    kept.record(row(1), [])
    kept.sync()
    kept.close()
    assert precious.read_text() == "{}" and (run / "rounds.jsonl").read_text().count("\n") == 1
    assert all(not f.is_symlink() for f in run.iterdir() if f.name != ".config.yaml")


def test_only_a_run_is_resumed_and_a_new_start_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    federator_of(tmp_path / "new").open(resume=True)
    assert [r.message for r in caplog.records] == [
        f"run.dir: '{tmp_path / 'new'}' has no checkpoint to resume from: this is a new start"
    ]
    (tmp_path / "run" / "checkpoints" / "round-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a run's folder .* nothing to resume; name a run's folder"):
        federator_of(tmp_path / "run" / "checkpoints").open(resume=True)
    federator_of(tmp_path / "run").open(resume=True)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("damage", [b"", b'{"job": "slurm 7"', b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_a_damaged_setting_is_no_leave_to_go_on_in_a_folder(tmp_path, monkeypatch, damage):
    """What torchrun or Slurm starts again goes on only where it is sure to have been before."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config = cfg.Config(run=cfg.RunConfig(dir=str(tmp_path)))
    (tmp_path / "setting.json").write_text('{"job": "slurm 7"}')
    assert Federator(config).made_by("slurm 7") and not Federator(config).made_by("slurm 8")
    (tmp_path / "setting.json").write_bytes(damage)
    assert not Federator(config).made_by("slurm 7")
    with pytest.raises(UserError, match="exists already; choose another, or pass --resume"):
        federation.run(config, SoloCommunicator(), torch.device("cpu"))
    assert (tmp_path / "setting.json").read_bytes() == damage


def test_a_log_that_becomes_a_link_is_not_appended_to(tmp_path, precious):
    (tmp_path / "rounds.jsonl").symlink_to(precious)
    with pytest.raises(OSError) as raised:
        append_jsonl(tmp_path / "rounds.jsonl", [{"round": 1}])
    assert raised.value.errno == errno.ELOOP and precious.read_text() == "{}"


def test_a_lock_that_is_a_link_is_not_made_elsewhere(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match="cannot be written"):
        federator_of(tmp_path / "run").open(resume=True)
    assert not (tmp_path / "new").exists()


def test_a_grid_is_not_written_through_a_link(tmp_path, precious):
    (tmp_path / ".grid.png").symlink_to(precious)
    (tmp_path / "grid.png").symlink_to(precious)
    save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1)
    assert precious.read_text() == "{}" and (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_replaced_whole_and_its_name_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_IFMT(os.fstat(fd).st_mode)))
    (tmp_path / "file").write_text("old")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and synced == [stat.S_IFREG, stat.S_IFDIR]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", "newer")
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING):
        federator_of(tmp_path / "run").open(resume=False)
    assert len(caplog.messages) == 1 and "cannot be locked" in caplog.text and os.strerror(number) in caplog.text


def test_a_lock_that_fails_otherwise_is_a_reason_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(UserError, match="cannot be written"):
        federator_of(tmp_path / "run").open(resume=False)
    assert federator.NO_LOCKS
