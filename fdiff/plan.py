"""Who reports and who receives which part in a round, and what that costs. Pure: every rank computes the same plan.

A method is a table: part → who reports it. The four of FedDiffuse (arXiv 2406.12575, section 3) are four entries.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from fdiff import registry
from fdiff.config import PARTS
from fdiff.errors import UserError, first_line
from fdiff.seeds import numpy_stream

Reporters = dict[str, tuple[int, ...]]
Placement = tuple[int, ...]  # the rank of each client


class NeedsImages(UserError):
    """A method asks for the clients' numbers of images, which nobody has told it."""


@dataclass(frozen=True)
class Selection:
    """What a method is told of a round: its number, the clients selected, sorted, and the parts of the model, in order.

    Part of a pure function: all that it may depend on is here.
    """

    round: int
    selected: tuple[int, ...]
    parts: tuple[str, ...]
    _images: Mapping[int, int] | None = field(repr=False)
    _stream: np.random.Generator = field(repr=False)

    @property
    def images(self) -> Mapping[int, int]:
        """Training images of each client of the run. NeedsImages where no data have been opened."""
        if self._images is None:
            raise NeedsImages("method: needs the clients' numbers of images, and no data are opened here")
        return self._images

    def stream(self) -> np.random.Generator:
        """The round's random numbers, from their start: the same for each part, and on each rank."""
        return copy.deepcopy(self._stream)


Who = Callable[[Selection], Sequence[int]]
Table = Mapping[str, Who]  # part: who reports it; the part ALL stands for all of the model's
ALL = "*"


def everyone(selection: Selection) -> Sequence[int]:
    """Every selected client."""
    return selection.selected


def _pairs(selection: Selection) -> Reporters:
    """Pairs at random: one client reports the encoder, the other the decoder, one of them also the bottleneck."""
    selected, stream = selection.selected, selection.stream()
    order = [selected[i] for i in stream.permutation(len(selected))]
    reporters: dict[str, list[int]] = {part: [] for part in PARTS}
    for first, second in zip(order[0::2], order[1::2], strict=False):
        reporters["encoder"].append(first)
        reporters["decoder"].append(second)
        reporters["bottleneck"].append((first, second)[stream.integers(2)])
    if len(order) == 1:
        return {part: (order[0],) for part in PARTS}
    if len(order) % 2:  # the odd client out
        reporters["bottleneck"].append(order[-1])
        reporters[("encoder", "decoder")[stream.integers(2)]].append(order[-1])
    return {part: tuple(clients) for part, clients in reporters.items()}


METHODS: dict[str, Table] = {
    "full": {ALL: everyone},
    "usplit": {
        "encoder": lambda selection: _pairs(selection)["encoder"],
        "bottleneck": lambda selection: _pairs(selection)["bottleneck"],
        "decoder": lambda selection: _pairs(selection)["decoder"],
    },
    "ulatdec": {"bottleneck": everyone, "decoder": everyone},
    "udec": {"decoder": everyone},
}


def table_of(method: str, parts: Sequence[str] = PARTS, frozen: Sequence[str] = ()) -> dict[str, Who]:
    """The method's table, in the order of the model's parts: its keys are the shared parts, all others are private.

    `method` is one of METHODS, registered, MODULE:NAME, or parts joined by +. `parts` are those that are trained; what
    is `frozen` is left out. UserError if it is no method, or shares what the model has not, or nothing that is trained.
    """
    if method in METHODS:
        table: Table = METHODS[method]
    elif registry.is_reference(method) or method in registry.names("method"):
        table = registry.find("method", method)
    else:
        table = dict.fromkeys(method.split("+"), everyone)
    if not isinstance(table, Mapping) or not table or not all(map(callable, table.values())):
        raise UserError(f"method: {method} is no table of parts and functions that say who reports them")
    if ALL in table and len(table) > 1:
        raise UserError(f"method: {method} has {ALL!r}, which is all parts, beside others; name each part, or none")
    if ALL in table:
        return dict.fromkeys(parts, table[ALL])
    if unknown := [str(part) for part in table if part not in (*parts, *frozen)]:
        raise UserError(
            f"method: {method} shares a part {unknown[0]!r}, which this model does not have; its parts are "
            f"{', '.join((*parts, *frozen))}: use full, or some of them joined by +"
        )
    if set(table) <= set(frozen):
        raise UserError(
            f"method: {method} shares only {', '.join(table)}, of which model.train has nothing trained; use full, or "
            f"share some of {', '.join(parts)}"
        )
    return {part: table[part] for part in parts if part in table}


