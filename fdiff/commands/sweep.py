"""Run a grid of configurations, score every run, and print the table: score, N, saving, wire bytes, time.

What is complete is skipped, what was interrupted goes on: call it again. All ranks work on one run after the other.
The file has a preset, fields over it, a grid of values, and how to score; those that ship with fdiff go by their name.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import torch

from fdiff import sweeps
from fdiff.comm import Communicator, exchange_json
from fdiff.config import RuntimeConfig
from fdiff.errors import Interrupted, RunError, UserError
from fdiff.federation import on_rank_0, together, write_atomically
from fdiff.runtime import cache_folder, heeding_signals, launcher

log = logging.getLogger(__name__)


def run(
    file: Path,
    runtime: RuntimeConfig,
    comm: Communicator,
    device: torch.device,
    *,
    out: Path | None = None,
    plan: bool = False,
) -> None:
    """Run a sweep.

    Args:
        file: The YAML file, or the name of one that ships with fdiff, e.g. mini-methods.
        runtime: Where and how it runs.
        out: Folder of the runs and of table.txt, table.csv and table.tex; by default runs/NAME of the file.
        plan: Train nothing: print what each run will take, in images, sampling steps, N and bytes.
    """
    path = together(comm, lambda: sweeps.find(str(file)))
    folder = out or Path("runs") / path.stem
    together(comm, lambda: _check_folder(folder))
    sweep = together(comm, lambda: sweeps.read(path, folder, runtime))
    sweep = sweeps.with_image_shapes(sweep, comm)
    if plan:
        on_rank_0(comm, lambda: print(sweeps.costs_table(sweep), flush=True))
        return
    failed: dict[str, str] = {}
    cache = cache_folder("features")
    with heeding_signals(launcher.started_by()) as stop:
        sweeps.check_before_training(sweep, comm, device, cache)
        for i, cell in enumerate(sweep.cells):
            if comm.rank == 0:
                log.info("[%d/%d] %s", i + 1, len(sweep.cells), cell.name)
            try:
                sweeps.bring_to_end(sweep, cell, comm, device, cache, stop)
            except Interrupted as error:
                raise _interrupted(error) from None
            except (UserError, RunError) as error:
                # Others than this cell are to blame if not all ranks know of it, or if it comes of being told to stop.
                if not error.agreed or any(exchange_json(comm, stop.number is not None)):
                    raise
                failed[cell.name] = str(error)
            on_rank_0(comm, lambda: _write(sweep, folder))
    if comm.rank == 0:
        print((folder / "table.txt").read_text(encoding="utf-8"), end="", flush=True)
    if failed:
        outcome = RunError("; ".join(f"{name}: {text}" for name, text in failed.items()))
        outcome.agreed = True
        raise outcome


def _check_folder(folder: Path) -> None:
    """UserError if what is to be the folder of the sweep is a file, or looks like one of its tables."""
    if folder.suffix in (".txt", ".csv", ".tex") or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--out: {folder} is not valid; name a folder, which gets table.txt, table.csv and table.tex")


def _interrupted(error: Interrupted) -> Interrupted:
    stopped = Interrupted(error.number, "what is complete is kept; call the same sweep again to go on")
    stopped.agreed = error.agreed
    return stopped


def _write(sweep: sweeps.Sweep, folder: Path) -> None:
    """The table of what is complete so far, in three formats."""
    results = []
    for cell in sweep.cells:
        with suppress(UserError):  # which is said when it is that cell's turn
            results += sweeps.result(sweep, cell)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.txt", sweeps.as_text(results) + "\n")
    write_atomically(folder / "table.csv", sweeps.as_csv(results))
    write_atomically(folder / "table.tex", sweeps.as_latex(results))
