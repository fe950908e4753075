"""The memory that a rank needs, computed before it starts: exact for tensors that stay, a lower bound for the others.

What the clients keep between rounds lives on the host, so the device's part does not depend on their number. Images
are not counted: `data.in_memory` decides on them by what is left, at one byte a value, or four with `data.range`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdiff.config import KINDS, Config
from fdiff.federation.compressed import kept_by_federation
from fdiff.federation.forecast import itemsize
from fdiff.model import describe_model, diffusion, frozen_parts, layout_of, part_sizes, unconditional
from fdiff.plan import hosted_by, shared_parts

GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    On the device: `model` (parameters, gradients, Adam's moments and a moving average), `shared` (second copies of the
    shared parts, and of what a failed client gets back), `activations` of a training step. On the host: `clients`, what
    its clients keep and what is being written of it, and `checkpoint`, what rank 0 writes of the shared parts.
    """

    model: int
    shared: int
    activations: int
    clients: int
    checkpoint: int

    @property
    def device(self) -> int:
        """Bytes on the device, for any number of clients."""
        return self.model + self.shared + self.activations

    @property
    def host(self) -> int:
        """Bytes on the host beside what the libraries take."""
        return self.clients + self.checkpoint


def memory_of_rank(config: Config, rank: int, ranks: int, hosted: int | None = None) -> Memory:
    """The memory of one of so many ranks with so many clients, by default with its share of all.

    Rank 0 writes the shared parts besides.
    """
    model, size = describe_model(config), itemsize(config)
    sizes = part_sizes(layout_of(model))
    frozen = sum(slot.numel for slot in layout_of(model, frozen=True))
    names = shared_parts(config.method, tuple(sizes), frozen_parts(config))
    total, shared = sum(sizes.values()), sum(sizes[part] for part in names)
    ema, kept = bool(config.optim.ema), config.federation.keep_optimizer
    hosted = len(hosted_by(rank, config.federation.clients, ranks)) if hosted is None else hosted
    compressed, feeds_back = config.compression.kind != "none", config.compression.feeds_back
    # Of a client: private parts, moving average, moments, what compression has left out.
    state = total - shared + (ema + 2 * kept) * total + feeds_back * shared
    held = 2 * hosted - 1  # as it is, and as it is being written; but the last one to train is still in the trainer
    common = sum(kept_by_federation(config, layout_of(model), names).values())
    drops = config.federation.on_client_failure == "drop"
    # Compressed: where the round began, an update, what is decoded, and words or chosen values.
    serves, pulls = config.federation.server != "average", config.federation.proximal_mu > 0
    second = (2 + drops) * (hosted > 1) + ema + compressed * 4 + feeds_back + 2 * serves + pulls
    return Memory(
        model=((4 + ema) * total + frozen) * size,
        shared=(second * shared + drops * state + common) * size,
        activations=activations(config),
        clients=(held * state + (hosted if compressed and hosted > 1 else 0) * shared) * size,  # and their updates
        checkpoint=((1 + ema) * shared + frozen + common) * size if rank == 0 else 0,
    )


def activations(config: Config) -> int:
    """Bytes that a training step keeps for its backward pass; its peak is somewhat higher. Takes no memory itself.

    0 of a model of the user's own that cannot be run without memory.
    """
    data, batch = config.data, config.optim.batch_size
    counted = unconditional(config)
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model = describe_model(counted)
    with torch.device("meta"):
        x = torch.zeros(batch, *data.shape)
        t = torch.zeros(batch, dtype=torch.int64)
        schedule = diffusion.make_schedule(config.diffusion, torch.float32, "meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            diffusion.loss(model, schedule, x, t, x)
    except Exception:
        if config.model.kind in KINDS:
            raise
        return 0
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    width = {"bf16": 0.5, "float64": 2.0}.get(config.runtime.precision, 1.0)
    return int(width * sum(s.untyped_storage().nbytes() for key, s in storages.items() if key not in parameters))


def shortage(config: Config, needed: int, free: int, where: str) -> str | None:
    """Why a job that needs so many bytes at least cannot run where so many are free, and what to change; or None."""
    if needed <= free:
        return None
    return (
        f"optim.batch_size, federation.clients: this job needs at least {needed / GIB:.1f} GiB on {where}, where "
        f"{free / GIB:.1f} GiB are free; lower optim.batch_size (now {config.optim.batch_size}) or model.dim, or "
        f"spread the {config.federation.clients} clients over more nodes"
    )
