"""What a step has found, in OUT/STEP.json: written anew whenever there is more, so that a kill loses nothing."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from fdiff.bench.measure import Result, processor

NEEDS_GPU = "needs a GPU"


class Record:
    """A step's results, and what ran, was skipped and was not reached, each with the reason."""

    def __init__(self, out: Path, step: str, device: torch.device, dry: bool, limit_s: float) -> None:
        self.out, self.step, self.device, self.dry = out, step, device, dry
        self._began = time.monotonic()
        self.until = self._began + limit_s  # of `time.monotonic`
        self.ran: list[str] = []
        self.skipped: dict[str, str] = {}
        self.not_reached: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.results: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.done = False
        self.save()

    @property
    def left_s(self) -> float:
        """Seconds until the step has to be over."""
        return self.until - time.monotonic()

    def add(self, name: str, results: list[Result] = [], **facts: Any) -> None:  # noqa: B006
        """Note that something ran, with its results and facts."""
        self.ran.append(name)
        self.results += [result.as_json() for result in results]
        self.facts |= facts
        self.save()

    def begin(self, name: str) -> None:
        """Note what is under way, in case it is cut off."""
        self.facts["under_way"] = name
        self.save()

    def skip(self, name: str, why: str = NEEDS_GPU) -> None:
        """Note what this machine can't do."""
        self.skipped[name] = why
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole."""
        path = self.out / f"{self.step}.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def as_json(self) -> dict[str, Any]:
        """The file's object."""
        return {
            "step": self.step,
            "done": self.done,
            "dry_run": self.dry,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - self._began, 1),
            "ran": self.ran,
            "skipped": self.skipped,
            "not_reached": self.not_reached,
            "failed": self.failed,
            "results": self.results,
            **self.facts,
        }

    def finish(self) -> int:
        """The last write, and a line; the exit status."""
        self.done = True
        self.facts.pop("under_way", None)
        self.save()
        counts = {"ran": self.ran, "skipped": self.skipped, "not reached": self.not_reached, "failed": self.failed}
        told = ", ".join(f"{len(what)} {how}" for how, what in counts.items() if what)
        print(f"{self.step}: {told}, {time.monotonic() - self._began:.0f} s", flush=True)
        for name, why in self.failed.items():
            print(f"  {name}: {why}", flush=True)
        return 1 if self.failed else 0
