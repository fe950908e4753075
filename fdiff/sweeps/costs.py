"""What the runs of a sweep will cost, before the first is trained."""

from __future__ import annotations

from collections.abc import Mapping

from fdiff.config import Config
from fdiff.evaluation import images_by_default, models_of, steps_of
from fdiff.federation import count_images, forecast_run, plans
from fdiff.model import parts_of
from fdiff.sweeps.grid import Cell, Sweep

HEADINGS = ("run", "images trained", "denoiser calls", "N", "wire MB")
NOTE = (
    "images trained: forward and backward, all clients and epochs. denoiser calls: images drawn for scores, times "
    "their sampling steps.\nwire MB: with a rank for each client. fdiff bench step and bench sample say how many "
    "images and calls a second this machine does."
)


def costs_table(sweep: Sweep) -> str:
    """A line for each run, one for all, and what the columns mean. UserError where the images cannot be counted."""
    counted: dict[object, Mapping[int, int]] = {}
    rows = []
    for cell in sweep.cells:
        config = cell.config
        what = (config.data, config.federation.clients)
        counted[what] = counted.get(what) or count_images(config)
        rows.append(_costs(sweep, cell, counted[what]))
    total = [sum(column) for column in zip(*rows, strict=True)]
    names = [*(cell.name for cell in sweep.cells), f"all {len(rows)} runs"]
    lines = [HEADINGS, *((name, *map(_short, row)) for name, row in zip(names, [*rows, total], strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]
    return "\n".join([*aligned, "", NOTE])


def _costs(sweep: Sweep, cell: Cell, images: Mapping[int, int]) -> tuple[float, float, float, float]:
    """Images trained, denoiser calls, N, megabytes."""
    config = cell.config
    planned = plans(config, parts_of(config), images)
    trained = config.federation.local_epochs * sum(images[client] for plan in planned for client in plan.selected)
    cost = forecast_run(config, config.federation.clients, images=images)
    calls = _calls(sweep, cell, config)
    return trained, calls, cost["communicated_parameters"], cost["wire_bytes"] / 1e6


def _calls(sweep: Sweep, cell: Cell, config: Config) -> float:
    """Images that are drawn to score the run, times their steps, of the raw models and of moving averages."""
    sampling = sweep.score.sampling(config)
    drawn = sweep.score.images_of(config) or images_by_default(config.data.test_limit or 10_000)
    kinds = 2 if config.optim.ema else 1
    return drawn * len(models_of(config)) * steps_of(sampling) * kinds * len(sweep.rounds(cell))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else f"{value / 1e6:,.1f} M"
