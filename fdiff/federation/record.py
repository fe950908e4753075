"""A round under way, and what it leaves in the logs: its row, a row of each client, bytes held against the plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from fdiff.comm import exchange_json
from fdiff.errors import RunError
from fdiff.federation.aggregate import Aggregation
from fdiff.federation.assemble import RankSetup
from fdiff.federation.client import Client, Report
from fdiff.federation.compressed import CompressedAggregation
from fdiff.federation.forecast import bytes_by_purpose, communicated
from fdiff.plan import RoundPlan, new_clients, round_half_up
from fdiff.runtime import peak_memory

Row = dict[str, Any]


@dataclass
class Round:
    """A round under way, as one rank sees it; each step of the round loop adds what it finds.

    `plan` is what happens: after clients were dropped, without them. `start` (n,) are the shared parts when it began,
    where a step follows that needs them. `reports` and `failures` (why training failed, by client) are of this rank's
    clients, the first `taken_up` reports of an earlier start; `dropped` are the failures of all ranks. `ema` (n,) is
    the average of the moving averages of the shared parts, `images` (m, C, S, S) the grid on rank 0; both None
    in rounds without them. `metrics` is the round's row of the log. `began` is when.
    """

    plan: RoundPlan
    averaging: Aggregation | CompressedAggregation
    start: Tensor | None = None
    reports: list[Report] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    taken_up: int = 0
    ema: Tensor | None = None
    images: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: Row = field(default_factory=dict)
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def is_done(self, client: Client) -> bool:
        """Whether a client of this rank has trained, or has failed to."""
        return client.index in self.failures or any(report.client == client.index for report in self.reports)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to the seconds of a step."""
        began = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began


def rows_of(round: Round, rank: RankSetup) -> tuple[Row, list[Row]]:
    """The row of the round and the rows of all its clients. Every rank calls it and gets the same ones.

    RunError, the same on every rank, if the ranks together sent another number of bytes than the plan says.
    """
    comm, plan = rank.comm, round.plan
    mine = {"reports": [asdict(r) for r in round.reports], "sent": comm.ledger.take(), "seconds": round.seconds}
    mine |= {"began": round.began, "peak_memory": peak_memory(rank.host.trainer.device)}
    everyone = exchange_json(comm, mine)
    config, fed = rank.config, rank.config.federation
    new = new_clients(plan, fed.clients, config.run.seed, fed.fraction)
    sent = {purpose: _total(everyone, purpose) for purpose in comm.ledger.PURPOSES}
    _check_sent(round, sent, rank)
    rows = [_client_row(plan, report, each["seconds"], rank) for each in everyone for report in each["reports"]]
    rows.sort(key=lambda row: row["client"])
    count = sum(row["images"] for row in rows)
    metrics = {
        "round": plan.round,
        "loss": sum(row["loss"] * row["images"] for row in rows) / count,
        "images": count,
        "images_per_s": count / round.seconds["train"],
        "seconds": round.seconds,
        "selected": sorted((*plan.selected, *round.dropped)),
        "dropped": {str(client): why for client, why in round.dropped.items()},
        "reporters": {part: list(reporters) for part, reporters in plan.reporters.items()},
        "communicated_parameters": communicated(plan, rank.payload, new),
        "wire_bytes": sum(sent.values()),
        "bytes_by_purpose": sent,
        "began": everyone[0]["began"],
        "ranks": comm.size,
        "peak_memory": max(each["peak_memory"] for each in everyone),
    }
    return metrics, rows


def _total(everyone: list[Row], purpose: str) -> int:
    """Bytes that all ranks together sent for a purpose."""
    return round_half_up(sum(each["sent"].get(purpose, 0) for each in everyone))


def _check_sent(round: Round, sent: dict[str, int], rank: RankSetup) -> None:
    """RunError if the ranks together sent other numbers of bytes of parameters and moving averages than planned."""
    planned = bytes_by_purpose(round.plan, rank.config, rank.payload, rank.placement)
    for purpose in ("parameters", "ema"):  # a stop gives up the pictures
        if abs(sent[purpose] - planned[purpose]) > 0.5:
            error = RunError(
                f"round {round.plan.round}: {sent[purpose]} bytes of {purpose} were sent, the plan says "
                f"{planned[purpose]}"
            )
            error.agreed = True  # all ranks compare the same numbers
            raise error


def _client_row(plan: RoundPlan, report: Row, seconds: dict[str, float], rank: RankSetup) -> Row:
    payload, mine = rank.payload, {p: len(those) for p, those in plan.reporters.items() if report["client"] in those}
    sent = sum(payload.of_one(part, reporters) for part, reporters in mine.items())
    return {
        "round": plan.round,
        "client": report["client"],
        "loss": report["losses"][-1],
        "losses": report["losses"],
        "images": report["images"],
        "images_per_s": report["images"] / report["seconds"],
        "seconds": {**seconds, "train": report["seconds"]},
        "parameters_sent": sum(rank.sizes[part] for part in mine),
        "bytes_sent": sent,
    }
