"""Everything in a round but the local epochs, beside one bare all-reduce of as many bytes among the same ranks.

Clients that train nothing go through whole rounds: plan, votes, averages, the copy for the checkpoint, logs. Only the
commit is left out, which happens behind the next round's training: see `fdiff bench checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch

from fdiff.bench import no_training
from fdiff.bench.measure import Result, compare, in_turns
from fdiff.comm import Communicator
from fdiff.comm.library_sums import bare_all_reduce
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation import itemsize
from fdiff.plan import SHARED_PARTS, plan_round, wire_bytes

WIDTHS = (28, 64, 128)  # 3.0, 14.9 and 58.4 million parameters of the paper's model
REPEATS, WARMUP = 15, 3


def run(config: Config, comm: Communicator, device: torch.device) -> list[Result]:
    """FULL in three widths with a client a rank, with two a rank, and the other methods at the configured width."""
    if comm.size == 1:
        raise UserError("bench round: 1 rank has nothing to send; start it with torchrun or mpirun on 2 or more")
    full = replace(config, method="full")
    cases = [(replace(full, model=replace(config.model, dim=dim)), comm.size) for dim in WIDTHS]
    cases += [(full, 2 * comm.size)]
    cases += [(replace(config, method=method), comm.size) for method in SHARED_PARTS if method != "full"]
    return [_measure(no_training.quiet(case, clients), comm, device) for case, clients in cases]


def _measure(config: Config, comm: Communicator, device: torch.device) -> Result:
    clients = config.federation.clients
    with no_training.federation(config, comm, device) as federation:
        sizes = federation.rank.host.trainer.buckets.sizes
        taken = in_turns(
            {"round": rounds(federation.round), "bound": _bound(config, sizes, comm, device)},
            comm, device, REPEATS, WARMUP,
        )  # fmt: skip
    name = f"{config.method}, {sum(sizes.values()) / 1e6:.1f} M parameters, {clients} clients"
    milliseconds = {key: [1e3 * s for s in series] for key, series in taken.items()}
    return compare(name, milliseconds["round"], milliseconds["bound"], "bound", "ms")


def rounds(round: Callable[[int], None]) -> Callable[[], None]:
    """A function that plays the next round each time, from round 1."""
    numbers = count(1)
    return lambda: round(next(numbers))


def _bound(
    config: Config, sizes: dict[str, int], comm: Communicator, device: torch.device
) -> Callable[[], None]:
    """One all-reduce over all ranks that sends as many bytes as the first round's plan."""
    plan = plan_round(config.method, config.federation.clients, 1, config.run.seed, config.federation.fraction)
    planned = wire_bytes(plan, sizes, config.federation.clients, comm.size, itemsize(config))
    tensor = torch.ones(planned // (2 * (comm.size - 1)) // itemsize(config), device=device)
    all_reduce = bare_all_reduce(comm)
    return lambda: all_reduce(tensor)
