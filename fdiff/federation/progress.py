"""How far a piece of work is: a bar where a person watches, in a batch log a line a minute. Both say the time left.

The lines come from a thread, so that one comes also while this rank waits for the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from tqdm import tqdm

from fdiff.federation.duration import duration

log = logging.getLogger(__name__)

EVERY_S = 55.0  # between two lines: of a log that is looked at each minute, each time one is new
LEAST_S = 1.0  # of a piece of work before its first line

Advance = Callable[[float], object]
_last_line = time.monotonic()  # over all pieces of work


@contextmanager
def progress(title: str, total: float, unit: str, shown: bool, bar_format: str | None = None) -> Iterator[Advance]:
    """Inside the block: a function to be told of each piece that is done of `total`. Nothing is said unless `shown`.

    `unit` is what the pieces are called, as in `5 steps`.

    While the pieces are done and the block goes on, others are waited for.
    """
    hidden = None if shown else True  # None: where stderr is no terminal
    with tqdm(total=total, desc=title, unit=f" {unit}", bar_format=bar_format, leave=False, disable=hidden) as bar:
        if not (shown and bar.disable):
            yield bar.update
            return
        with _lines(title, total, unit) as advance:
            yield advance


def told(what: str, unit: str, done: float, total: float, seconds: float) -> str:
    """The line after so many seconds, in which `done` of `total` were done."""
    if done >= total:
        return f"{what}: all {total:,.0f} {unit} done here, other ranks may still be at theirs"
    left = f", {duration(seconds / done * (total - done))} left of them" if done else ""
    return f"{what}: {done:,.0f} of {total:,.0f} {unit}{left}"


class Forecast:
    """The time that the rounds left to a run will take, as long as those since it began on average."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._done = rounds, 0
        self._first, self._began, self._took_s = 0, time.monotonic(), 0.0

    def begin(self, last_round: int) -> None:
        """Measure from now, when this round is complete."""
        self._first, self._began = last_round, time.monotonic()

    @property
    def known(self) -> bool:
        """Whether a round is complete by which to judge."""
        return self._done > 0

    def after(self, round: int) -> str:
        """Note that a round is complete; the time that is left."""
        self._done, self._took_s = round - self._first, time.monotonic() - self._began
        return self.text(round)

    def text(self, round: int) -> str:
        """The time left after a round."""
        return duration(self._seconds(round))

    def end(self, round: int) -> str:
        """When the run will be done, seen from the end of a round."""
        return f"{datetime.now() + timedelta(seconds=self._seconds(round)):%Y-%m-%d %H:%M}"

    def _seconds(self, round: int) -> float:
        return self._took_s / max(1, self._done) * (self._rounds - round)


def line_said() -> None:
    """Another line has just told how far things are: the next one may wait."""
    global _last_line
    _last_line = time.monotonic()


@contextmanager
def _lines(title: str, total: float, unit: str) -> Iterator[Advance]:
    done, began, ended = 0.0, time.monotonic(), threading.Event()

    def advance(pieces: float = 1) -> None:
        nonlocal done
        done += pieces

    def wait_s() -> float:
        now = time.monotonic()
        return max(began + LEAST_S - now, _last_line + EVERY_S - now, 0.0)

    def say() -> None:
        while not ended.wait(wait_s()):
            if wait_s() <= 0:  # nobody else has said a line meanwhile
                log.info("%s", told(title, unit, done, total, time.monotonic() - began))
                line_said()

    thread = threading.Thread(target=say, name="progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
