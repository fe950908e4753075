"""From the runs of the small sweeps to the tables and the picture of fdiff/sweeps/README.md.

    python tests/tools/sweep_tables.py RUNS             # the folder with clients-small/table.csv and the others
    python tests/tools/sweep_tables.py --references     # scores of real images and of noise, on the same measure

Writes fdiff/sweeps/results.csv, the tables between the README's marks, and launch/pictures/open_questions.png.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from fdiff.config import RuntimeConfig
from fdiff.data import open_source
from fdiff.evaluation.extractors import load_extractor
from fdiff.evaluation.features import ImageFeatures, features_of_source
from fdiff.evaluation.metrics import moments_distance
from fdiff.sweeps import find, read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "fdiff" / "sweeps" / "results.csv"
README = ROOT / "fdiff" / "sweeps" / "README.md"
PICTURE = ROOT / "launch" / "pictures" / "open_questions.png"

FIELDS = (
    "sweep", "seed", "method", "partition", "clients", "epochs", "round", "varied", "score", "deviation", "worst",
    "images", "N", "saving", "bytes", "s",
)  # fmt: skip
COLUMNS = {  # of a sweep's table.csv that are called otherwise there
    "seed": "run.seed", "epochs": "local_epochs", "images": "n", "N": "communicated_parameters", "bytes": "wire_bytes",
    "s": "seconds",
}  # fmt: skip
SWEEPS = {  # the sweep: what it varies beside method and clients
    "clients-small": "",
    "clients-server-small": "federation",
    "bottlenecks-small": "model",
    "compression-small": "compression",
    "compression-methods-small": "compression",
}
MINI = ("mini-methods", "mini-epochs", "mini-baseline")
COUNTS = (5000, 1000, 250, 100)  # images a model, of 1, 5, 20 and 50 models
Row = dict[str, str]


def collect(runs: Path) -> list[Row]:
    """The rows of RESULTS that the tables of these sweeps make."""
    rows = []
    for sweep in (*SWEEPS, *MINI):
        if (table := runs / sweep / "table.csv").exists():
            for line in csv.DictReader(table.open()):
                given = {field: line.get(COLUMNS.get(field, field), "") for field in FIELDS}
                rows.append(given | {"sweep": sweep, "varied": line.get(SWEEPS.get(sweep, ""), "")})
    return rows


def read_results() -> list[Row]:
    """The rows of RESULTS."""
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The README's tables by their marks."""
    made = {sweep: _table(sweep, [row for row in rows if row["sweep"] == sweep]) for sweep in SWEEPS}
    mini = {sweep: [row for row in rows if row["sweep"] == sweep] for sweep in MINI}
    made["mini-methods"] = _crossed(mini["mini-methods"], ("method", "clients"), "partition", ("N", "saving"))
    made["mini-epochs"] = _crossed(mini["mini-epochs"], ("clients",), "epochs")
    made["mini-baseline"] = _crossed(mini["mini-baseline"], ("clients",), "round")
    made["references"] = _crossed([row for row in rows if row["sweep"] == "references"], ("method",), "images")
    made["references"] = made["references"].replace("| method |", "| images |")
    return {name: table for name, table in made.items() if table}


def _table(sweep: str, rows: Sequence[Row]) -> str:
    """A line for each cell with its seeds."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["clients"], row["varied"]), []).append(row)
    field = [f"`{SWEEPS[sweep]}`"] if SWEEPS[sweep] else []
    heading = ["method", "K", *field, "score", "by seed", "images", "N", "wire MB", "minutes"]
    rule = ["---", "---:", *("---" for _ in field), "---:", "---", *["---:"] * 4]
    return _markdown([heading, rule, *(_line(sweep, key, seeds) for key, seeds in cells.items())]) if cells else ""


def _crossed(rows: Sequence[Row], down: Sequence[str], across: str, then: Sequence[str] = ()) -> str:
    """Scores by two things, with columns behind them of what is the same across."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[field] for field in down), {})[row[across]] = row
    heading = [*("K" if field == "clients" else field for field in down), *map(_number, columns), *then]
    table = [heading, ["---"] * len(down) + ["---:"] * (len(columns) + len(then))]
    for key, found in lines.items():
        first = next(iter(found.values()))
        behind = [f"{int(first['N']):,}", f"{float(first['saving']):.1%}"] if then else []
        table.append([*key, *(_score(found[c]) if c in found else "" for c in columns), *behind])
    return _markdown(table) if rows else ""


def _score(row: Row) -> str:
    of_many = f" ± {float(row['deviation']):.1f} ({float(row['worst']):.1f})" if row["deviation"] else ""
    return f"{float(row['score']):.1f}{of_many}"


