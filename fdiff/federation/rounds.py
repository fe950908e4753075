"""The round loop of FedDiffuse (arXiv 2406.12575, algorithm 1): select, train, average part by part, evaluate, commit.

The only caller of collectives, each of which every rank reaches in the same order. What fails on one rank between
two of them is kept until the next vote, which raises it on all: nobody waits for a rank that has given up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiff.checkpoint import Contents
from fdiff.comm import Communicator, agree, exchange_json
from fdiff.config import Config
from fdiff.errors import Interrupted, RunError, one_line
from fdiff.federation import sampling, snapshot
from fdiff.federation.aggregate import Aggregation
from fdiff.federation.assemble import RankSetup, resume_from, set_up_rank
from fdiff.federation.client import Report
from fdiff.federation.dropped_clients import agree_on_dropped, train, train_or_undo
from fdiff.federation.federator import federator_on
from fdiff.model import PARTS
from fdiff.plan import SHARED_PARTS, RoundPlan, communicated_parameters, host_of, plan_round, wire_bytes
from fdiff.runtime import Stop

log = logging.getLogger(__name__)


def run(
    config: Config, comm: Communicator, device: torch.device, resume: bool = False, stop: Stop | None = None
) -> Path:
    """Train the federation on all ranks of `comm`, each of which calls this; returns the run folder.

    UserError for a bad request, RunError for a failed run, Interrupted where `stop` was asked for, when the last
    complete round is committed: the same on every rank.
    """
    federation = Federation(config, comm, device, stop or Stop())
    try:
        for round in range(federation.start(resume) + 1, config.federation.rounds + 1):
            federation.round(round)
        federation.finish_commit()
    except Interrupted as interruption:
        raise federation.commit_and_stop(interruption) from None
    finally:
        federation.close()
    return config.run_dir


class Federation:
    """A rank's view of the run: its clients in a host, the federator's books (or none), the commit under way."""

    members: RankSetup

    def __init__(self, config: Config, comm: Communicator, device: torch.device, stop: Stop) -> None:
        self.config, self.comm, self.device, self.stop = config, comm, device, stop
        self.federator = federator_on(config, comm.rank)
        self._error: Exception | None = None
        self._last = 0  # the last complete round
        self._uncommitted: Contents | None = None  # what its checkpoint is to hold
        self._not_averaged: RoundPlan | None = None  # its plan, if the moving averages have not been averaged
        self._committing = False
        self._copies = snapshot.Copies()

    # --- the algorithm

    def round(self, round: int) -> None:
        """One communication round."""
        fed, started = self.config.federation, time.perf_counter()
        plan = plan_round(self.config.method, fed.clients, round, self.config.run.seed, fed.fraction)
        average = self._aggregation(plan, self.host.average, "parameters")
        reports, dropped = self.train(plan, average)
        trained = time.perf_counter()
        average.finish(dropped)
        self.host.adopt()
        plan = plan.without(dropped)
        aggregated = time.perf_counter()
        shown, saved = self._shown(round), self.config.saves(round)
        ema = self.average_ema(plan, self.host.averages) if self.config.optim.ema and (shown or saved) else None
        images = self.sample(ema) if shown else None
        evaluated = time.perf_counter()
        seconds = {"train": trained - started, "aggregate": aggregated - trained, "evaluate": evaluated - aggregated}
        metrics = self.record(plan, reports, dropped, seconds, images)
        self._last = round
        self._not_averaged = plan if self.config.optim.ema and ema is None else None
        self.finish_commit()  # its copies are needed again
        with self._keeping_errors("checkpoint"):
            leads = self.committer.leads
            self._uncommitted = snapshot.contents(
                self.host, self.members.images, metrics, ema, images, leads, self._copies
            )
        if saved:
            self.commit()

    def train(self, plan: RoundPlan, average: Aggregation) -> tuple[list[Report], dict[int, str]]:
        """Let the selected ones of this rank's clients train in turn, take what they report, and vote.

        Returns this rank's reports, and of all ranks the clients without which the round goes on, and why.
        """
        selected = [c for c in self.host.clients if c.index in plan.selected]
        reports: list[Report] = []
        failures: dict[int, str] = {}
        with self._keeping_errors():
            self.committer.check()
            self.stop.check()
        with self.federator.bar(plan.round, self.host.trainer.steps(selected)) as bar:

            def tick() -> None:
                bar.update()
                self.stop.check()

            for client in selected:
                if self._error:
                    break
                with self._keeping_errors(f"client {client.index}, round {plan.round}"):
                    parameters = self.host.enter(client)
                    self.host.trainer.prepare(client, plan.round)
                    attempt = train_or_undo if self._drops else train
                    report = attempt(self.host, client, plan.round, tick)
                    if isinstance(report, Report):
                        reports.append(report)
                        self.host.set_aside(client, parameters)
                        average.add(client.index, parameters)
                    else:
                        failures[client.index] = report
        self.vote()
        return reports, agree_on_dropped(self.comm, plan, failures) if self._drops else {}

    def average_ema(self, plan: RoundPlan, averages: Mapping[int, Tensor]) -> Tensor:
        """The shared parts (n,) of the clients' moving averages, averaged like the parameters; only to score and save.

        `averages` has the whole one (P,) of each client of this rank.
        """
        with self._keeping_errors("moving average"):
            out = torch.empty_like(self.host.shared)
            average = self._aggregation(plan, out, "ema")
            for client, own in averages.items():
                if client in plan.selected:
                    average.add(client, self.host.shared_range(own))
        self.vote()
        average.finish()
        return out

    def sample(self, ema: Tensor | None) -> Tensor | None:
        """The grid's images, on rank 0: of the global model, or a row of each client where it keeps private parts."""
        clients, ranks = self.config.federation.clients, self.comm.size
        models: list[int | None] = list(range(clients)) if self._private else [None]
        cut = sampling.batches(
            models, self.config.sample.images, self.config.sample, lambda c: host_of(c, clients, ranks), ranks
        )
        drawn = []
        for batch in (b for b in cut if b.rank == self.comm.rank):
            with self._keeping_errors("sampling"), self.host.using_parameters(self.host.parameters(batch.model, ema)):
                drawn.append(sampling.draw(self.host.trainer, self.config, batch, self._heeding_signals))
        self.vote()
        return sampling.gather_images(self.comm, cut, drawn, sampling.empty_images(self.config, self.device))

    def record(
        self,
        plan: RoundPlan,
        reports: list[Report],
        dropped: dict[int, str],
        seconds: dict[str, float],
        images: Tensor | None,
    ) -> dict[str, Any]:
        """Gather the clients' reports, hold the ledger against the plan, and have the federator write it down."""
        sent = self.comm.ledger.take()
        mine = {"reports": [asdict(r) for r in reports], "sent": sent, "seconds": seconds}
        everyone = exchange_json(self.comm, mine)
        planned = self._check_ledger(plan, [e["sent"] for e in everyone])
        clients = [self._client_row(plan, r, e["seconds"]) for e in everyone for r in e["reports"]]
        count = sum(c["images"] for c in clients)
        metrics = {
            "round": plan.round,
            "loss": sum(c["loss"] * c["images"] for c in clients) / count,
            "images": count,
            "images_per_s": count / seconds["train"],
            "seconds": seconds,
            "selected": sorted((*plan.selected, *dropped)),
            "dropped": {str(client): why for client, why in dropped.items()},
            "reporters": {part: list(r) for part, r in plan.reporters.items()},
            "communicated_parameters": communicated_parameters(plan, self._sizes, self.config.federation.clients),
            "wire_bytes": planned,
            "sent_bytes": {p: round(sum(e["sent"].get(p, 0) for e in everyone)) for p in self.comm.ledger.PURPOSES},
        }
        with self._keeping_errors("run folder"):
            self.federator.record(metrics, clients)
            self.federator.show(plan.round, images, self._private)
        return metrics

    def commit(self) -> None:
        """Start to write the last round's checkpoint, while training goes on."""
        self._committing = True  # on every rank, whatever this one has failed to do: the next vote will tell
        if self._uncommitted is not None and self._error is None:
            self.committer.start(self._uncommitted, self.federator.sync)
        self._uncommitted = None

    def complete_ema(self) -> None:
        """Average the moving averages for the last round's checkpoint if nobody wanted that when it was complete.

        They are taken from its copies: the clients have trained on.
        """
        if not self._not_averaged:
            return
        contents = self._uncommitted
        assert contents is not None  # or the vote that stopped the run would have failed it
        own = {client: torch.from_numpy(arrays["ema"]) for client, arrays in contents.clients.items()}
        ema = self.average_ema(self._not_averaged, own)
        with self._keeping_errors("checkpoint"):
            self._uncommitted = snapshot.with_ema(contents, self.host, ema, self._copies)

    def finish_commit(self) -> None:
        """Wait until the checkpoint under way, if there is one, is visible."""
        if not self._committing:
            return
        self._committing = False
        with self._keeping_errors():
            self.committer.wait()
        self.vote()
        with self._keeping_errors():
            self.committer.wait_committed()
        self.vote()

    # --- start and end

    def start(self, resume: bool) -> int:
        """Open the run folder, bring the clients up, go back to the newest checkpoint; returns the last round done."""
        resume = resume or any(exchange_json(self.comm, self.federator.was_started_again()))
        with self._keeping_errors():
            self.federator.open(resume)
        self.vote()
        self.members = set_up_rank(self.config, self.comm, self.device)
        self.host, self.committer = self.members.host, self.members.committer
        self._sizes = self.host.trainer.buckets.sizes
        self._private = len(SHARED_PARTS[self.config.method]) < len(PARTS)
        last = resume_from(self.members, self.comm) if resume else 0
        with self._keeping_errors("run folder"):
            self.federator.begin(last, self.members.setting)
        self.vote()
        self._last = last
        return last

    def commit_and_stop(self, interruption: Interrupted) -> Interrupted:
        """After the vote that stopped the run: commit the last complete round; returns what is then to be raised."""
        if not hasattr(self, "members"):
            return interruption
        self.finish_commit()
        self.complete_ema()
        self.commit()
        self.finish_commit()
        done = f"round {self._last} is committed" if self._last else "no round was complete"
        stopped = Interrupted(interruption.number, f"{done}; go on with --resume --run.dir {self.config.run_dir}")
        stopped.agreed = True
        return stopped

    def vote(self) -> None:
        """The safe point before payload moves: if any rank has kept an error, all raise it."""
        error, self._error = self._error, None
        agree(self.comm, error)

    def close(self) -> None:
        """Leave nothing running; the last complete checkpoint stands."""
        if hasattr(self, "members"):
            self.committer.close()
        self.federator.close()

    # --- small parts

    @contextmanager
    def _keeping_errors(self, what: str = "") -> Iterator[None]:
        """Keep the first error inside for the next vote, in one line that says where it came from."""
        try:
            yield
        except Exception as error:
            log.debug("kept until the next vote", exc_info=True)
            self._error = self._error or one_line(error, what)

    def _heeding_signals(self, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            self.stop.check()
            yield step

    def _aggregation(self, plan: RoundPlan, out: Tensor, purpose: str) -> Aggregation:
        uniform = self.config.federation.weighting == "uniform"
        weights = {c: 1 if uniform else n for c, n in self.members.images.items()}
        ordered = self.config.runtime.reduction == "ordered"
        clients = self.config.federation.clients
        return Aggregation(plan, weights, out, self.host.slices, clients, self.comm, ordered, purpose, self._drops)

    @property
    def _drops(self) -> bool:
        return self.config.federation.on_client_failure == "drop"

    def _shown(self, round: int) -> bool:
        every = self.config.sample.every
        return every > 0 and (round % every == 0 or round == self.config.federation.rounds)

    def _check_ledger(self, plan: RoundPlan, sent: list[dict[str, float]]) -> int:
        """The bytes that the plan foresees; RunError if the ranks together sent another number."""
        itemsize = self.host.shared.element_size()
        planned = wire_bytes(plan, self._sizes, self.config.federation.clients, self.comm.size, itemsize)
        actual = sum(s.get("parameters", 0) for s in sent)
        if abs(actual - planned) > 0.5:
            error = RunError(f"round {plan.round}: {actual:.0f} bytes of parameters were sent, the plan says {planned}")
            error.agreed = True  # all ranks compare the same numbers
            raise error
        return planned

    def _client_row(self, plan: RoundPlan, report: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        reported = sum(self._sizes[p] for p, clients in plan.reporters.items() if report["client"] in clients)
        return {
            "round": plan.round,
            "client": report["client"],
            "loss": report["losses"][-1],
            "losses": report["losses"],
            "images": report["images"],
            "images_per_s": report["images"] / report["seconds"],
            "seconds": {**seconds, "train": report["seconds"]},
            "parameters_sent": reported,
            "bytes_sent": reported * self.host.shared.element_size(),
        }
