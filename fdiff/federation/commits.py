"""The commits of a run, on one rank: a complete round is copied to the host, and written while the next one trains.

Every rank calls these functions in the same order; `snapshot` says what a checkpoint holds, `fdiff.checkpoint` how it
is written and becomes visible.
"""

from __future__ import annotations

import torch

from fdiff.checkpoint import Contents
from fdiff.federation import snapshot
from fdiff.federation.assemble import RankSetup
from fdiff.federation.federator import Federator, NoFederator
from fdiff.federation.moving_average import average_ema
from fdiff.federation.record import Round
from fdiff.federation.voting import Votes
from fdiff.plan import RoundPlan


class Commits:
    """What the next checkpoint holds (`prepared`), and whether one is being written."""

    def __init__(self, rank: RankSetup, federator: Federator | NoFederator, votes: Votes) -> None:
        self._rank, self._federator, self._votes = rank, federator, votes
        self.prepared: Contents | None = None
        self._without_ema: RoundPlan | None = None  # the prepared round's plan, if its moving averages lack their mean
        self._writing = False
        self._copies = snapshot.HostCopies()

    def prepare(self, round: Round) -> None:
        """Copy what the checkpoint of a complete round holds; first the one being written has to be done with it."""
        self.finish()
        rank = self._rank
        self._without_ema = round.plan if rank.config.optim.ema and round.ema is None else None
        with self._votes.keeping_errors("checkpoint"):
            logs = self._federator.rows if rank.committer.leads else None
            prints = rank.opened.fingerprints
            self.prepared = snapshot.contents(
                rank.host, rank.images, round.metrics, round.ema, round.images, logs, self._copies, prints
            )

    def start(self) -> None:
        """Begin to write the prepared checkpoint; training may go on."""
        self._writing = True  # on every rank, whatever this one has failed to do: the next vote will tell
        if self.prepared is not None and self._votes.error is None:
            self._rank.committer.start(self.prepared, self._federator.sync)
        self.prepared = None

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is visible."""
        if not self._writing:
            return
        self._writing = False
        with self._votes.keeping_errors():
            self._rank.committer.wait()
        self._votes.vote()
        with self._votes.keeping_errors():
            self._rank.committer.wait_committed()
        self._votes.vote()

    def commit_now(self) -> None:
        """Commit the last complete round, if that has not been done: after a signal, whatever rounds are saved."""
        self.finish()
        self._complete_ema()
        self.start()
        self.finish()

    def _complete_ema(self) -> None:
        """Average the prepared moving averages, if the round did without; from their copies, since clients train on."""
        if not self._without_ema:
            return
        prepared = self.prepared
        assert prepared is not None  # or the vote that stopped the run would have failed it
        own = {client: torch.from_numpy(arrays["ema"]) for client, arrays in prepared.clients.items()}
        ema = average_ema(self._rank, self._votes, self._without_ema, own, planned=False)
        with self._votes.keeping_errors("checkpoint"):
            self.prepared = snapshot.with_ema(prepared, self._rank.host, ema, self._copies)
