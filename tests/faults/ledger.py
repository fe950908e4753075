"""What the suite found: a row a fault, the table of all rows, and the file in which the rows of many calls add up."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEAD = ("fault", "injected", "detected", "lost", "silent", "hung", "left over", "worst s")


@dataclass
class Row:
    """One fault. `lost`: committed rounds that were no longer there; `silent`: damage that was loaded, or a resumed
    result that is not bit by bit that of a run never stopped; `hung`: jobs that did not end in time; `left_over`:
    processes that outlived their job."""

    fault: str
    injected: int = 0
    detected: int = 0
    lost: int = 0
    silent: int = 0
    hung: int = 0
    left_over: int = 0
    worst_s: float = 0.0
    control: bool = False
    notes: list[str] = field(default_factory=list)

    def saw(
        self, detected: bool, *, lost: int = 0, silent: int = 0, hung: int = 0, left_over: int = 0, after_s: float = 0.0
    ) -> None:
        """Enter one injection."""
        self.injected += 1
        self.detected += detected
        self.worst_s = max(self.worst_s, after_s)
        self.also(lost=lost, silent=silent, hung=hung, left_over=left_over)

    def also(self, *, lost: int = 0, silent: int = 0, hung: int = 0, left_over: int = 0) -> None:
        """Enter what came of an injection later, e.g. when the run was taken up again."""
        self.lost, self.silent, self.hung = self.lost + lost, self.silent + silent, self.hung + hung
        self.left_over += left_over

    @property
    def passed(self) -> bool:
        """Everything detected and nothing lost; a control has to lose something, or the suite has no teeth."""
        if self.injected == 0 or self.injected != self.detected or self.silent or self.hung or self.left_over:
            return False
        return bool(self.lost) == self.control

    def plus(self, other: Row) -> Row:
        """The two as one: numbers add up, the worst time is the worse one."""
        sums = {f: getattr(self, f) + getattr(other, f) for f in asdict(self) if type(getattr(self, f)) in (int, list)}
        return Row(self.fault, **sums, worst_s=max(self.worst_s, other.worst_s), control=self.control)

    def cells(self) -> list[str]:
        """The row of the table."""
        numbers = (self.injected, self.detected, self.lost, self.silent, self.hung, self.left_over)
        return [self.fault, *map(str, numbers), f"{self.worst_s:.1f}" if self.worst_s else ""]


def table(rows: Iterable[Row]) -> str:
    """The ledger as a Markdown table."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def enter(file: Path, name: str, row: Row, order: Iterable[str]) -> None:
    """Add a row to a ledger: `file` is the table, and beside it are the numbers as JSON; calls may run side by side."""
    numbers = file.with_name(f"{file.name}.json")
    with numbers.open("a+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        rows = {n: Row(**values) for n, values in json.loads(opened.read() or "{}").items()}
        rows[name] = rows[name].plus(row) if name in rows else row
        opened.truncate(0)
        json.dump({n: asdict(r) for n, r in rows.items()}, opened)
        file.write_text(table(rows[n] for n in order if n in rows) + "\n")
