"""The fault suite by itself: `python -m tests.faults [--full] [--only NAME ...] [--seed N] [--ledger FILE]`.

Prints a row a fault: how often it was injected, how often it was detected (the job ended with the right status and
named what happened, or went on as it should), what was lost, what damage was loaded silently, what hung, and what
processes were left over. What a case is follows from its number, and `--seed` is the number of the first: `--count 50`
and then `--count 50 --seed 50` are the two halves of 100, and `--ledger` adds up what all calls find.
`--soak MINUTES` instead lets one run live under a fault every 15 seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "helpers")]

from faults import soak  # noqa: E402
from faults.ledger import enter, table  # noqa: E402
from faults.suite import FAULTS, run  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """Exit status 1 if a row does not pass, or the full suite leaves one out."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the counts of the full suite (an hour or more)")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these faults")
    parser.add_argument("--count", type=int, help="inject each so many times (`resumes`: in threes)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--ledger", type=Path, help="also add the rows to this table, and to FILE.json beside it")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="one run, a fault every 15 seconds")
    asked = parser.parse_args(words)
    if asked.soak:
        return soak.main(asked.soak, asked.seed)
    rows, skipped = [], 0
    for name in asked.only:
        fault = FAULTS[name]
        if reason := fault.needs():
            print(f"{name}: SKIPPED, {reason}", flush=True)
            skipped += 1
            continue
        row, seconds = run(name, asked.count or (fault.full if asked.full else fault.short), asked.seed)
        rows.append(row)
        print(f"{name}: {'passed' if row.passed else 'FAILED'} in {seconds:.0f} s", *row.notes, sep="\n  ", flush=True)
        if asked.ledger:
            enter(asked.ledger, name, row, FAULTS)
    print(table(rows))
    print(f"{len(rows)} faults, {sum(not row.passed for row in rows)} failed, {skipped} skipped")
    return int(not all(row.passed for row in rows) or (asked.full and skipped > 0))


if __name__ == "__main__":
    sys.exit(main())
