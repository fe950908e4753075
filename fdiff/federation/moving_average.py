"""The average of the clients' moving averages (`optim.ema`): what is sampled, scored and saved, never trained on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdiff.federation.assemble import RankSetup
from fdiff.federation.compressed import SENT_EMA
from fdiff.federation.voting import Votes
from fdiff.plan import RoundPlan


def average_ema(
    rank: RankSetup, votes: Votes, plan: RoundPlan, averages: Mapping[int, Tensor], planned: bool = True
) -> Tensor:
    """The shared parts (n,) of the clients' moving averages, averaged like the parameters. Every rank calls it.

    `averages` has the whole moving average (P,) of each client of this rank. Under quantize it is an update of the last
    one, but for those that no plan has, which a run without a signal does not send.
    """
    with votes.keeping_errors("moving average"):
        out = torch.empty_like(rank.host.shared)
        averaging = rank.aggregation(plan, out, "ema")
        for client, own in averages.items():
            if client in plan.selected:
                averaging.add(client, rank.host.shared_range(own))
    votes.vote()
    averaging.finish()
    if planned and SENT_EMA in rank.host.federation:
        rank.host.federation[SENT_EMA].copy_(out)
    return out
