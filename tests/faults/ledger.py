"""What the suite found: a row a fault, and the table of all rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

HEAD = ("fault", "injected", "detected", "lost", "silent", "hung", "left over", "worst s")


@dataclass
class Row:
    """One fault. `lost`: committed rounds that were no longer there; `silent`: damage that was loaded;
    `hung`: jobs that did not end in time; `left_over`: processes that outlived their job."""

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
        self.lost, self.silent, self.hung = self.lost + lost, self.silent + silent, self.hung + hung
        self.left_over += left_over
        self.worst_s = max(self.worst_s, after_s)

    @property
    def passed(self) -> bool:
        """Everything detected and nothing lost; a control has to lose something, or the suite has no teeth."""
        if self.control:
            return self.lost > 0
        return self.injected == self.detected and not (self.lost or self.silent or self.hung or self.left_over)

    def cells(self) -> list[str]:
        """The row of the table."""
        numbers = (self.injected, self.detected, self.lost, self.silent, self.hung, self.left_over)
        return [self.fault, *map(str, numbers), f"{self.worst_s:.1f}" if self.worst_s else ""]


def table(rows: Iterable[Row]) -> str:
    """The ledger as a Markdown table."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
