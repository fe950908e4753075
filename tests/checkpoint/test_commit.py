"""The end of a committer whose disk does not answer."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
from faults import injections
from faults.processes import Job
from faults.runs import rounds_there, train

from fdiff.checkpoint import commit
from fdiff.checkpoint import file as file_module
from fdiff.checkpoint.commit import GRACE_S, Committer, Contents
from fdiff.errors import RunError

WHOLE = ({"x": np.zeros(3, np.float32)}, {"round": 1})


def test_a_write_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(file_module.Unsynced, "write", lambda *_: released.wait(60))
    committer = Committer(tmp_path, "a", 2, range(1), leads=True)
    committer.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, WHOLE))
    began = time.monotonic()
    committer.close()
    took = time.monotonic() - began
    released.set()
    assert GRACE_S <= took < GRACE_S + 1


def test_a_thread_without_files_that_comes_late_touches_nothing(tmp_path, monkeypatch):
    """Nobody waits for it: the folder that it would have made has become the round's by then."""
    visible, write_clients = threading.Event(), commit._write_clients

    def late(target, clients):
        assert visible.wait(60)
        write_clients(target, clients)

    monkeypatch.setattr(commit, "_write_clients", late)
    committer = Committer(tmp_path, "a", 2, (), leads=True)
    committer.start(Contents(1, {}, WHOLE))
    committer.wait_committed()
    visible.set()
    committer.wait()
    committer.close()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]


def test_a_commit_that_soon_ends_is_waited_for(tmp_path):
    committer = Committer(tmp_path, "a", 2, range(1), leads=True)
    committer.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, WHOLE))
    committer.close()
    assert (tmp_path / "checkpoints" / "round-000001" / "global.h5").exists()


def test_files_that_do_not_become_visible_are_missed_before_the_others_give_up(tmp_path):
    lead = Committer(tmp_path, "a", 2, range(2), leads=True, visible_s=0.2)
    lead.start(Contents(1, {0: {"x": np.zeros(3, np.float32)}}, WHOLE))
    lead.wait()
    with pytest.raises(RunError, match="client-0001.h5 is written but not visible here after 0.2 s"):
        lead.wait_committed()
    lead.close()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_whose_disk_hangs_end_when_a_client_fails(tmp_path, ranks):
    fault = partial(injections.hang_on_disk, 3, 3)
    job = Job(train("run", "udec", 3, "--run.checkpoint_every", 2), ranks, tmp_path, fault)
    began = time.monotonic()
    assert job.wait(60) and set(job.statuses()) == {1}, job.said()
    assert len(job.errors()) == 1 and time.monotonic() - began < 40 and rounds_there(tmp_path / "run") == []
