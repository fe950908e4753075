"""The files of all steps as a Markdown table, ready for fdiff/bench/README.md: python -m tests.gpu.table OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS = ("tests", "step", "profile", "run", "others")


def table(out: Path) -> str:
    """A line for each result, then what failed, was skipped or was not reached."""
    found = {step: json.loads(path.read_text()) for step in STEPS if (path := out / f"{step}.json").exists()}
    if not found:
        return "no step left a file"
    any_step = next(iter(found.values()))
    dry = ", dry run: the figures say nothing" if any_step["dry_run"] else ""
    lines = [
        f"{any_step['device']}, torch {any_step['torch']}, Python {any_step['python']}{dry}",
        "",
        "| what | measured | beside | ratio |",
        "|---|---|---|---|",
    ]
    for step in found.values():
        lines += [_row(result) for result in step["results"]]
        lines += [f"| {name} | {value} | | |" for name, value in step.get("table", {}).items()]
    notes = [note for step in found.values() for note in _notes(step)]
    return "\n".join([*lines, "", *notes])


def _row(result: dict[str, Any]) -> str:
    beside, kind = next((result[kind], kind) for kind in ("baseline", "bound") if kind in result)
    unit = f" {result['unit']}" if result["unit"] else ""
    ours = f"{result['median']:.4g} ± {result['spread']:.2g}{unit}"
    return f"| {result['name']} | {ours} | {beside:.4g} ({kind}) | {result['ratio']:.3g} |"


def _notes(step: dict[str, Any]) -> list[str]:
    during = f" during {step['under_way']}" if "under_way" in step else ""
    cut = [] if step["done"] else [f"{step['step']}: cut off{during}, last heard of after {step['seconds']} s"]
    named = [
        f"{step['step']}: {name}: {how}{f' ({why})' if why else ''}"
        for key, how in (("failed", "FAILED"), ("skipped", "skipped"), ("not_reached", "not reached"))
        for name, why in step[key].items()
    ]
    return cut + named


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
