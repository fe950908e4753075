"""A span of time as a person says it."""

from __future__ import annotations

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """In its two largest units, e.g. `2 h 5 min`; below ten seconds with a decimal, `3.2 s`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    for (name, unit), (small, part) in zip(UNITS, UNITS[1:], strict=False):
        if seconds >= unit:
            many, rest = divmod(round(seconds / part), unit // part)
            return f"{many:,} {name}" + (f" {rest} {small}" if rest else "")
    return f"{round(seconds)} s"
