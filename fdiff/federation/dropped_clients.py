"""The policy `federation.on_client_failure: drop`: a round goes on without the clients whose training failed in it.

Their ranks live and vote. A client that is dropped keeps its own tensors as they were before the round; what the
others report is weighted as if it had not been selected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fdiff.comm import Communicator, exchange_json
from fdiff.errors import Interrupted, RunError, one_line
from fdiff.federation.client import Client, Report
from fdiff.federation.host import Host
from fdiff.federation.record import Round

log = logging.getLogger(__name__)


def train_or_undo(host: Host, client: Client, round: Round, tick: Callable[[], None]) -> Report | None:
    """Train a client that has entered and is prepared; if that fails, undo it and note why in the round."""
    try:
        with host.undoing(client):
            return host.trainer.train(client, round.plan.round, tick)
    except Interrupted:
        raise
    except Exception as error:  # whatever it was, it was this client's
        log.debug("client %d failed", client.index, exc_info=True)
        round.failures[client.index] = str(one_line(error))
        return None


def agree_on_dropped(comm: Communicator, round: Round) -> dict[int, str]:
    """Every rank's failures, by client, on every rank; the same RunError on all if no selected client is left."""
    plan = round.plan
    dropped = {int(c): why for of_rank in exchange_json(comm, round.failures) for c, why in of_rank.items()}
    for client, why in dropped.items():
        log.warning("round %d goes on without client %d: %s", plan.round, client, why)
    if len(dropped) == len(plan.selected):
        first = min(dropped)
        error = RunError(f"round {plan.round}: every selected client failed; client {first}: {dropped[first]}")
        error.agreed = True
        raise error
    return dropped
