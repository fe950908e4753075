"""Make one self-contained HTML page of one or several runs: curves, samples, partition, communication, time."""

from __future__ import annotations

from pathlib import Path

from fdiff.errors import UserError
from fdiff.federation import write_atomically


def run(runs: list[Path], *, out: Path | None = None) -> None:
    """Make a report.

    Args:
        runs: Run folders; several stand side by side.
        out: The HTML file to write; by default report.html in the first run's folder.
    """
    try:
        from fdiff.report import read_run, render  # slow to import, and only wanted here
    except ImportError as error:
        raise UserError(f"fdiff report: {error.name} is not installed; pip install 'fdiff[report]'") from None

    page = render([read_run(folder) for folder in runs])
    target = out or runs[0] / "report.html"
    try:
        write_atomically(target, page)
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}); give another file") from None
    print(target)
