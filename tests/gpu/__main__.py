"""One step: python -m tests.gpu STEP OUT LIMIT_S [--dry-run] [--data FOLDER]."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fdiff.errors import one_line
from fdiff.runtime import allow_tf32
from tests.gpu.record import Record
from tests.gpu.table import STEPS


@dataclass(frozen=True)
class Setting:
    """Where a step runs: tiny and on the CPU if `dry`; `data` is the folder of Fashion-MNIST, if it was given one."""

    device: torch.device
    dry: bool
    data: Path | None


def main() -> int:
    """Run the step; what goes wrong in it is in its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("limit_s", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    device = torch.device("cpu") if given.dry_run else torch.device("cuda", 0)
    allow_tf32(False)  # torch by itself has convolutions in tf32
    record = Record(given.out, given.step, device, given.dry_run, given.limit_s)
    try:
        importlib.import_module(f"tests.gpu.{given.step}_step").run(record, Setting(device, given.dry_run, given.data))
    except Exception as error:
        record.failed[given.step] = str(one_line(error))
        record.save()
        if given.dry_run:
            raise
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
