"""Signals that ask a job to stop: noted when they come, heeded at the next safe point."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fdiff.errors import Interrupted, RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SET_PDEATHSIG = 1  # of prctl(2)
ECHO_S = 1.0  # Ctrl-C under torchrun arrives twice, from the terminal and from the launcher: that is one request


class Stop:
    """Whether this process was asked to stop, and by which signal; and whether its launcher is still there."""

    def __init__(self, started_by: int | None = None) -> None:
        self.number: int | None = None
        self._asked_at, self._started_by = 0.0, started_by

    def check(self) -> None:
        """Interrupted if it was; RunError if its launcher is gone, of which not every library tells its ranks."""
        if self.number is not None:
            raise Interrupted(self.number)
        if self._started_by not in (None, os.getppid()):
            raise RunError("the launcher that started the ranks is gone; go on with --resume")

    def note(self, number: int, frame: object) -> None:
        """The signal handler: the first request is noted, a second one ends the process at once."""
        if self.number is None:
            self.number, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > ECHO_S:
            os._exit(Interrupted(number).status)


_stops: list[Stop] = []  # the signals of a process are its own, so is what came of them


@contextmanager
def heeding_signals(started_by: int | None = None) -> Iterator[Stop]:
    """Inside the block SIGTERM, SIGUSR2, SIGINT and SIGHUP are noted instead of ending the process.

    Main thread only. A SIGHUP that nohup has the process ignore stays ignored. `started_by` is the process id of the
    launcher, if there is one.
    """
    stop = Stop(started_by)
    _stops.append(stop)
    heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.note) for number in heeded}
    try:
        yield stop
    finally:
        _stops.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_stop() -> None:
    """Interrupted if this process was asked to stop: for waits that are deep inside of something else."""
    for stop in _stops:
        stop.check()


def die_with_parent(parent: int) -> None:
    """In a child: be killed when the thread that started it ends, or at once if its process is gone already."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
