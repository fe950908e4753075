"""A saved checkpoint as a source of models, without its run: to draw, score and export them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdiff import checkpoint, registry
from fdiff.checkpoint import Damaged
from fdiff.comm import Communicator, exchange_json
from fdiff.config import Config, flat, to_dict
from fdiff.errors import UserError
from fdiff.federation.snapshot import described, newest_sound
from fdiff.federation.validate import check_client, check_global, private_parts, shared_parts
from fdiff.federation.voting import together
from fdiff.model import Buckets


@dataclass(frozen=True)
class Saved:
    """A checkpoint as a source of models: its folder, which stays as long as this does, configuration and round."""

    path: Path
    config: Config
    round: int
    shared: dict[str, np.ndarray]
    hold: checkpoint.Hold | None = None

    @property
    def has_ema(self) -> bool:
        """Whether it holds moving averages."""
        return any(name.startswith("ema/") for name in self.shared)

    def parameters(self, client: int | None, ema: bool) -> Tensor:
        """A whole model (P,): that of a client, or the global one (None) where no part is private."""
        arrays = [self.shared[f"{'ema' if ema else 'parts'}/{p}"] for p in shared_parts(self.config)]
        if private := private_parts(self.config):
            arrays = self._private(self._own(client or 0), private, ema) + arrays
        return torch.from_numpy(np.concatenate(arrays))

    @property
    def frozen(self) -> Tensor:
        """What is not trained (m,): none, of most models."""
        return torch.from_numpy(self.shared["frozen"]) if "frozen" in self.shared else torch.empty(0)

    def fill(self, buckets: Buckets, client: int | None, ema: bool) -> None:
        """Put a whole model, as `parameters` has it, into the buckets of one."""
        buckets.flat.copy_(self.parameters(client, ema))
        buckets.frozen.copy_(self.frozen)

    def local_parameters(self, client: int, ema: bool) -> Tensor:
        """A client's model (P,) as it trained it in this round, before the average; UserError if it was not kept."""
        own = self._own(client)
        if not ema and "local" not in own:
            file = self.path / checkpoint.client_file(client)
            raise UserError(f"--local: {file} has no model from before the average; train with --run.keep_local")
        # Private parts come first in the arena.
        arrays = [own["ema"]] if ema else [*(own[f"private/{p}"] for p in private_parts(self.config)), own["local"]]
        return torch.from_numpy(np.concatenate(arrays))

    def _own(self, client: int) -> dict[str, np.ndarray]:
        own = checkpoint.read_generation(self.path, [client])[2][0]
        check_client(self.path / checkpoint.client_file(client), self.config, described(own))
        return own

    def _private(self, own: Mapping[str, np.ndarray], parts: tuple[str, ...], ema: bool) -> list[np.ndarray]:
        private = [own[f"private/{p}"] for p in parts]
        return [own["ema"][: sum(array.size for array in private)]] if ema else private  # they come first in the arena


def open_checkpoint(path: Path) -> Saved:
    """A checkpoint's folder, or a run's, of which the newest sound checkpoint is meant. Damaged if there is none.

    UserError if the command line names other code than it was made with.
    """
    saved = read_checkpoint(*find_checkpoint(path))
    _check_named(saved.path, saved.config)
    return saved


def find_checkpoint(path: Path) -> tuple[Path, checkpoint.Hold | None]:
    """The folder of the checkpoint that `open_checkpoint` means, and what keeps it there. Damaged if there is none."""
    if not (path / "global.h5").exists() and checkpoint.root(path).is_dir():
        hold = None
        while (newest := newest_sound(path)) and (hold := checkpoint.hold(newest.path)) is None:
            pass  # the run has gone on meanwhile
        path = path if newest is None else newest.path
    else:
        hold = checkpoint.hold(path)
    if not path.is_dir():
        raise Damaged(f"{path}: is not a folder; give a run or a checkpoint, e.g. RUN/checkpoints/round-000015")
    return path, hold


def read_checkpoint(path: Path, hold: checkpoint.Hold | None = None) -> Saved:
    """The checkpoint in this folder. Damaged if it is not sound."""
    arrays, saved, _ = checkpoint.read_generation(path)
    return Saved(path, check_global(path, saved, described(arrays)), saved["round"], arrays, hold)


def _check_named(path: Path, config: Config) -> None:
    """UserError if the command line names other code than the run's."""
    fields = flat(to_dict(config))
    for field in registry.FIELDS:
        if (named := registry.expected(field)) and fields[field] not in named:
            raise UserError(f"{field}: {path} was made with {fields[field]}, not with {named[0]}; leave the flag out")


def open_together(comm: Communicator, path: Path) -> Saved:
    """The same checkpoint on every rank, which all call it: rank 0 says which one is the newest of a run."""
    mine = together(comm, lambda: open_checkpoint(path) if comm.rank == 0 else None)
    chosen = Path(exchange_json(comm, str(mine.path) if mine else "")[0])
    return together(comm, lambda: mine or open_checkpoint(chosen))
