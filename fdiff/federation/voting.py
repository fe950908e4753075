"""Votes: what fails on one rank between two collectives is kept, and raised on all ranks at the next vote.

So no rank waits for one that has given up. All functions here are called by every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fdiff.comm import Communicator, agree, exchange_json
from fdiff.errors import RunError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")


class Votes:
    """The first error of this rank since the last vote, and `facts` that all ranks ought to have alike, by name."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.error: Exception | None = None
        self.facts: dict[str, Any] = {}

    @contextmanager
    def keeping_errors(self, what: str = "") -> Iterator[None]:
        """Keep the first error inside for the next vote, in one line that says where it came from."""
        try:
            yield
        except Exception as error:
            log.debug("kept until the next vote", exc_info=True)
            line = one_line(error, what)  # of a file that was sound when the training began
            self.error = self.error or (RunError(str(line)) if isinstance(error, OSError) else line)

    def vote(self) -> None:
        """The safe point before payload moves: if any rank has kept an error, all raise it.

        RunError, on all, names the ranks of which a fact is another than rank 0's.
        """
        (error, facts), self.error, self.facts = (self.error, self.facts), None, {}
        agree(self._comm, error, facts)


def together(comm: Communicator, work: Callable[[], T], what: str = "") -> T:
    """Do work on every rank, then vote: if it failed on any, all raise that error, which begins with `what`."""
    try:
        result = work()
    except Exception as error:
        agree(comm, one_line(error, what))
        raise  # not reached: all ranks have agreed on an error
    agree(comm)
    return result


def on_rank_0(comm: Communicator, work: Callable[[], T]) -> T:
    """The result of work that rank 0 does alone, told to every rank as JSON: another rank may see other files.

    If it fails, all raise that error.
    """
    return exchange_json(comm, together(comm, lambda: work() if comm.rank == 0 else None))[0]
