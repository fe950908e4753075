"""A round that was stopped keeps the clients that were done with it; the next start takes them up and trains the rest.

    RUN/checkpoints/.partial-000004/rank-0001.h5   of each rank with such clients: what its averages hold so far, the
                                                   clients' own tensors, their reports

No checkpoint: nothing else reads it, a start with other ranks or another configuration leaves it, and it goes when the
round is committed. Every rank calls these functions, and each writes and reads its own file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdiff import checkpoint
from fdiff.comm import exchange_json
from fdiff.config import flat, to_dict
from fdiff.errors import UserError
from fdiff.federation.assemble import RankSetup
from fdiff.federation.client import Client, Report
from fdiff.federation.record import Round
from fdiff.federation.voting import Votes

log = logging.getLogger(__name__)

# Fields that may change between a start and the next without a change in what a client trains and reports.
MAY_CHANGE = (
    "federation.rounds", "data.root", "data.in_memory", "data.workers", "data.download",
    "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "runtime.timeout_s", "sample",
)  # fmt: skip


def keep_clients(round: Round | None, rank: RankSetup, votes: Votes) -> tuple[int, int]:
    """Keep the clients that are done with a round under way, if there is one; how many of all ranks, and new ones.

    If it fails on a rank, all raise that error.
    """
    done, new = (len(round.reports), len(round.reports) - round.taken_up) if round else (0, 0)
    with votes.keeping_errors("checkpoint"):
        if round and new:
            _write(round, rank)
    votes.vote()
    everyone = exchange_json(rank.comm, [done, new])
    return sum(done for done, _ in everyone), sum(new for _, new in everyone)


def take_up_clients(round: Round, rank: RankSetup) -> None:
    """Put the clients back that an earlier start has kept of this round, if it has: they need not train again."""
    file = _file(round, rank)
    if not file.exists():
        return
    try:
        arrays, header = checkpoint.read_file(file)
    except UserError as error:
        log.warning("the clients kept of round %d train again: %s", round.plan.round, error)
        return
    if different := [name for name, value in _setting(round, rank).items() if header.get(name) != value]:
        log.warning("the clients kept of round %d train again: they had another %s", round.plan.round, different[0])
        return
    round.reports += [Report(**{**report, "losses": tuple(report["losses"])}) for report in header["reports"]]
    round.failures |= {int(client): why for client, why in header["failures"].items()}
    round.seconds["train"], round.taken_up = header["seconds"], len(round.reports)
    for client in _done(round, rank):
        own = _named(arrays, f"client-{client.index}/")
        for name, tensor in rank.host.state(client).items():
            tensor.copy_(own[name])
        client.trained = own.get("trained")
    round.averaging.restore([report.client for report in round.reports], _named(arrays, "averages/"))
    done = ", ".join(str(report.client) for report in round.reports)
    log.info("round %d goes on: of the stopped start, these clients are done: %s", round.plan.round, done)


def _write(round: Round, rank: RankSetup) -> None:
    """This rank's file: what its clients that are done have reported, and what they keep."""
    arrays = {f"averages/{name}": _on_host(t) for name, t in round.averaging.state().items()}
    for client in _done(round, rank):
        arrays |= {f"client-{client.index}/{name}": _on_host(t) for name, t in rank.host.state(client).items()}
        if client.trained is not None:
            arrays[f"client-{client.index}/trained"] = _on_host(client.trained)
    file = _file(round, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(file, arrays, {**_setting(round, rank), **_found(round)})
    checkpoint.sync_folder(file.parent)


def _done(round: Round, rank: RankSetup) -> list[Client]:
    reported = {report.client for report in round.reports}
    return [client for client in rank.host.clients if client.index in reported]


def _file(round: Round, rank: RankSetup) -> Path:
    return checkpoint.partial_folder(rank.config.run_dir, round.plan.round) / f"rank-{rank.comm.rank:04d}.h5"


def _setting(round: Round, rank: RankSetup) -> dict[str, Any]:
    """What has to be the same for the file to be of use."""
    return {
        "round": round.plan.round,
        "number of ranks": [rank.comm.rank, rank.comm.size],
        "number of images": [rank.images[client] for client in sorted(rank.images)],
        "images": rank.opened.fingerprints,
        "plan": {part: list(clients) for part, clients in round.plan.reporters.items()},
        **{name: value for name, value in flat(to_dict(rank.config)).items() if not name.startswith(MAY_CHANGE)},
    }


def _found(round: Round) -> dict[str, Any]:
    """What the round has found out so far on this rank."""
    return {
        "reports": [asdict(report) for report in round.reports],
        "failures": {str(client): why for client, why in round.failures.items()},
        "seconds": round.seconds.get("train", 0.0),
    }


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): torch.from_numpy(a) for n, a in arrays.items() if n.startswith(prefix)}