def shared_parts(method: str, parts: Sequence[str] = PARTS, frozen: Sequence[str] = ()) -> tuple[str, ...]:
    """The parts that the method shares, in order; arguments and errors as those of `table_of`."""
    return tuple(table_of(method, parts, frozen))


def private_parts(method: str, parts: Sequence[str] = PARTS, frozen: Sequence[str] = ()) -> tuple[str, ...]:
    """The trained parts that never leave a client, in order."""
    shared = shared_parts(method, parts, frozen)
    return tuple(part for part in parts if part not in shared)


def methods_for(parts: Sequence[str]) -> list[str]:
    """The names among METHODS that go with a model of these parts."""
    return [name for name, table in METHODS.items() if set(table) <= {ALL, *parts}]


@dataclass(frozen=True)
class RoundPlan:
    """One round: the clients that train, and for each shared part, in order, the clients that report it.

    Every client, selected or not, receives the average of every shared part.
    """

    round: int
    selected: tuple[int, ...]
    reporters: Reporters

    def without(self, dropped: Collection[int]) -> RoundPlan:
        """The round as it is if these clients fail in it.

        A part all of whose reporters fail is reported by the first client left, which has trained it as well.
        """
        left = tuple(c for c in self.selected if c not in dropped)
        reporters = {
            part: tuple(c for c in those if c not in dropped) or left[:1] for part, those in self.reporters.items()
        }
        return RoundPlan(self.round, left, reporters)

    def segments(self) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Runs of neighbouring parts with the same reporters, which one collective can serve: (parts, reporters)."""
        merged: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        for part, clients in self.reporters.items():
            if merged and merged[-1][1] == clients:
                merged[-1] = ((*merged[-1][0], part), clients)
            else:
                merged.append(((part,), clients))
        return merged


def plan_round(
    method: str,
    clients: int,
    round: int,
    seed: int,
    fraction: float = 1.0,
    parts: Sequence[str] = PARTS,
    images: Mapping[int, int] | None = None,
    frozen: Sequence[str] = (),
) -> RoundPlan:
    """The plan of a round (from 1) for K clients; `images` has the training images of each client, where known.

    `parts` and `frozen` are as in `table_of`. UserError if the method names a client that is not selected, or lets
    nobody report a part that it shares.
    """
    selected, stream = _select(clients, round, seed, fraction)
    selection = Selection(round, selected, tuple(parts), None if images is None else MappingProxyType(images), stream)
    table = table_of(method, parts, frozen)
    return RoundPlan(round, selected, {part: _ask(method, part, who, selection) for part, who in table.items()})


def select_clients(clients: int, round: int, seed: int, fraction: float) -> tuple[int, ...]:
    """The clients of a round, sorted: max(1, C·K), halves rounded up, of K, at random."""
    return _select(clients, round, seed, fraction)[0]


def _select(clients: int, round: int, seed: int, fraction: float) -> tuple[tuple[int, ...], np.random.Generator]:
    stream = numpy_stream(seed, "plan", round=round)
    count = max(1, round_half_up(fraction * clients))
    return tuple(sorted(map(int, stream.permutation(clients)[:count]))), stream


def _ask(method: str, part: str, who: Who, selection: Selection) -> tuple[int, ...]:
    """The clients that report a part, sorted."""
    try:
        reporters = tuple(sorted({_client(client) for client in who(selection)}))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of somebody's function
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"method: {method} fails for the part {part} in round {selection.round} ({reason})") from None
    if not reporters:
        raise UserError(f"method: {method} lets nobody report the part {part} in round {selection.round}")
    if stranger := sorted(set(reporters) - set(selection.selected)):
        raise UserError(
            f"method: {method} has client {stranger[0]} report the part {part} in round {selection.round}, and only "
            f"{', '.join(map(str, selection.selected))} are selected"
        )
    return reporters


def _client(value: object) -> int:
    """A client's number; TypeError for what only looks like one: a mask, or a float."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value} is no client's number")
    return operator.index(value)  # type: ignore[arg-type]


def is_first(clients: int, round: int, seed: int, fraction: float, client: int) -> bool:
    """Whether a client that is selected in this round has not been selected before."""
    return not any(client in select_clients(clients, r, seed, fraction) for r in range(1, round))


