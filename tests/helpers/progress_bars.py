"""Progress bars as a person at a terminal would have them, recorded."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from fdiff.federation import progress


class Terminal(io.StringIO):
    """What is written to it, which believes that a person reads it."""

    def isatty(self) -> bool:
        return True


def recorded(patch: pytest.MonkeyPatch) -> list[tqdm]:
    """The bars that will be made, each on a `terminal` of its own."""
    bars: list[tqdm] = []

    class Recorded(tqdm):
        def __init__(self, **options: object) -> None:
            self.terminal = Terminal()
            super().__init__(**options, file=self.terminal, mininterval=0, miniters=0)
            bars.append(self)

    patch.setattr(progress, "tqdm", Recorded)
    return bars