def _number(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _line(sweep: str, key: tuple[str, str, str], seeds: Sequence[Row]) -> list[str]:
    method, clients, varied = key
    mean, deviation = pooled(seeds)
    spread = f" ± {deviation:.1f}" if seeds[0]["deviation"] else ""
    cells = [f"`{method}`", clients, *([told(varied)] if SWEEPS[sweep] else []), f"{mean:.1f}{spread}"]
    cells += [" / ".join(f"{float(row['score']):.1f}" for row in seeds), _number(seeds[0]["images"])]
    cells += [f"{int(seeds[0]['N']) / 1e6:,.1f} M", f"{_mean(seeds, 'bytes') / 1e6:,.0f}"]
    return [*cells, f"{_mean(seeds, 's') / 60:.1f}"]


def pooled(seeds: Sequence[Row]) -> tuple[float, float]:
    """Mean and deviation over the clients of all seeds."""
    mean = _mean(seeds, "score")
    squares = [float(row["deviation"] or 0) ** 2 + (float(row["score"]) - mean) ** 2 for row in seeds]
    return mean, math.sqrt(sum(squares) / len(squares))


def told(varied: str) -> str:
    """What a cell varies, for a table: `a=1,b=2` as "a 1, b 2"."""
    return varied.replace("=", " ").replace(",", ", ").replace("kind ", "").replace("default", "–")


def _mean(rows: Sequence[Row], field: str) -> float:
    return sum(float(row[field]) for row in rows) / len(rows)


def with_tables(text: str, made: dict[str, str]) -> str:
    """The README's text with these tables between their marks."""
    for name, table in made.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        text = mark.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


# --- what scores mean ------------------------------------------------------------------------------------------------


def references() -> list[Row]:
    """Scores of training images and of noise, as many as the sweeps draw, at 16×16 against the same test images."""
    config = read(find("clients-small"), Path(), RuntimeConfig()).cells[0].config
    cpu, extractor = torch.device("cpu"), load_extractor("fmnist-cnn", None, "cpu")
    test, train = (open_source(config.data, split) for split in ("test", "train"))
    real = features_of_source(extractor, test, cpu, None).statistics().moments
    draw = np.random.default_rng(0)
    kinds = {
        "real, of the training images": lambda n: train.images(np.sort(draw.choice(len(train), n, replace=False))),
        "noise": lambda n: torch.from_numpy(draw.integers(0, 256, (n, *config.data.shape), dtype=np.uint8)),
    }
    return [
        dict.fromkeys(FIELDS, "") | {"sweep": "references", "method": kind, "images": str(n), "score": repr(score)}
        for kind, images in kinds.items()
        for n in COUNTS
        for score in [moments_distance(ImageFeatures.of(extractor, images(n)).statistics().moments, real)]
    ]


# --- the picture -----------------------------------------------------------------------------------------------------


def draw_picture(rows: Sequence[Row], file: Path) -> None:
    """Quality against clients, against N, and against bytes: three charts beside each other."""
    figure, (clients, parameters, sent) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    of_clients = [row for row in rows if row["sweep"] == "clients-small"]
    for method in dict.fromkeys(row["method"] for row in of_clients):
        points = _points([row for row in of_clients if row["method"] == method], "clients")
        clients.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label=method)
    clients.set(xlabel="clients", xscale="log", title="Many clients")
    clients.set_xticks([5, 20, 50], ["5", "20", "50"])
    clients.legend()
    for axis, sweeps, field, title in (
        (parameters, ("bottlenecks-small",), "N", "Bottlenecks, ULATDEC"),
        (sent, ("compression-small", "compression-methods-small"), "bytes", "Compression"),
    ):
        for key in dict.fromkeys((r["sweep"], r["method"], r["varied"]) for r in rows if r["sweep"] in sweeps):
            cell = [row for row in rows if (row["sweep"], row["method"], row["varied"]) == key]
            x, y, spread = _points(cell, field)[0]
            label = told(key[2]).replace("–", "as in the paper" if field == "N" else "none")
            axis.errorbar([x / 1e6], [y], [spread], marker="o", capsize=3, ls="", label=f"{key[1]} {label}".strip())
        axis.set(xlabel="N, million parameters" if field == "N" else "MB on the wire, 2 ranks", title=title)
        axis.legend(fontsize=6)
    sent.set(xscale="log")
    clients.set(ylabel="fd_fmnist (lower is better)")
    figure.savefig(file, dpi=110)


def _points(rows: Sequence[Row], field: str) -> list[tuple[float, float, float]]:
    """(value of the field, mean score, half of the distance between the seeds) of each value, in order."""
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(float(row[field]), []).append(float(row["score"]))
    if field == "bytes":  # those of compressed updates differ a little from seed to seed
        mean = sum(values) / len(values)
        values = {mean: [score for scores in values.values() for score in scores]}
    return [(x, sum(v) / len(v), (max(v) - min(v)) / 2) for x, v in sorted(values.items())]


def main(words: Sequence[str]) -> None:
    """Carry out what the module's text says."""
    known = read_results() if RESULTS.exists() else []
    if words == ["--references"]:
        rows = [row for row in known if row["sweep"] != "references"] + references()
    elif len(words) == 1:
        rows = collect(Path(words[0])) + [row for row in known if row["sweep"] == "references"]
    else:
        sys.exit(__doc__)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    README.write_text(with_tables(README.read_text(), tables(rows)))
    if any(row["sweep"] in SWEEPS for row in rows):
        draw_picture([row for row in rows if row["sweep"] in SWEEPS], PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
