"""Signals that ask a job to stop: noted when they come, heeded at the next safe point."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fdiff.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
ECHO_S = 1.0  # Ctrl-C under torchrun arrives twice, from the terminal and from the launcher: that is one request


class Stop:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._asked_at = 0.0

    def check(self) -> None:
        """Interrupted if it was."""
        if self.number is not None:
            raise Interrupted(self.number)

    def note(self, number: int, frame: object) -> None:
        """The signal handler: the first request is noted, a second one ends the process at once."""
        if self.number is None:
            self.number, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > ECHO_S:
            os._exit(Interrupted(number).status)


@contextmanager
def heeding_signals() -> Iterator[Stop]:
    """Inside the block SIGTERM, SIGUSR2 and SIGINT are noted instead of ending the process. Main thread only."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
