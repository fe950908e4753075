"""The weighted mean of the shared parts from compressed updates: what `Aggregation` does, in fewer bytes.

What is compressed is a client's update Δ_k: its shared parts minus what they were when the round began, times
w_k = n_k / Σ n over the clients that report the part. The sum of what arrives is added to where the round began. An
update is kept until all have trained and voted: what is agreed on, e.g. a scale, is of those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fdiff.comm import Communicator
from fdiff.compression import Exchange, Share, average_updates, factor_sizes, first_factors
from fdiff.config import Config
from fdiff.errors import RunError, UserError
from fdiff.federation.server_optimizer import state_of
from fdiff.model import Slot
from fdiff.plan import Placement, RoundPlan

SENT_EMA = "ema-sent"  # the average of moving averages that travelled last
FACTORS = "factors"


class CompressedAggregation:
    """One round's averages, as `Aggregation`, with the same order of calls.

    `start` (n,) is where all clients began. What a report leaves out goes into `left_out(client)` (n,), if the run
    feeds it back. A rank of several clients keeps their updates on the host.
    """

    def __init__(
        self,
        plan: RoundPlan,
        weights: Mapping[int, float],
        start: Tensor,
        out: Tensor,
        slices: Mapping[str, slice],
        placement: Placement,
        exchange: Exchange,
        purpose: str,
        alone: bool,
        left_out: Callable[[int], Tensor] | None,
    ) -> None:
        self._plan, self._weights, self._start, self._out, self._slices = plan, weights, start, out, slices
        self._placement, self._exchange, self._purpose = placement, exchange, purpose
        self._alone, self._left_out = alone, left_out
        self._updates: dict[int, Tensor] = {}

    def add(self, client: int, parameters: Tensor) -> None:
        """Take what a client, fresh from training, has changed; RunError if that is no number."""
        in_place = parameters is self._out  # which is written anew when all have trained
        update = torch.sub(parameters, self._start, out=parameters if in_place else None)
        if not bool(update.sum().isfinite()) and not bool(update.isfinite().all()):  # a sum is quick, and may overflow
            raise RunError("its update is not a finite number; use a smaller optim.lr")
        self._updates[client] = update if self._alone else update.cpu()

    def finish(self, dropped: Collection[int] = ()) -> None:
        """Average all shared parts, the same on every rank; `dropped` are clients of the plan that were not added."""
        plan = self._plan.without(dropped)
        comm = self._exchange.comm
        total = torch.empty_like(self._out)
        shares = [self._share(parts, clients, total, comm) for parts, clients in plan.segments()]
        with comm.ledger.purpose(self._purpose):
            average_updates(self._exchange, shares)
        torch.add(self._start, total, out=self._out)
        self._updates.clear()

    def _share(self, parts: tuple[str, ...], clients: tuple[int, ...], total: Tensor, comm: Communicator) -> Share:
        span = slice(self._slices[parts[0]].start, self._slices[parts[-1]].stop)
        inside = {p: slice(self._slices[p].start - span.start, self._slices[p].stop - span.start) for p in parts}
        whole = sum(self._weights[client] for client in clients)
        weights = {client: self._weights[client] / whole for client in clients}
        hosts = {client: self._placement[client] for client in clients}
        for client in (c for c, rank in hosts.items() if rank == comm.rank):
            mine = self._updates[client][span]
            if self._left_out:
                mine.add_(self._left_out(client)[span].to(mine.device))
            mine.mul_(weights[client])

        def update(client: int) -> Tensor:
            return self._updates[client][span].to(total.device)

        def keep(client: int, sent: Tensor) -> None:
            assert self._left_out is not None
            self._left_out(client)[span].copy_((update(client) - sent) / weights[client])

        return Share(inside, total[span], hosts, comm.rank, update, keep if self._left_out else None)

    def state(self) -> dict[str, Tensor]:
        """What was added so far; see `restore`."""
        return {f"update-{client}": update for client, update in self._updates.items()}

    def restore(self, added: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Go on after these clients were added, from the `state` then, in place of adding them again."""
        on = self._out.device if self._alone else torch.device("cpu")
        self._updates = {client: state[f"update-{client}"].to(on) for client in added}


def compresses(config: Config, purpose: str) -> bool:
    """Whether sums for a purpose of the ledger are compressed: moving averages travel whole but under quantize."""
    return config.compression.kind == "quantize" or (config.compression.kind != "none" and purpose == "parameters")


def kept_by_federation(config: Config, layout: Sequence[Slot], shared: Sequence[str]) -> dict[str, int]:
    """What all ranks keep alike from round to round beside the shared parts: its name and its number of elements.

    UserError if there is nothing to compress.
    """
    slots = [slot for slot in layout if slot.part in shared]
    kind, kept = config.compression.kind, dict.fromkeys(state_of(config.federation), sum(slot.numel for slot in slots))
    if kind == "quantize" and config.optim.ema:
        kept[SENT_EMA] = sum(slot.numel for slot in slots)
    if kind == "low-rank":
        kept[FACTORS] = factor_sizes(slots, config.compression.rank)[1]
        if not kept[FACTORS]:
            raise UserError(
                f"compression.rank: {config.compression.rank} leaves no matrix of {', '.join(shared)} that factors "
                "would make smaller; use a smaller rank, or another compression.kind"
            )
    return kept


def begin_federation(config: Config, layout: Sequence[Slot], shared: Sequence[str], start: Tensor) -> dict[str, Tensor]:
    """The same at the start of a run whose shared parts are `start` (n,), on its device."""
    slots = [slot for slot in layout if slot.part in shared]
    kept = kept_by_federation(config, layout, shared)
    values = {
        **{name: partial(torch.full_like, start, value) for name, value in state_of(config.federation).items()},
        SENT_EMA: lambda: start.clone(),
        FACTORS: lambda: first_factors(slots, config.compression.rank, config.run.seed).to(start.device, start.dtype),
    }
    return {name: values[name]() for name in kept}
