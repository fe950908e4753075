"""Ranks that train together run the same code: the same plan, the same model, the same weights to begin with.

Methods and models may be the user's own, in a file that differs from node to node, or draw from a generator of theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fdiff import checkpoint
from fdiff.comm import exchange_json
from fdiff.config import KINDS
from fdiff.errors import UserError
from fdiff.federation.assemble import RankSetup
from fdiff.federation.voting import together

ROUNDS = 3  # whose plans are compared
SAMPLE = 64  # initial weights that are compared
TOLERANCE = 1e-4  # of theirs: unlike processors draw normal numbers with unlike last bits


def check_same_code(rank: RankSetup, last: int) -> None:
    """UserError on every rank if they plan or hold different things; after round `last`, if it isn't 0, weights may be.

    Every rank calls it.
    """
    buckets, to_come = rank.host.trainer.buckets, range(last + 1, min(last + ROUNDS, rank.config.federation.rounds) + 1)
    own = rank.config.model.kind not in KINDS  # fdiff's own constants may differ in last bits on unlike processors
    constants = [checkpoint.checksum(tensor.cpu().numpy()) for tensor in buckets.model.buffers()] if own else []
    layouts = buckets.layout, buckets.frozen_layout
    given = rank.config.model.init is not None and not last  # read from files, so equal to the bit
    facts = {
        "the plan's checksum": checksum_of(together(rank.comm, lambda: [rank.plan(n) for n in to_come])),
        "the model's parameters": checksum_of([*map(checkpoint.layout_table, layouts), buckets.order]),
        "the model's buffers": checksum_of(constants),
        "the weights of model.init": _checksum(buckets.flat) if given else "",
        "the frozen parameters": _checksum(buckets.frozen) if own or given else "",
    }
    initial = [] if last else [*_sample(buckets.flat), *_sample(buckets.frozen)]
    everyone = exchange_json(rank.comm, [facts, initial])
    if differences := find_differences([told for told, _ in everyone]):
        raise _agreed(f"{'; '.join(differences)}; give all ranks the same files and the same fdiff")
    for number, (_, weights) in enumerate(everyone):
        if not np.allclose(weights, everyone[0][1], rtol=TOLERANCE, atol=TOLERANCE):
            raise _agreed(
                f"model.kind: rank {number} has other initial weights than rank 0; draw them from torch's own generator"
            )


def _checksum(tensor: torch.Tensor) -> str:
    return checkpoint.checksum(tensor.cpu().numpy())[:12]


def _sample(tensor: torch.Tensor) -> list[float]:
    """Some of the values (n,) of a tensor, none of an empty one."""
    at = torch.linspace(0, len(tensor) - 1, SAMPLE, dtype=torch.float64).long()
    return tensor[at.to(tensor.device)].cpu().tolist() if len(tensor) else []


def _agreed(text: str) -> UserError:
    error = UserError(text)
    error.agreed = True  # all ranks compare the same facts
    return error


def checksum_of(value: object) -> str:
    """12 letters that differ if the value does, as Python writes it."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def find_differences(everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """A phrase for each fact that is not the same on all ranks, e.g. "optim.lr: 0.1 on rank 0, 0.2 on ranks 1, 2"."""
    names = dict.fromkeys(name for facts in everyone for name in facts)
    found = []
    for name in names:
        ranks: dict[str, list[str]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(facts.get(name, "not there"), []).append(str(rank))
        if len(ranks) > 1:
            said = [f"{value} on rank{'s' * (len(of) > 1)} {', '.join(of)}" for value, of in ranks.items()]
            found.append(f"{name}: {', '.join(said)}")
    return found
