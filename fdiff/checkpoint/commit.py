"""Committing a checkpoint behind the training's back: each rank writes in a thread, rank 0's makes it visible.

No message passes: a file in the temporary folder that has its final name is synced, and rank 0's thread waits for all
of them. What goes wrong in a thread is raised at the next safe point, by `check` or `wait`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdiff.checkpoint.file import read_digest, write_file, write_files
from fdiff.checkpoint.folder import GLOBAL, client_file, make_visible, temporary_folder
from fdiff.errors import RunError

Arrays = Mapping[str, np.ndarray]
POLL_S = 0.01
OPEN_AT_ONCE = 16  # files: of a rank with very many clients a part at a time
NICENESS = 19  # of the threads that write: the training has a core first, if both want it
VISIBLE_S = 120.0  # how long a file system may take to show one node what another has written
GRACE_S = 1.5  # how long a run that fails waits for a commit under way
STOPPING_S = 0.5  # and for one that was told to stop


@dataclass(frozen=True)
class Contents:
    """What a rank contributes to a round's checkpoint: its clients' arrays and, on the rank that leads, `whole`:
    the arrays and the header of global.h5."""

    round: int
    clients: Mapping[int, Arrays]
    whole: tuple[Arrays, Mapping[str, Any]] | None


class Committer:
    """A rank's side of the commits of a run; one commit at a time.

    `attempt` is the same on all ranks and new at each start of the job. `clients` have a file in every checkpoint.
    The rank that `leads` writes global.h5 and makes the checkpoint visible. It waits `visible_s` for files that others
    have written: less than they wait for it.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: str,
        keep: int,
        clients: Sequence[int],
        leads: bool,
        visible_s: float = VISIBLE_S,
    ) -> None:
        self._run_dir, self._attempt, self._keep, self.leads = run_dir, attempt, keep, leads
        self._visible_s = visible_s
        self._files = [client_file(c) for c in clients]
        self._stop, self._all_written = threading.Event(), threading.Event()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="checkpoint", initializer=_give_way)
        self._written: Future[None] | None = None
        self._committed: Future[None] | None = None

    def start(self, contents: Contents, first: Callable[[], object] = lambda: None) -> None:
        """Begin to write a checkpoint: the files of this rank's clients, and on the leading rank global.h5.

        `first` is called, in the leading rank's thread, before the checkpoint becomes visible. The arrays must be left
        as they are until the commit has ended. `wait` first if a commit is under way.
        """
        self._all_written.clear()
        target = temporary_folder(self._run_dir, contents.round, self._attempt)
        self._written = self._threads.submit(_write_clients, target, contents.clients)
        if contents.whole is not None:
            self._committed = self._threads.submit(self._commit, target, contents.round, *contents.whole, first)

    def _commit(
        self, target: Path, round: int, arrays: Arrays, header: Mapping[str, Any], first: Callable[[], object]
    ) -> None:
        def listing_clients() -> dict[str, Any]:
            self._await_files(target, round)
            return {**header, "clients": {f: read_digest(target / f) for f in self._files}}

        target.mkdir(parents=True, exist_ok=True)
        write_file(target / GLOBAL, arrays, listing_clients)
        first()
        make_visible(target, self._run_dir, round, self._keep)

    def _await_files(self, target: Path, round: int) -> None:
        deadline = float("inf")
        while missing := [f for f in self._files if not (target / f).exists()]:
            if self._stop.wait(POLL_S):
                raise RunError(f"the checkpoint of round {round} was given up; {missing[0]} never came")
            if not target.is_dir():
                raise RunError(f"{target} has vanished while it was being written")
            if self._all_written.is_set():
                deadline = min(deadline, time.monotonic() + self._visible_s)
            if time.monotonic() > deadline:
                raise RunError(
                    f"{target / missing[0]} is written but not visible here after {self._visible_s:g} s; run.dir must "
                    "be on a file system that all ranks share"
                )

    def wait(self) -> None:
        """Until this rank's own files are written; raises what prevented it."""
        _raise_from(self._written, block=True)

    def wait_committed(self) -> None:
        """Until the checkpoint is visible, on the leading rank; call it when all ranks are known to have written."""
        self._all_written.set()
        _raise_from(self._committed, block=True)

    def check(self) -> None:
        """Raise what has gone wrong so far, without waiting."""
        _raise_from(self._written, block=False)
        _raise_from(self._committed, block=False)

    def close(self) -> None:
        """Let a commit under way come to its end if it soon does; what is not complete stays invisible.

        A disk that does not answer is not waited for: its thread is left behind, and ends with the process.
        """
        under_way = [f for f in (self._written, self._committed) if f is not None]
        wait(under_way, timeout=GRACE_S)
        self._stop.set()
        late = wait(under_way, timeout=STOPPING_S).not_done
        self._threads.shutdown(wait=not late, cancel_futures=True)


def _write_clients(target: Path, clients: Mapping[int, Arrays]) -> None:
    if not clients:  # nobody waits for this thread: the folder may have become the round's meanwhile
        return
    target.mkdir(parents=True, exist_ok=True)
    files = [(target / client_file(index), (arrays, {"client": index})) for index, arrays in clients.items()]
    for first in range(0, len(files), OPEN_AT_ONCE):
        write_files(dict(files[first : first + OPEN_AT_ONCE]))


def _give_way() -> None:
    """Let the training have the cores first: on Linux this thread and those that it starts alone become nicer."""
    if sys.platform == "linux":
        os.nice(NICENESS)


def _raise_from(future: Future[None] | None, block: bool) -> None:
    if future is None or not (block or future.done()):
        return
    if error := future.exception():
        raise RunError(f"the checkpoint could not be written: {error}") from error
