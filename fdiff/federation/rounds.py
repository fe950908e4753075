"""The round loop of FedDiffuse (arXiv 2406.12575, Algorithm 1): select, train, average part by part, evaluate, commit.

Every rank runs this loop. Every rank reaches each collective in the same order, and votes before it: see `voting`.
"""

from __future__ import annotations

import logging
import signal

import torch

from fdiff import registry
from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config
from fdiff.errors import Interrupted, RunError
from fdiff.federation.assemble import RankSetup, resume_from, set_up_rank
from fdiff.federation.client import Client
from fdiff.federation.commits import Commits
from fdiff.federation.dropped_clients import agree_on_dropped, train_or_undo
from fdiff.federation.federator import federator_on
from fdiff.federation.forecast import averages_ema, idle_note, placement_for
from fdiff.federation.header import header_of
from fdiff.federation.moving_average import average_ema
from fdiff.federation.partial_round import keep_clients, take_up_clients
from fdiff.federation.progress import Advance
from fdiff.federation.record import Round, rows_of
from fdiff.federation.same_code import check_same_code, checksum_of
from fdiff.federation.sampling import draw_grid
from fdiff.federation.voting import Votes, on_rank_0, together
from fdiff.runtime import Stop, launcher

log = logging.getLogger(__name__)

FRUITLESS = 2  # so many starts in a row that came to nothing, and a job is not to be started again


def run(
    config: Config,
    comm: Communicator,
    device: torch.device,
    resume: bool = False,
    stop: Stop | None = None,
    brief: bool = False,
) -> Config:
    """Train the federation on all ranks of `comm`, each of which calls this; returns what was configured or inferred.

    Rank 0 says what it is about to do; `brief`, in one line.

    UserError for a bad request, RunError for a failed run, Interrupted where `stop` was asked for, when the last
    complete round is committed: the same on every rank.
    """
    federation = Federation(config, comm, device, stop or Stop())
    try:
        for number in range(federation.start(resume, brief) + 1, config.federation.rounds + 1):
            federation.round(number)
        federation.commits.finish()
    except Interrupted as interruption:
        raise federation.commit_and_stop(interruption) from None
    finally:
        federation.close()
    return federation.config


