"""What a checkpoint holds of a federation, and how a federation is put back from one.

    global.h5        parts/<part> (n,) of the shared parts; ema/<part> (n,) of their moving average, if one is kept;
                     samples (n, C, S, S) uint8, if the round drew a grid.
                     Header: round, config, layout, images of each client, reporters, metrics of the round
    client-0003.h5   private/<part> (n,), and as far as the run keeps them local (n,), ema (P,), exp_avg, exp_avg_sq
                     (P,), step ()

Whatever is here is a copy on the host: training goes on while it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiff import checkpoint
from fdiff.checkpoint import Contents, Damaged
from fdiff.config import Config, from_dict, to_dict
from fdiff.errors import UserError
from fdiff.federation.client import Client
from fdiff.federation.host import Host
from fdiff.federation.validate import check_client, check_global, find_problems, has_client_files, private_parts
from fdiff.model import PARTS
from fdiff.plan import SHARED_PARTS

log = logging.getLogger(__name__)

# Fields that may change between a run and its resumption: how long, where and how it runs, not what it computes.
MAY_CHANGE = (
    "federation.rounds", "federation.on_client_failure", "data.root", "data.in_memory", "data.workers", "data.download",
    "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_local", "runtime.", "sample.every",
)  # fmt: skip


class HostCopies:
    """Host memory for what a checkpoint holds beside the clients' own tensors.

    Kept from round to round, and pinned for a GPU: fresh pages cost more than what is copied into them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, tensor: Tensor) -> np.ndarray:
        """A copy of the tensor on the host; complete, for a GPU's, once the device is waited for."""
        copy = self._kept.get(name)
        if copy is None or copy.shape != tensor.shape:
            copy = self._kept[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            copy.copy_(tensor.detach(), non_blocking=True)
        else:
            np.copyto(copy.numpy(), tensor.detach().numpy())  # of 233 MB in half the time that torch takes
        return copy.numpy()


def client_arrays(host: Host, client: Client) -> dict[str, np.ndarray]:
    """A client's own tensors as they are on the host, its private parts by name."""
    state = dict(host.lend(client))
    private = state.pop("private")
    spans = {f"private/{p}": host.trainer.buckets.span((p,)) for p in private_parts(host.trainer.config)}
    if client.trained is not None:
        state["local"] = client.trained
    return {name: tensor.numpy() for name, tensor in ({n: private[s] for n, s in spans.items()} | state).items()}


def global_arrays(host: Host, ema: Tensor | None, images: Tensor | None, copies: HostCopies) -> dict[str, np.ndarray]:
    """The shared parts, their moving average (n,) and the sample grid, as host copies."""
    arrays = _by_part(host, "parts", copies.of("parts", host.shared))
    if ema is not None:
        arrays |= _by_part(host, "ema", copies.of("ema", ema))
    if images is not None:
        arrays["samples"] = copies.of("samples", images)
    return arrays


def _by_part(host: Host, kind: str, flat: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{kind}/{part}": flat[span] for part, span in host.slices.items()}


def contents(
    host: Host,
    images: Mapping[int, int],
    metrics: Mapping[str, Any],
    ema: Tensor | None,
    grid: Tensor | None,
    leads: bool,
    copies: HostCopies,
) -> Contents:
    """This rank's share of a round's checkpoint, as host copies; `leads`: with what is global.

    The last one's memory is used again: it must have been written, or not be wanted any more.
    """
    own = host.clients if has_client_files(host.trainer.config) else []
    whole = (global_arrays(host, ema, grid, copies), header(host, images, metrics)) if leads else None
    clients = {c.index: client_arrays(host, c) for c in own}
    _complete_copies(host)
    return Contents(metrics["round"], clients, whole)


def with_ema(contents: Contents, host: Host, ema: Tensor, copies: HostCopies) -> Contents:
    """The contents with the average (n,) of the moving averages, which they lacked, where they have what is global."""
    if contents.whole is None:
        return contents
    arrays, header = contents.whole
    more = _by_part(host, "ema", copies.of("ema", ema))
    _complete_copies(host)
    return replace(contents, whole=({**arrays, **more}, header))


def _complete_copies(host: Host) -> None:
    """Wait until what was copied from a GPU is here."""
    if host.shared.is_cuda:
        torch.cuda.current_stream(host.shared.device).synchronize()


def header(host: Host, images: Mapping[int, int], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What global.h5 says beside its arrays; `metrics` is the round's line of the log."""
    return {
        "round": metrics["round"],
        "config": to_dict(host.trainer.config),
        "layout": checkpoint.layout_table(host.trainer.buckets.layout),
        "images": [images[client] for client in sorted(images)],
        "reporters": metrics["reporters"],
        "metrics": dict(metrics),
    }


# --- and back ------------------------------------------------------------------------------------------------------


def newest_sound(run_dir: Path) -> checkpoint.Generation | None:
    """The newest checkpoint of a run that is whole, or None if the run has none; damaged ones are named in the log.

    Damaged if it has some, but none is whole.
    """
    found = checkpoint.generations(run_dir)
    for generation in reversed(found):
        found_wrong = find_problems(generation.path)
        if not found_wrong:
            return generation
        log.warning("passing over a damaged checkpoint: %s", found_wrong[0])
    if found:
        raise Damaged(f"{checkpoint.root(run_dir)}: none of its {len(found)} checkpoints is whole; start a new run")
    return None


def restore(path: Path, host: Host, images: Mapping[int, int]) -> None:
    """Put the shared parts and this rank's clients back as they were; `path` is the folder of a checkpoint.

    UserError if the configuration or a client's number of images has changed, Damaged if a file is not sound.
    """
    arrays, saved, _ = checkpoint.read_generation(path)
    before = check_global(path, saved, _described(arrays))
    _check_same_run(path, saved, host.trainer.config, images)
    own = [c.index for c in host.clients] if has_client_files(before) else []
    states = checkpoint.read_clients(path, saved, own)
    for part, span in host.slices.items():
        _fill(host.shared[span], arrays, f"parts/{part}", path / "global.h5")
    for client, state in zip(host.clients, states, strict=False):
        _restore_client(host, client, state, path / checkpoint.client_file(client.index))


def _restore_client(host: Host, client: Client, arrays: Mapping[str, np.ndarray], file: Path) -> None:
    tensors = host.state(client)
    for name, tensor in tensors.items():
        if name != "private":
            _fill(tensor, arrays, name, file)
    if host.trainer.config.run.keep_local and "local" in arrays:  # of a client that the next round does not select
        client.trained = torch.from_numpy(arrays["local"])
    for part in private_parts(host.trainer.config):
        _fill(tensors["private"][host.trainer.buckets.span((part,))], arrays, f"private/{part}", file)


def _fill(tensor: Tensor, arrays: Mapping[str, np.ndarray], name: str, file: Path) -> None:
    array = arrays.get(name)
    if array is None:
        raise Damaged(f"{file}: has no dataset {name}; use another checkpoint")
    if array.shape != tuple(tensor.shape):
        raise Damaged(f"{file}: {name} has shape {array.shape}, this model needs {tuple(tensor.shape)}")
    values = torch.from_numpy(array)
    if values.dtype != tensor.dtype:
        raise UserError(f"runtime.precision: {file} holds {values.dtype}, this run computes in {tensor.dtype}")
    tensor.copy_(values)


def _check_same_run(path: Path, saved: Mapping[str, Any], config: Config, images: Mapping[int, int]) -> None:
    before, now = _flat(to_dict(from_dict(saved["config"]))), _flat(to_dict(config))
    changed = [n for n in now if before[n] != now[n] and not n.startswith(MAY_CHANGE)]
    if changed:
        told = ", ".join(f"{n} (was {before[n]!r}, is {now[n]!r})" for n in changed)
        raise UserError(f"--resume: {path} was made with other values of {told}; set them back or start a new run")
    if saved["images"] != [images[client] for client in sorted(images)]:
        raise UserError(
            f"data.root: the clients had {saved['images']} images when {path} was made, now they have "
            f"{[images[client] for client in sorted(images)]}; give the same data or start a new run"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


# --- a model from a checkpoint, without its run --------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint as a source of models: its configuration, its round, the folder."""

    path: Path
    config: Config
    round: int
    shared: dict[str, np.ndarray]

    @property
    def has_ema(self) -> bool:
        """Whether it holds moving averages."""
        return any(name.startswith("ema/") for name in self.shared)

    def parameters(self, client: int | None, ema: bool) -> Tensor:
        """A whole model (P,): that of a client, or the global one (None) where no part is private."""
        arrays = {p: self.shared[f"{'ema' if ema else 'parts'}/{p}"] for p in SHARED_PARTS[self.config.method]}
        private = private_parts(self.config)
        if private:
            arrays |= self._private(self._own(client or 0), private, ema)
        return torch.from_numpy(np.concatenate([arrays[p] for p in PARTS]))

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
        check_client(self.path / checkpoint.client_file(client), self.config, _described(own))
        return own

    def _private(self, own: Mapping[str, np.ndarray], parts: tuple[str, ...], ema: bool) -> dict[str, np.ndarray]:
        sizes = {p: own[f"private/{p}"].size for p in parts}
        if not ema:
            return {p: own[f"private/{p}"] for p in parts}
        ends = np.cumsum([sizes[p] for p in parts])  # private parts come first in the arena
        return {p: own["ema"][end - sizes[p] : end] for p, end in zip(parts, ends, strict=True)}


def open_checkpoint(path: Path) -> Saved:
    """A checkpoint's folder, or a run's, of which the newest sound checkpoint is meant. Damaged if there is none."""
    if not (path / "global.h5").exists() and checkpoint.root(path).is_dir():
        newest = newest_sound(path)
        path = path if newest is None else newest.path
    if not path.is_dir():
        raise Damaged(f"{path}: is not a folder; give a run or a checkpoint, e.g. RUN/checkpoints/round-000015")
    arrays, saved, _ = checkpoint.read_generation(path)
    return Saved(path, check_global(path, saved, _described(arrays)), saved["round"], arrays)


def _described(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
