"""Bringing a federation up: each rank opens its clients' images, makes its trainer, goes back to a checkpoint.

Every rank calls these functions; they end in a vote, so that what one rank lacks ends all of them, in one line.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiff import checkpoint
from fdiff.checkpoint import VISIBLE_S, Committer
from fdiff.comm import Communicator, agree, exchange_json
from fdiff.compression import Exchange, Payload, payload_for
from fdiff.config import KINDS, Config
from fdiff.data import PATIENCE_S, Shard, check_labels, split_source
from fdiff.data.partition import label_counts
from fdiff.errors import UserError
from fdiff.federation import server_optimizer, snapshot
from fdiff.federation.aggregate import Aggregation
from fdiff.federation.client import Client, Trainer
from fdiff.federation.compressed import FACTORS, SENT_EMA, CompressedAggregation, compresses
from fdiff.federation.forecast import itemsize, placement_for, plan_of
from fdiff.federation.host import Host
from fdiff.federation.initial import Weights, find_initial, read_initial
from fdiff.federation.memory import memory_of_rank, shortage
from fdiff.federation.training_images import OpenedData, open_data
from fdiff.federation.validate import has_client_files, shared_parts
from fdiff.federation.voting import on_rank_0, together
from fdiff.model import check_model
from fdiff.plan import Placement, RoundPlan, hosted_at
from fdiff.runtime import free_memory, launcher

log = logging.getLogger(__name__)

Labels = dict[int, int]  # images of each label


@dataclass(frozen=True)
class RankSetup:
    """All that a rank works with: its clients in their host, n_k of all clients, the writer of checkpoints.

    `config` has what was inferred from the images, which are `opened`. `setting` is what the run folder notes of ranks
    and clients.
    """

    config: Config
    comm: Communicator
    host: Host
    images: dict[int, int]
    placement: Placement
    opened: OpenedData
    committer: Committer
    setting: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters of each part."""
        return self.host.trainer.buckets.sizes

    @property
    def drops(self) -> bool:
        """Whether a round goes on without a client that fails in it."""
        return self.config.federation.on_client_failure == "drop"

    @property
    def keeps_private_parts(self) -> bool:
        """Whether each client has a model of its own."""
        return bool(self.host.trainer.private_parts)

    @cached_property
    def payload(self) -> Payload:
        """The bytes that stand for each part."""
        return payload_for(self.config.compression, self.host.trainer.buckets.layout, itemsize(self.config))

    def plan(self, round: int) -> RoundPlan:
        """The plan of a round."""
        return plan_of(self.config, round, tuple(self.sizes), self.images)

    def start(self) -> Tensor | None:
        """The shared parts (n,) with which a round begins, where averaging them needs to know; None elsewhere."""
        needs = self.config.federation.server != "average" or compresses(self.config, "parameters")
        return self.host.start() if needs else None

    def step_server(self, start: Tensor | None) -> None:
        """Take the server optimizer's step, if there is one, from `start` (n,) and the average, in its place."""
        if self.config.federation.server != "average" and start is not None:
            server_optimizer.step(self.config.federation, start, self.host.average, self.host.federation)

    def checksum_of_repeated(self) -> int | None:
        """A checksum of the shared parts where each rank computes them by itself; None where they are sent.

        Processors that are not alike may round such steps otherwise.
        """
        if self.config.federation.server == "average" and not compresses(self.config, "parameters"):
            return None
        whole = torch.int64 if self.host.shared.dtype == torch.float64 else torch.int32
        return int(self.host.shared.view(whole).sum(dtype=torch.int64))

    def aggregation(
        self, plan: RoundPlan, out: Tensor, purpose: str, start: Tensor | None = None
    ) -> Aggregation | CompressedAggregation:
        """The weighted mean of a round, to be built in `out` (n,); `start` (n,) as the method of that name has it."""
        uniform = self.config.federation.weighting == "uniform"
        weights = {client: 1 if uniform else n for client, n in self.images.items()}
        ordered, placement = self.config.runtime.reduction == "ordered", self.placement
        if compresses(self.config, purpose):
            host, config = self.host, self.config
            layout = [slot for slot in host.trainer.buckets.layout if slot.part in host.slices]
            factors = host.federation.get(FACTORS)
            exchange = Exchange(
                self.comm, config.compression, layout, config.run.seed, plan.round, purpose, ordered, factors
            )
            trains = purpose == "parameters"
            start = start if trains else host.federation[SENT_EMA]
            assert start is not None
            left_out = host.left_out if trains and config.compression.feeds_back else None
            return CompressedAggregation(
                plan, weights, start, out, host.slices, placement, exchange, purpose, host.alone, left_out
            )
        return Aggregation(plan, weights, out, self.host.slices, placement, self.comm, ordered, purpose, self.drops)


