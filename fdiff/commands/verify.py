"""Read every file and dataset of a checkpoint, or of all of a run and its logs, and say what is sound and what is not.

Exit status 1 if anything is damaged; each problem is one line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiff.checkpoint import GLOBAL, generations, inspect, round_of
from fdiff.errors import RunError, UserError, one_line, shown
from fdiff.federation import find_gaps, find_problems, log_problem


def run(checkpoint: Path) -> None:
    """Verify.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then all its checkpoints and its logs.
    """
    try:
        wrong = [line for path in folders(checkpoint) for line in report(path)]
        wrong += [*find_gaps(checkpoint), *filter(None, [log_problem(checkpoint, "scores")])]
    except OSError as error:
        raise RunError(str(one_line(error))) from None
    for line in wrong:
        print(f"damaged  {shown(line)}")
    if wrong:
        raise RunError(f"{checkpoint}: {len(wrong)} problem{'s' * (len(wrong) > 1)}; the rest is sound")


def folders(path: Path) -> list[Path]:
    """The checkpoints that are meant. UserError if there are none."""
    if (path / GLOBAL).exists() or round_of(path) is not None:
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder; give a run or a checkpoint, e.g. RUN/checkpoints/round-000015")
    found = [generation.path for generation in generations(path)]
    if not found:
        raise UserError(f"{path}: has no complete checkpoint; give a run or a checkpoint")
    return found


def report(path: Path) -> list[str]:
    """Print a line for each sound file of a checkpoint; returns the lines of what is wrong."""
    found = inspect(path)
    for name, file in found.items():
        if not file.problems:
            size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in file.datasets.values())
            print(f"sound    {shown(path / name)}: {len(file.datasets)} datasets, {size:,} bytes")
    return find_problems(path, found)