class Federation:
    """One rank's view of the run. Call `start` first and `close` last.

    `rank` has this rank's clients, `federator` the logs (on rank 0), `commits` the checkpoint under way; `place` says
    where clients are.
    """

    rank: RankSetup
    commits: Commits
    place = staticmethod(placement_for)

    def __init__(self, config: Config, comm: Communicator, device: torch.device, stop: Stop) -> None:
        self.config, self.comm, self.device, self.stop = config, comm, device, stop
        self.federator = federator_on(config, comm.rank)
        self.votes = Votes(comm)
        self._last = 0  # the last complete round
        self._began_with = 0  # the one before the first round of this start
        self._under_way: Round | None = None

    # --- the algorithm

    def round(self, number: int) -> Round:
        """One communication round: the body of Algorithm 1's loop over rounds."""
        round = self.select(number)
        self.train(round)
        self.average(round)
        self.evaluate(round)
        self.commit(round)
        return round

    def select(self, number: int) -> Round:
        """Every rank computes the same plan, without a message: which clients train, and who reports which part."""
        own = registry.is_code("method", self.config.method)  # which may fail, and on one rank only
        plan = together(self.comm, lambda: self.rank.plan(number)) if own else self.rank.plan(number)
        start = self.rank.start()
        self.votes.facts[f"the plan of round {number}"] = checksum_of(plan)
        self._under_way = Round(plan, self.rank.aggregation(plan, self.rank.host.average, "parameters", start), start)
        return self._under_way

    def train(self, round: Round) -> None:
        """Every rank trains the selected ones of its clients in turn, E epochs each, and takes what they report.

        Those that a start before has kept of this round are done. Then all vote, and agree on the clients without which
        the round goes on.
        """
        host, plan = self.rank.host, round.plan
        with round.timed("train"):
            with self.votes.keeping_errors():
                self.rank.committer.check()
                self.stop.check()
                if plan.round == self._began_with + 1:
                    take_up_clients(round, self.rank)
            waiting = [client for client in host.clients if client.index in plan.selected and not round.is_done(client)]
            with self.federator.bar(plan.round, host.trainer.steps(waiting)) as advance:
                for client in waiting:
                    if not self.votes.error:
                        self._train_client(client, round, advance)
                self.votes.vote()
            round.dropped = agree_on_dropped(self.comm, round) if self.rank.drops else {}

    def average(self, round: Round) -> None:
        """Every rank: each shared part becomes Σ n_k θ_k / Σ n_k over the clients that report it, on all ranks.

        Where the federator has an optimizer, every rank takes its step from where the round began to there.
        """
        with round.timed("aggregate"):
            round.averaging.finish(round.dropped)
            self.rank.step_server(round.start)
            self.rank.host.adopt_average()
            self.votes.facts["the shared parts"] = self.rank.checksum_of_repeated()
        round.plan = round.plan.without(round.dropped)

    def evaluate(self, round: Round) -> None:
        """Every rank draws its share of the sample grid, if the round has one; rank 0 writes the logs and the grid."""
        number, host = round.plan.round, self.rank.host
        shown = self.config.samples(number)
        with round.timed("evaluate"):
            if averages_ema(self.config, number):
                round.ema = average_ema(self.rank, self.votes, round.plan, host.moving_averages)
            if shown:
                round.images = self._draw_grid(round)
        round.metrics, clients = rows_of(round, self.rank)
        self._under_way = None
        with self.votes.keeping_errors("run folder"):
            self.federator.record(round.metrics, clients)
            self.federator.show(number, round.images, self.rank.keeps_private_parts)
        self._last = number

    def commit(self, round: Round) -> None:
        """Every rank copies its state and, in rounds that are saved, writes its clients' files while training goes on.

        Rank 0 writes the global file as well, and makes the checkpoint visible.
        """
        self.commits.prepare(round)
        if self.config.saves(round.plan.round):
            self.commits.start()

    # --- one client

    def _train_client(self, client: Client, round: Round, advance: Advance) -> None:
        """Train one client from the shared parts as they are; what it reports is added to the averages."""
        host, number = self.rank.host, round.plan.round

        def tick() -> None:
            advance(1)
            self.stop.check()

        with self.votes.keeping_errors(f"client {client.index}, round {number}"):
            parameters = host.enter(client)
            host.trainer.prepare(client, number)
            if self.rank.drops:
                report = train_or_undo(host, client, round, tick)
            else:
                report = host.trainer.train(client, number, tick)
            if report:
                round.reports.append(report)
                host.set_aside(client, parameters)
                round.averaging.add(client.index, parameters)

    # --- start and end

    def start(self, resume: bool, brief: bool = False) -> int:
        """Open the run folder, bring the clients up, go back to the newest checkpoint; returns the last round done."""
        restarted = any(exchange_json(self.comm, launcher.restarts() > 0))  # not every agent of torchrun counts all
        job = launcher.job_name(self.comm.outlives) if restarted else None
        resume = resume or any(exchange_json(self.comm, self.federator.made_by(job)))
        together(self.comm, lambda: self.federator.open(resume))
        self.rank = set_up_rank(self.config, self.comm, self.device, self.place, resume)
        self.config = self.federator.config = self.rank.config
        self.commits = Commits(self.rank, self.federator, self.votes)
        self._last, logs = resume_from(self.rank) if resume else (0, None)
        self._began_with = self._last
        check_same_code(self.rank, self._last)
        together(self.comm, lambda: self.federator.begin(self._last, self.rank.setting, logs), "run folder")
        header = on_rank_0(self.comm, lambda: header_of(self.rank, self._last))
        self.federator.announce(header[:1] if brief else header, self._last)
        if idle := idle_note(self.config, self.rank.placement, self.rank.images):
            log.info(idle)
        return self._last

    def commit_and_stop(self, interruption: Interrupted) -> RunError:
        """After the vote that stopped the run: commit the last complete round, keep the clients done with the next one.

        Returns what is then to be raised: another error where this start and the one before came to neither.
        """
        if not hasattr(self, "commits"):
            return interruption
        self.commits.commit_now()
        kept, more = keep_clients(self._under_way, self.rank, self.votes)
        done = f"round {self._last} is committed" if self._last else "no round was complete"
        done += f", clients kept of round {self._last + 1}: {kept}" if kept else ""
        fruitful = self._last > self._began_with or more > 0
        fruitless = on_rank_0(self.comm, lambda: self.federator.count_start(fruitful))
        go_on = f"go on with --resume --run.dir {self.config.run_dir}"
        if fruitless < FRUITLESS or interruption.number == signal.SIGINT:
            stopped: RunError = Interrupted(interruption.number, f"{done}; {go_on}")
        else:  # another status, so that nobody starts the job again
            remedy = "give the job more time or more ranks, or fewer federation.local_epochs"
            stopped = RunError(f"{FRUITLESS} starts in a row came to no new round and no client; {remedy}, and {go_on}")
        stopped.agreed = True
        return stopped

    def close(self) -> None:
        """Leave nothing running; the last complete checkpoint stands."""
        if hasattr(self, "rank"):
            self.rank.committer.close()
        self.federator.close()

    def _draw_grid(self, round: Round) -> torch.Tensor | None:
        """This rank's share of the grid. A stop gives up the grid and not the round, which is complete without it."""
        try:
            return draw_grid(self.rank, self.votes, round.plan.round, round.ema, self.stop.check)
        except Interrupted:
            log.warning("round %d: told to stop, so there is no sample grid", round.plan.round)
            return None
