"""The table of a sweep as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields

from fdiff.sweeps.running import Result

HEADINGS = ("method", "partition", "K", "E", "round", "score", "worst", "N", "saving", "wire MB", "time s")
NUMBERS = HEADINGS[2:]


def as_text(results: Sequence[Result]) -> str:
    """Columns for a terminal; the metric stands above."""
    table = [HEADINGS, *map(_cells, results)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(w) if heading in NUMBERS else cell.ljust(w)
            for cell, w, heading in zip(row, widths, HEADINGS, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([f"score: {_metrics(results)}, lower is better, mean ± deviation over clients", *lines])


def as_csv(results: Sequence[Result]) -> str:
    """A line for each result with every number in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return text.getvalue()


def as_latex(results: Sequence[Result]) -> str:
    r"""A `tabular` with booktabs' rules."""
    columns = "".join("r" if heading in NUMBERS else "l" for heading in HEADINGS)
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in (HEADINGS, *map(_cells, results))]
    comment = f"% score: {_metrics(results)}, lower is better, mean ± deviation over clients"
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([comment, *body, r"\bottomrule", r"\end{tabular}", ""])


def _cells(result: Result) -> tuple[str, ...]:
    deviation = "" if result.deviation is None else f" ± {result.deviation:.2f}"
    return (
        result.method + (" (average)" if result.ema else ""),
        result.partition,
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


def _metrics(results: Sequence[Result]) -> str:
    return ", ".join(sorted({result.metric for result in results})) or "none yet"


def _escape(cell: str) -> str:
    return cell.replace("%", r"\%").replace("±", r"$\pm$").replace("_", r"\_")
