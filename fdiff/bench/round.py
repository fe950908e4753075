"""Everything in a round but the local epochs, beside the parts that no round can do without, each measured alone.

Clients that train nothing go through whole rounds: plan, votes, averages, the copy for the checkpoint, logs. The bound
is the sum of: one bare all-reduce of as many bytes among the same ranks, a vote, a line of the log, the copy. What the
weights on the parameters cost is listed beside them. Only the commit is left out, which happens behind the next round's
training: see `fdiff bench checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import median

import torch

from fdiff.bench import no_training
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.comm import Collectives, Communicator, SoloCommunicator
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation import Federation, bytes_by_purpose, itemsize
from fdiff.model import parts_of
from fdiff.plan import RoundPlan, methods_for

WIDTHS = (28, 64, 128)  # 3.0, 14.9 and 58.4 million parameters of the paper's model
REPEATS, WARMUP = 15, 3


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """FULL in three widths with a client a rank, with two a rank, and the other methods at the configured width."""
    if comm.size == 1:
        raise UserError("bench round: 1 rank has nothing to send; start it with torchrun or mpirun on 2 or more")
    full = replace(config, method="full")
    cases = [(replace(full, model=replace(config.model, dim=dim)), comm.size) for dim in WIDTHS]
    cases += [(full, 2 * comm.size)]
    cases += [(replace(config, method=method), comm.size) for method in methods_for(parts_of(config))[1:]]
    return [r for case, clients in cases for r in _measure(no_training.quiet(case, clients), comm, device)]


def _measure(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """The round beside the sum of its parts, but for the weights; then each part beside the round."""
    clients = config.federation.clients
    with no_training.federation(config, comm, device) as federation:
        sizes = federation.rank.host.trainer.buckets.sizes
        parts = _parts(federation)
        actions = {"round": rounds(federation.round), **parts}
        taken = in_turns(actions, comm, device, REPEATS, WARMUP)
    milliseconds = {key: [1e3 * s for s in series] for key, series in taken.items()}
    whole = milliseconds["round"]
    bound = [sum(median(milliseconds[part]) for part in parts if part != "weights")]
    name = f"{config.method}, {sum(sizes.values()) / 1e6:.1f} M parameters, {clients} clients"
    shares = [compare(f"{part} of {name}", milliseconds[part], whole, "baseline", "ms") for part in parts]
    return [compare(name, whole, bound, "bound", "ms"), *shares]


def rounds(round: Callable[[int], None]) -> Callable[[], None]:
    """A function that plays the next round each time, from round 1."""
    numbers = count(1)
    return lambda: round(next(numbers))


def _parts(federation: Federation) -> dict[str, Callable[[], object]]:
    """What a round consists of, by name: weighting a tensor and an all-reduce of it over all ranks that sends as many
    bytes as the first round's plan, a vote, the log's line, and the copy that its checkpoint is written from."""
    config, comm, host = federation.config, federation.comm, federation.rank.host
    round = federation.select(1)
    round.reports, round.seconds = [no_training.report(client) for client in host.clients], {"train": 1.0}
    planned = bytes_by_purpose(round.plan, config, federation.rank.payload, federation.rank.placement)["parameters"]
    tensor = torch.ones(planned // (2 * (comm.size - 1)) // itemsize(config), device=host.shared.device)
    assert isinstance(comm, Collectives)  # several ranks

    def log() -> None:
        with comm.ledger.purpose("parameters"):
            comm.ledger.count(planned / comm.size)  # what the line is held against
        federation.evaluate(round)

    log()  # its line is part of the copy
    return {
        **_compression(federation),
        "weights": lambda: tensor.mul_(0.5),
        "all-reduce": lambda: comm.bare_all_reduce(tensor),
        "vote": federation.votes.vote,
        "log line": log,
        "copy": lambda: federation.commits.prepare(round),
    }


def _compression(federation: Federation) -> dict[str, Callable[[], object]]:
    """What a rank has to do to encode one client's update and to decode a sum; nothing without compression."""
    rank = federation.rank
    if rank.config.compression.kind == "none":
        return {}
    host, client = rank.host, rank.host.clients[0].index
    plan = RoundPlan(1, (client,), dict.fromkeys(host.slices, (client,)))
    alone = replace(rank, comm=SoloCommunicator(), placement=(0,) * len(rank.placement))
    start, out, update = host.start(), host.shared.clone(), torch.randn_like(host.shared).mul_(1e-3)

    def encode_and_decode() -> None:
        averaging = alone.aggregation(plan, out, "parameters", start)
        averaging.add(client, start + update)
        averaging.finish()

    return {"compression": encode_and_decode}