def round_half_up(x: float) -> int:
    """Nearest whole number; halves go up (Python's round goes to even)."""
    return int(x + 0.5)


# --- hosting -------------------------------------------------------------------------------------------------------


def hosted_by(rank: int, clients: int, ranks: int) -> range:
    """The clients of a rank: neighbours, at most ⌈K/W⌉, so that rank order is client order."""
    base, extra = divmod(clients, ranks)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))


def host_of(client: int, clients: int, ranks: int) -> int:
    """The rank that hosts a client; inverse of `hosted_by`."""
    base, extra = divmod(clients, ranks)
    in_larger = extra * (base + 1)
    return client // (base + 1) if client < in_larger else extra + (client - in_larger) // base


def neighbours(clients: int, ranks: int) -> Placement:
    """Neighbours on a rank, as `hosted_by` has them."""
    return tuple(host_of(client, clients, ranks) for client in range(clients))


def balanced(images: Mapping[int, int], ranks: int) -> Placement:
    """The largest client first, each on the rank that has the fewest images so far, the lowest one of equals.

    Where that does not shorten a round, in which the ranks wait for the one with the most images: neighbours.
    """
    rank_of, load = dict.fromkeys(sorted(images), 0), [0] * ranks
    for client in sorted(images, key=lambda client: (-images[client], client)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        rank_of[client] = rank
        load[rank] += images[client]
    plain = neighbours(len(images), ranks)
    return tuple(rank_of.values()) if max(load) < max(_loads(images, images, plain)) else plain


def hosted_at(placement: Placement, rank: int) -> list[int]:
    """The clients of a rank, sorted."""
    return [client for client, host in enumerate(placement) if host == rank]


def _loads(clients: Iterable[int], images: Mapping[int, int], placement: Placement) -> list[int]:
    load = [0] * (max(placement) + 1)
    for client in clients:
        load[placement[client]] += images[client]
    return load


def idle_share(selected: Iterable[Sequence[int]], images: Mapping[int, int], placement: Placement) -> float:
    """The share of all ranks' time in which they wait for the slowest, by images, over rounds of these clients."""
    loads = [_loads(clients, images, placement) for clients in selected]
    return 1 - sum(map(sum, loads)) / sum(len(load) * max(load) for load in loads)


def reporting_ranks(reporters: Sequence[int], placement: Placement) -> tuple[int, ...]:
    """The ranks, sorted, that host at least one of the reporters."""
    return tuple(sorted({placement[client] for client in reporters}))


# --- accounting ----------------------------------------------------------------------------------------------------


def communicated_parameters(plan: RoundPlan, sizes: Mapping[str, int], new: int) -> int:
    """The round's share of N, in parameters, as the authors' code counts for a client–server deployment.

    Each selected client downloads the whole model when it is selected for the first time, as `new` of them are, and the
    shared parts later; each reporter uploads what it reports. `sizes` has the parameters of every part.
    """
    shared = sum(sizes[part] for part in plan.reporters)
    download = new * sum(sizes.values()) + (len(plan.selected) - new) * shared
    return download + sum(len(reporters) * sizes[part] for part, reporters in plan.reporters.items())


def new_clients(plan: RoundPlan, clients: int, seed: int, fraction: float) -> int:
    """How many of a round's clients are selected for the first time; other arguments as those of `plan_round`."""
    return sum(is_first(clients, plan.round, seed, fraction, client) for client in plan.selected)


def count_new(plans: Iterable[RoundPlan]) -> list[int]:
    """`new_clients` of the plans of all rounds, from the first one on."""
    seen: set[int] = set()
    counts = []
    for plan in plans:
        counts.append(len(set(plan.selected) - seen))
        seen.update(plan.selected)
    return counts


def wire_bytes(plan: RoundPlan, sizes: Mapping[str, int], placement: Placement, itemsize: int = 4) -> int:
    """Payload bytes that all ranks together send in the round's collectives.

    2(r-1)+m times a part's bytes, for r ranks that report it and m that only receive it.
    """
    total, ranks = 0, max(placement) + 1
    for part, reporters in plan.reporters.items():
        r = len(reporting_ranks(reporters, placement))
        total += (2 * (r - 1) + (ranks - r)) * sizes[part] * itemsize if r else 0
    return total
