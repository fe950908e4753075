"""Say how the training images are split among the clients."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

import numpy as np

from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.data import split_source
from fdiff.data.partition import label_counts
from fdiff.errors import UserError
from fdiff.federation import open_data
from fdiff.runtime import check_output

PLOTS = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


def run(config: Config, *, json: bool = False, plot: Path | None = None) -> None:
    """Print images and labels by client.

    Args:
        json: Print one JSON object instead of a table.
        plot: Also draw the counts as a heat map into this file: .png, .pdf, .svg, .eps, .jpg, .webp or .tif.
    """
    if plot is not None:
        check_output("--plot", plot, PLOTS)
        _figure()
    counts = counts_of_labels(config)
    sizes = [sum(of_client.values()) for of_client in counts]
    if plot is not None:
        draw(counts, plot)
    if json:
        rows = [
            {"client": k, "size": size, "labels": {str(label): n for label, n in of_client.items()}}
            for k, (size, of_client) in enumerate(zip(sizes, counts, strict=True))
        ]
        print(json_module.dumps({"clients": rows}))
        return
    labels = sorted(set().union(*counts))
    print(f"{'client':>6} {'images':>7}  " + " ".join(f"{label:>6}" for label in labels))
    for k, (size, of_client) in enumerate(zip(sizes, counts, strict=True)):
        print(f"{k:>6} {size:>7}  " + " ".join(f"{of_client.get(label, 0):>6}" for label in labels))


def counts_of_labels(config: Config) -> list[dict[int, int]]:
    """For each client the images it has of each label."""
    data, clients = config.data, config.federation.clients
    opened = open_data(config, SoloCommunicator())
    if data.partition == "private":
        return [label_counts(source.labels, [np.arange(len(source))])[0] for source in opened.sources]
    source = opened.sources[0]
    return label_counts(source.labels, split_source(source, data, clients))


def draw(counts: list[dict[int, int]], path: Path) -> None:
    """The heat map of clients by labels, the counts written into the cells; UserError if it cannot be had."""
    labels = sorted(set().union(*counts))
    table = np.array([[of_client.get(label, 0) for label in labels] for of_client in counts])
    figure = _figure()(figsize=(1.6 + 0.55 * len(labels), 1.4 + 0.38 * len(counts)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues", aspect="auto", vmin=0)
    for (client, column), n in np.ndenumerate(table):
        colour = "white" if n > table.max() / 2 else "black"
        axes.text(column, client, str(n), ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="label", ylabel="client", xticks=range(len(labels)), yticks=range(len(counts)))
    axes.set_xticklabels([str(label) for label in labels])
    figure.colorbar(image, label="images")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format=path.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written ({error.strerror}); give another file") from None


def _figure() -> type[Any]:
    """matplotlib's class of figures; UserError if it is not installed."""
    try:
        from matplotlib.figure import Figure  # slow to import, and only wanted here
    except ImportError as error:
        raise UserError(f"--plot: {error.name} is not installed; pip install 'fdiff[report]'") from None
    return Figure