def set_up_rank(
    config: Config,
    comm: Communicator,
    device: torch.device,
    place: Callable[..., Placement] = placement_for,
    resume: bool = False,
) -> RankSetup:
    """The clients that this rank hosts as `place` has it, ready to train, and the shape of their images in `config`.

    With `resume` the weights of `model.init` are left where they are if there is a checkpoint to go on from. UserError
    if there are fewer clients than ranks.
    """
    opened, split, placement = find_clients(config, comm, device, place)
    config, hosted = opened.config, hosted_at(placement, comm.rank)
    weights = initial_weights(config, comm, resume)
    shards, labels = open_shards(opened, comm, split, hosted, device)
    setting = _setting(comm, device, dict(zip(hosted, shards, strict=True)), labels)
    images = {row["client"]: row["images"] for row in setting["clients"]}
    own = [Client(client, shard) for client, shard in zip(hosted, shards, strict=True)]
    host = together(comm, lambda: Host(Trainer(config, device, weights), own))
    return RankSetup(config, comm, host, images, placement, opened, _committer(config, comm), setting)


def find_clients(
    config: Config, comm: Communicator, device: torch.device, place: Callable[..., Placement] = placement_for
) -> tuple[OpenedData, list[np.ndarray] | None, Placement]:
    """The images, how they are split (see `_split`) and where clients are: all that is known before memory is taken.

    UserError for all that shows by then: too many ranks, images that are unfit or too few, too little memory.
    """
    together(comm, lambda: check_request(config, comm.size))
    opened = open_data(config, comm)
    config = opened.config
    split = together(comm, lambda: _split(opened))
    together(comm, lambda: [check_labels(source, config.model.classes) for source in opened.sources])
    placement = place(config, comm.size, {client: len(rows) for client, rows in enumerate(split)} if split else None)
    _check_memory(config, comm, device, len(hosted_at(placement, comm.rank)))
    return opened, split, placement


