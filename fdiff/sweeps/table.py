"""The table of a sweep as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields

from fdiff.errors import shown
from fdiff.evaluation import described
from fdiff.sweeps.grid import told
from fdiff.sweeps.results import Result

BEFORE = ("method", "partition")
AFTER = ("K", "E", "round", "score", "worst", "N", "saving", "wire MB", "time s")
NUMBERS = AFTER
LATEX = str.maketrans({c: rf"\{c}" for c in "%_&#${}"} | {
    "±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
})  # fmt: skip


def as_text(results: Sequence[Result]) -> str:
    """Columns for a terminal; what the scores are stands above."""
    headings, table = _table(results)
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    lines = [
        "  ".join(
            cell.rjust(w) if heading in NUMBERS else cell.ljust(w)
            for cell, w, heading in zip(row, widths, headings, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([*_said_above(results), *lines])


def as_csv(results: Sequence[Result]) -> str:
    """A line for each result with every number in full."""
    varied = _varied(results)
    names = [name for field in fields(Result) for name in (varied if field.name == "varied" else [field.name])]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) | {field: told(value) for field, value in r.varied.items()} for r in results)
    return text.getvalue()


def as_latex(results: Sequence[Result]) -> str:
    r"""A `tabular` with booktabs' rules."""
    headings, table = _table(results)
    columns = "".join("r" if heading in NUMBERS else "l" for heading in headings)
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in table]
    comments = [f"% {line}" for line in _said_above(results)]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([*comments, *body, r"\bottomrule", r"\end{tabular}", ""])


def _table(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headings, and with them the cells of every line."""
    varied = _varied(results)
    headings = (*BEFORE, *varied, *AFTER)
    return headings, [headings, *(_cells(result, varied) for result in results)]


def _varied(results: Sequence[Result]) -> list[str]:
    """The fields of the grid that have no column of their own."""
    return list(dict.fromkeys(field for result in results for field in result.varied))


def _cells(result: Result, varied: Sequence[str]) -> tuple[str, ...]:
    deviation = "" if result.deviation is None else f" ± {result.deviation:.2f}"
    return (
        result.method + (" (average)" if result.ema else ""),
        result.partition,
        *(shown(told(result.varied.get(field, ""))) for field in varied),
        str(result.clients),
        str(result.local_epochs),
        str(result.round),
        f"{result.score:.2f}{deviation}",
        "" if result.worst is None else f"{result.worst:.2f}",
        f"{result.communicated_parameters:,}",
        f"{result.saving:.1%}",
        f"{result.wire_bytes / 1e6:,.1f}",
        f"{result.seconds:,.1f}",
    )


def _said_above(results: Sequence[Result]) -> list[str]:
    """The metric, and each way in which something in the table was scored."""
    metrics = ", ".join(sorted({result.metric for result in results})) or "none yet"
    ways = dict.fromkeys(described(asdict(result)) for result in results)
    return [f"score: {metrics}, lower is better, mean ± deviation over clients", *map(shown, ways)]


def _escape(cell: str) -> str:
    return cell.translate(LATEX)
