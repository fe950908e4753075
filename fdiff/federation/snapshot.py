"""What a checkpoint holds of a federation, and how a federation is put back from one.

    global.h5        parts/<part> (n,) of the shared parts; ema/<part> (n,) of their moving average, if one is kept;
                     state/<name> (n,), what all ranks keep alike beside them: see `compressed`;
                     frozen (m,), what is not trained, if a model has some;
                     samples (n, C, S, S), if the round drew a grid: uint8, or where data.range is given
                     float32 in that range.
                     Header: round, config, layout, frozen (its layout), number of images of each client, fingerprints
                     of the images, reporters, metrics of the round, the rows of the logs up to it, if not too many
    client-0003.h5   private/<part> (n,), and as far as the run keeps them local (n,), ema (P,), exp_avg, exp_avg_sq
                     (P,), step (), steps-taken (), left-out (n,) of the shared parts, with error feedback

Whatever is here is a copy on the host: training goes on while it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiff import checkpoint
from fdiff.checkpoint import Contents, Damaged
from fdiff.config import Config, flat, from_dict, to_dict
from fdiff.errors import UserError
from fdiff.federation.client import Client
from fdiff.federation.host import Host
from fdiff.federation.training_images import Fingerprint
from fdiff.federation.validate import check_global, find_problems, has_client_files

log = logging.getLogger(__name__)

# Fields that may change between a run and its resumption: how long, where and how it runs, not what it computes.
MAY_CHANGE = (
    "federation.rounds", "federation.on_client_failure", "data.root", "data.in_memory", "data.workers", "data.download",
    "data.max_pixels", "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_local", "runtime.",
    "sample.every",
)  # fmt: skip
# Those of them with which the same training comes to other digits.
ARITHMETIC = (
    "runtime.precision", "runtime.reduction", "runtime.threads", "runtime.device", "runtime.execution", "runtime.layout"
)  # fmt: skip

MAX_ROWS = 10_000  # of the logs, in a checkpoint: some megabytes


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
    spans = {f"private/{p}": host.trainer.buckets.span((p,)) for p in host.trainer.private_parts}
    if client.trained is not None:
        state["local"] = client.trained
    return {name: tensor.numpy() for name, tensor in ({n: private[s] for n, s in spans.items()} | state).items()}


def global_arrays(host: Host, ema: Tensor | None, images: Tensor | None, copies: HostCopies) -> dict[str, np.ndarray]:
    """The shared parts, their moving average (n,) and the sample grid, as host copies."""
    arrays = _by_part(host, "parts", copies.of("parts", host.shared))
    if ema is not None:
        arrays |= _by_part(host, "ema", copies.of("ema", ema))
    arrays |= {f"state/{name}": copies.of(name, tensor) for name, tensor in host.federation.items()}
    if len(frozen := host.trainer.buckets.frozen):
        arrays["frozen"] = copies.of("frozen", frozen)
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
    logs: Mapping[str, Sequence[Any]] | None,
    copies: HostCopies,
    fingerprints: Sequence[Fingerprint] = (),
) -> Contents:
    """This rank's share of a round's checkpoint, as host copies; with `logs`, the rows so far, what is global, too.

    The last one's memory is used again: it must have been written, or not be wanted any more.
    """
    own = host.clients if has_client_files(host.trainer.config) else []
    whole = None if logs is None else (
        global_arrays(host, ema, grid, copies),
        header(host, images, metrics, logs, fingerprints),
    )
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


def header(
    host: Host,
    images: Mapping[int, int],
    metrics: Mapping[str, Any],
    logs: Mapping[str, Sequence[Any]],
    fingerprints: Sequence[Fingerprint],
) -> dict[str, Any]:
    """What global.h5 says beside its arrays; `metrics` is the round's line of the log, `logs` all lines so far.

    Of a run so long that they would outgrow what is trained it holds none.
    """
    few = sum(map(len, logs.values())) <= MAX_ROWS
    return {
        "round": metrics["round"],
        "config": to_dict(host.trainer.config),
        "layout": checkpoint.layout_table(host.trainer.buckets.layout),
        **({"frozen": checkpoint.layout_table(frozen)} if (frozen := host.trainer.buckets.frozen_layout) else {}),
        "images": [images[client] for client in sorted(images)],
        "fingerprints": list(fingerprints),
        "reporters": metrics["reporters"],
        "metrics": dict(metrics),
        **({"logs": {name: list(rows) for name, rows in logs.items()}} if few else {}),
    }


# --- and back ------------------------------------------------------------------------------------------------------


def newest_sound(run_dir: Path) -> checkpoint.Generation | None:
    """The newest checkpoint of a run that is whole, or None if the run has none; damaged ones are named in the log.

    Damaged if it has some, but none is whole.
    """
    found = _held_generations(run_dir)
    for generation, _ in reversed(found):
        found_wrong = find_problems(generation.path)
        if not found_wrong:
            return generation
        log.warning("passing over a damaged checkpoint: %s", found_wrong[0])
    if found:
        raise Damaged(f"{checkpoint.root(run_dir)}: none of its {len(found)} checkpoints is whole; start a new run")
    return None


def _held_generations(run_dir: Path) -> list[tuple[checkpoint.Generation, checkpoint.Hold]]:
    """The complete checkpoints of a run, oldest first, each held so that a run that trains on does not prune it."""
    held = [(generation, checkpoint.hold(generation.path)) for generation in checkpoint.generations(run_dir)]
    return [(generation, hold) for generation, hold in held if hold is not None]


def restore(
    path: Path, host: Host, images: Mapping[int, int], fingerprints: Sequence[Fingerprint] = ()
) -> dict[str, Any]:
    """Put the shared parts and this rank's clients back as they were; `path` is the folder of a checkpoint.

    Returns the header of its global.h5. UserError if the configuration or the images have changed, Damaged if a file is
    not sound.
    """
    arrays, saved, _ = checkpoint.read_generation(path)
    before = check_global(path, saved, described(arrays))
    check_same(path, saved, host.trainer.config, images, fingerprints)
    own = [c.index for c in host.clients] if has_client_files(before) else []
    states = checkpoint.read_clients(path, saved, own)
    for part, span in host.slices.items():
        _fill(host.shared[span], arrays, f"parts/{part}", path / "global.h5")
    for name, tensor in host.federation.items():
        _fill(tensor, arrays, f"state/{name}", path / "global.h5")
    if len(frozen := host.trainer.buckets.frozen):
        _fill(frozen, arrays, "frozen", path / "global.h5")
    for client, state in zip(host.clients, states, strict=False):
        _restore_client(host, client, state, path / checkpoint.client_file(client.index))
    return saved


def _restore_client(host: Host, client: Client, arrays: Mapping[str, np.ndarray], file: Path) -> None:
    tensors = host.state(client)
    for name, tensor in tensors.items():
        if name != "private":
            _fill(tensor, arrays, name, file)
    if host.trainer.config.run.keep_local and "local" in arrays:  # of a client that the next round does not select
        client.trained = torch.from_numpy(arrays["local"])
    for part in host.trainer.private_parts:
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


def check_same(
    path: Path,
    saved: Mapping[str, Any],
    config: Config,
    images: Mapping[int, int],
    fingerprints: Sequence[Fingerprint] = (),
) -> None:
    """UserError unless the checkpoint whose global.h5 has this header is of the run that is configured now."""
    _check_same_run(path, saved, config)
    if not config.data.changed:
        _check_same_images(path, saved, images, fingerprints, config)


def _check_same_run(path: Path, saved: Mapping[str, Any], config: Config) -> None:
    before, now = flat(to_dict(from_dict(saved["config"]))), flat(to_dict(config))
    fields = [n for n in {**before, **now} if not n.startswith(MAY_CHANGE)]
    changed = [n for n in fields if before.get(n) != now.get(n)]
    if changed:
        told = ", ".join(f"{n} (was {before.get(n)!r}, is {now.get(n)!r})" for n in changed)
        raise UserError(f"--resume: {path} was made with other values of {told}; set them back or start a new run")


def _check_same_images(
    path: Path,
    saved: Mapping[str, Any],
    images: Mapping[int, int],
    fingerprints: Sequence[Fingerprint],
    config: Config,
) -> None:
    """UserError if the images are others than those that the checkpoint was trained on, as far as it tells."""
    remedy = "give the same data, start a new run, or go on with these once with --data.changed true"
    if saved["images"] != [images[client] for client in sorted(images)]:
        raise UserError(
            f"data.root: the clients had {saved['images']} images when {path} was made, now they have "
            f"{[images[client] for client in sorted(images)]}; {remedy}"
        )
    before, data = saved.get("fingerprints", []), config.data
    if not before and (data.limit is not None or data.dataset not in ("embedded", "fashion-mnist")):
        raise UserError(
            f"data.limit: {path} is of an older fdiff, which took the first images and resized them otherwise; {remedy}"
        )
    for client, (then, now) in enumerate(zip(before, fingerprints, strict=False)):
        if changed := [kind for kind in now if then.get(kind) != now[kind]]:
            whose = f"client {client}'s images" if len(fingerprints) > 1 else "the images"
            raise UserError(
                f"data.root: {whose} have other {' and '.join(changed)} than when {path} was made; {remedy}"
            )


def changed_arithmetic(saved: Mapping[str, Any], config: Config) -> str:
    """The fields, with both values, that now have the run compute in other digits than before; "" if there are none."""
    before, now = flat(to_dict(from_dict(saved["config"]))), flat(to_dict(config))
    return ", ".join(f"{n} (was {before[n]!r}, is {now[n]!r})" for n in ARITHMETIC if before[n] != now[n])


def described(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array."""
    return {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