def _setting(
    comm: Communicator, device: torch.device, shards: Mapping[int, Shard], labels: Sequence[Labels]
) -> dict[str, Any]:
    """Where the ranks run and what the clients hold: their numbers of images, and counts of labels where known here."""
    sizes = [[client, len(shard)] for client, shard in shards.items()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    here = {"host": socket.gethostname(), "pid": os.getpid(), "device": name}
    everyone = exchange_json(comm, {**here, "sizes": sizes})
    clients = [{"client": c, "images": n} for c, n in sorted(pair for rank in everyone for pair in rank["sizes"])]
    for row, counts in zip(clients, labels, strict=False):
        row["labels"] = counts
    return {
        "job": launcher.job_name(comm.outlives),
        "communicator": comm.name,
        "ranks": [{fact: rank[fact] for fact in here} for rank in everyone],
        "clients": clients,
    }


def initial_weights(config: Config, comm: Communicator, resume: bool) -> Weights | None:
    """The weights of `model.init`, on every rank; None where they are those of the seed, or a checkpoint has them."""
    if config.model.init is None:
        return None
    if resume and on_rank_0(comm, lambda: bool(checkpoint.generations(config.run_dir))):
        return None
    newest = on_rank_0(comm, lambda: str(find_initial(Path(config.model.init))))  # a run may go on meanwhile
    return together(comm, lambda: read_initial(config, Path(newest)))


def check_request(config: Config, ranks: int) -> None:
    """UserError for what is wrong whatever the images are: too many ranks, a model or a method that cannot be."""
    check_ranks(config, ranks)
    check_model(config)
    if config.model.kind in KINDS:
        shared_parts(config)


def check_ranks(config: Config, ranks: int) -> None:
    """UserError if a rank would have no client."""
    clients = config.federation.clients
    if ranks > clients:
        raise UserError(f"federation.clients: {clients} clients cannot occupy {ranks} ranks; start at most {clients}")


def _check_memory(config: Config, comm: Communicator, device: torch.device, hosted: int) -> None:
    """UserError if what all ranks of a node need, or what this one needs of its GPU, is more than is free."""
    budget = together(comm, lambda: memory_of_rank(config, comm.rank, comm.size, hosted))
    on_host = budget.host + (budget.device if device.type == "cpu" else 0)
    everyone = exchange_json(comm, [socket.gethostname(), on_host])
    here = sum(needed for host, needed in everyone if host == socket.gethostname())
    cpu = torch.device("cpu")
    problem = shortage(config, here, free_memory(cpu), f"{socket.gethostname()} for its ranks together")
    if device.type == "cuda" and not problem:
        problem = shortage(config, budget.device, free_memory(device), f"the GPU of rank {comm.rank}")
    agree(comm, UserError(problem) if problem else None)


def _committer(config: Config, comm: Communicator) -> Committer:
    attempt = exchange_json(comm, secrets.token_hex(4))[0]
    files = range(config.federation.clients) if has_client_files(config) else ()
    visible_s = min(VISIBLE_S, config.runtime.timeout_s / 2)
    return Committer(config.run_dir, attempt, config.run.keep_checkpoints, files, comm.rank == 0, visible_s)


def _split(opened: OpenedData) -> list[np.ndarray] | None:
    """The indices (n_k,) of each client in the data set that all ranks split; None of private silos."""
    config = opened.config
    if config.data.partition == "private":
        return None
    return split_source(opened.sources[0], config.data, config.federation.clients)


def open_shards(
    opened: OpenedData,
    comm: Communicator,
    split: list[np.ndarray] | None,
    clients: Sequence[int],
    device: torch.device,
) -> tuple[list[Shard], list[Labels]]:
    """The training images of the given clients, on the device or behind loaders; UserError if they cannot be had.

    Also the label counts of all clients where this rank splits one data set among them; none where they are private.
    Every rank calls it, and all fail alike.
    """
    config, labels = opened.config, list[Labels]()
    data = config.data
    if split is None:
        pairs = [(source, np.arange(len(source))) for source in opened.sources]
    else:
        source = opened.sources[0]
        labels = label_counts(source.labels, split)
        pairs = [(source, split[client]) for client in clients]

    def shards() -> list[Shard]:
        how = {"in_memory": data.in_memory, "workers": data.workers, "patience_s": _patience_s(config)}
        return [Shard(source, indices, device, **how) for source, indices in pairs]

    return together(comm, shards), labels


def _patience_s(config: Config) -> float:
    """For loader processes: less than the other ranks wait for this one, so that it is this one that says why."""
    return min(PATIENCE_S, config.runtime.timeout_s / 2)


def resume_from(rank: RankSetup) -> tuple[int, dict[str, list[Any]] | None]:
    """Put every rank's clients back to the newest checkpoint that is whole; its round, or 0 if there is none yet.

    Also the rows of the logs that it holds, if it does.
    """
    comm, run_dir = rank.comm, rank.config.run_dir
    # Rank 0 alone decides which one is whole: two ranks that look for themselves might see two different ones.
    newest = together(comm, lambda: snapshot.newest_sound(run_dir) if comm.rank == 0 else None)
    round = exchange_json(comm, newest.round if newest else 0)[0]
    if not round:
        return 0, None
    folder = checkpoint.root(run_dir) / checkpoint.generation_name(round)
    saved = together(comm, lambda: snapshot.restore(folder, rank.host, rank.images, rank.opened.fingerprints))
    if comm.rank == 0 and (changed := snapshot.changed_arithmetic(saved, rank.config)):
        log.warning("--resume: other values of %s: the result will not have the digits of one start", changed)
    return round, saved.get("logs")
