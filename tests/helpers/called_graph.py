"""A stand-in for captured steps where there is no GPU: it warms up, captures nothing, and replays by calling."""

from __future__ import annotations

import pytest

from fdiff.model import capture, diffusion


class Called(capture.Graph):
    """What a graph does: it computes while it warms up, and not while it captures."""

    replays = 0

    def _warm(self, step) -> None:
        for _ in range(capture.WARMUP):
            step()

    def _capture(self, step, noise):
        self._step = step

    def replay(self):
        Called.replays += 1
        return self._step()


def use_called_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured by the stand-in wherever they run, and nothing is compiled."""
    monkeypatch.setattr(capture, "Graph", Called)
    monkeypatch.setattr(diffusion, "Graph", Called)
    monkeypatch.setattr(capture, "captures", lambda device, execution="auto": execution != "eager")
    monkeypatch.setattr(capture, "compiles", lambda device, execution="auto": False)
    monkeypatch.setattr(Called, "replays", 0)
