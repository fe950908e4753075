"""Make one self-contained HTML page of one or several runs: curves, samples, partition, communication, time."""

from __future__ import annotations

import logging
from pathlib import Path

from fdiff.errors import UserError, one_line, shown
from fdiff.federation import write_atomically
from fdiff.runtime import check_output

log = logging.getLogger(__name__)

PAGES = (".html", ".htm")


def run(runs: list[Path], *, out: Path | None = None, root: Path | None = None) -> None:
    """Make a report.

    A run whose files are not as fdiff writes them is refused, with one line that says why; the others are shown.

    Args:
        runs: Run folders; several stand side by side.
        out: The HTML file to write; by default report.html in the folder of the first run that is shown.
        root: Folder of the data set, whose test images are shown beside the samples; without it only those that come
            with the system: the embedded ones, and Fashion-MNIST where no run names another folder.
    """
    try:
        from fdiff.report import read_run, render  # slow to import, and only wanted here
    except ImportError as error:
        raise UserError(f"fdiff report: {error.name} is not installed; pip install 'fdiff[report]'") from None

    if out is not None:
        check_output("--out", out, PAGES)
    sound, refused = [], []
    for folder in {folder.resolve(): folder for folder in runs}.values():
        try:
            sound.append(read_run(folder))
        except UserError as error:
            refused.append(error)
    if sound:
        _write(out or sound[0].folder / "report.html", render(sound, root))
    for error in refused[:-1]:
        log.error("fdiff: error: %s", one_line(error))
    if refused:
        raise refused[-1]


def _write(target: Path, page: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, page)
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}); give another file") from None
    print(shown(target), flush=True)
