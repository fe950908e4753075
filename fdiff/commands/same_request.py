"""One job is one job: before anything else its ranks compare what each of them was told to do, and by which version."""

from __future__ import annotations

import logging
from contextlib import suppress

import torch

from fdiff import __version__
from fdiff.comm import Communicator, exchange_json
from fdiff.commands.flags import Request
from fdiff.config import KINDS, flat, to_dict
from fdiff.errors import UserError
from fdiff.federation import checksum_of, find_differences, plan_of
from fdiff.model import parts_of

log = logging.getLogger(__name__)

# Where the data lie on a node, and how a rank computes: all else is the same on every rank.
MAY_DIFFER = ("data.root", "data.in_memory", "data.workers", "runtime.threads", "runtime.device")


def compare_requests(comm: Communicator, request: Request) -> None:
    """UserError on every rank, with the names of the fields and of the ranks, if they were not told the same."""
    everyone = exchange_json(comm, [facts_of(request), torch.__version__])
    if differences := find_differences([facts for facts, _ in everyone]):
        error = UserError(f"{'; '.join(differences)}; start all ranks with the same settings and the same fdiff")
        error.agreed = True
        raise error
    if differences := find_differences([{"torch": version} for _, version in everyone]):
        log.warning("%s; results are those of a mixture", differences[0])


def facts_of(request: Request) -> dict[str, str]:
    """All that the ranks of a job have in common: the version, the command, each of its fields, the plan."""
    config, flags = request.arguments.get("config"), dict(request.arguments)
    fields = to_dict(flags.pop("config")) if config else {"runtime": to_dict(request.runtime)}
    flags.pop("runtime", None)
    facts = {"fdiff's version": __version__, "command": request.name}
    facts |= {name: repr(value) for name, value in flat(fields).items() if name not in MAY_DIFFER}
    facts |= {f"--{name}": str(value) for name, value in flags.items()}
    if config and config.model.kind in KINDS:
        with suppress(UserError):  # it may need the images; what is wrong with it is said when the training starts
            facts["the plan's checksum"] = checksum_of(plan_of(config, 1, parts_of(config)))
    return facts
