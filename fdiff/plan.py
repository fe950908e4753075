"""Who reports and who receives which part in a round, and what that costs. Pure: every rank computes the same plan.

The four methods of FedDiffuse (arXiv 2406.12575, section 3) differ in this file and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fdiff.model import PARTS
from fdiff.seeds import numpy_stream

Reporters = dict[str, tuple[int, ...]]

# The shared parts are always the last ones of PARTS, so that in memory they are one contiguous range.
SHARED_PARTS: dict[str, tuple[str, ...]] = {
    "full": PARTS,
    "usplit": PARTS,
    "ulatdec": ("bottleneck", "decoder"),
    "udec": ("decoder",),
}


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


def plan_round(method: str, clients: int, round: int, seed: int, fraction: float = 1.0) -> RoundPlan:
    """The plan of a round (from 1) for K clients, of which max(1, C·K), halves rounded up, are selected at random."""
    stream = numpy_stream(seed, "plan", round=round)
    count = max(1, round_half_up(fraction * clients))
    selected = tuple(sorted(map(int, stream.permutation(clients)[:count])))
    if method == "usplit":
        return RoundPlan(round, selected, _usplit(selected, stream))
    return RoundPlan(round, selected, {part: selected for part in SHARED_PARTS[method]})


def is_first(method: str, clients: int, round: int, seed: int, fraction: float, client: int) -> bool:
    """Whether a client that is selected in this round has not been selected before."""
    earlier = (plan_round(method, clients, r, seed, fraction).selected for r in range(1, round))
    return not any(client in selected for selected in earlier)


def round_half_up(x: float) -> int:
    """Nearest whole number; halves go up (Python's round goes to even)."""
    return int(x + 0.5)


def _usplit(selected: Sequence[int], stream: np.random.Generator) -> Reporters:
    """Pairs at random: one client reports the encoder, the other the decoder, one of them also the bottleneck."""
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
    return {part: tuple(sorted(clients)) for part, clients in reporters.items()}


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


def reporting_ranks(reporters: Sequence[int], clients: int, ranks: int) -> tuple[int, ...]:
    """The ranks, sorted, that host at least one of the reporters."""
    return tuple(sorted({host_of(c, clients, ranks) for c in reporters}))


# --- accounting ----------------------------------------------------------------------------------------------------


def communicated_parameters(plan: RoundPlan, sizes: Mapping[str, int], new: int) -> int:
    """The round's share of N, in parameters, as the authors' code counts for a client–server deployment.

    Each selected client downloads the whole model when it is selected for the first time, as `new` of them are, and the
    shared parts later; each reporter uploads what it reports. `sizes` has the parameters of every part.
    """
    shared = sum(sizes[part] for part in plan.reporters)
    download = new * sum(sizes.values()) + (len(plan.selected) - new) * shared
    return download + sum(len(reporters) * sizes[part] for part, reporters in plan.reporters.items())


def new_clients(plan: RoundPlan, method: str, clients: int, seed: int, fraction: float) -> int:
    """How many of a round's clients are selected for the first time; other arguments as those of `plan_round`."""
    return sum(is_first(method, clients, plan.round, seed, fraction, client) for client in plan.selected)


def count_new(plans: Iterable[RoundPlan]) -> list[int]:
    """`new_clients` of the plans of all rounds, from the first one on."""
    seen: set[int] = set()
    counts = []
    for plan in plans:
        counts.append(len(set(plan.selected) - seen))
        seen.update(plan.selected)
    return counts


def wire_bytes(plan: RoundPlan, sizes: Mapping[str, int], clients: int, ranks: int, itemsize: int = 4) -> int:
    """Payload bytes that all ranks together send in the round's collectives.

    2(r-1)+m times a part's bytes, for r ranks that report it and m that only receive it.
    """
    total = 0
    for part, reporters in plan.reporters.items():
        r = len(reporting_ranks(reporters, clients, ranks))
        total += (2 * (r - 1) + (ranks - r)) * sizes[part] * itemsize if r else 0
    return total
