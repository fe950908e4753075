"""A client's shard: its images in the device's memory where they fit, else read by loader processes."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdiff.data.sources import Source
from fdiff.errors import RunError, UserError, first_line
from fdiff.runtime import free_memory

FILL_BATCH = 256  # images read at once while a shard is brought to its device


class Shard:
    """The images of `source` at `indices` (n,), of one client, on `device`.

    `in_memory` as `data.in_memory`; `auto` weighs the images against the memory that is free at this moment.
    `workers` processes decode image files (0: this one does). `labels` is (n,), int64, on the host.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        device: torch.device,
        *,
        in_memory: Literal["auto", "always", "never"] = "auto",
        workers: int = 2,
    ) -> None:
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self._device, self._workers = torch.device(device), workers
        self.labels = torch.from_numpy(source.labels[self._indices])
        self._device_labels = self.labels.to(self._device)
        keep = in_memory == "always" or (in_memory == "auto" and 2 * self._bytes <= free_memory(self._device))
        self._images = self._fill() if keep else None

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def in_memory(self) -> bool:
        """Whether the images are in the device's memory."""
        return self._images is not None

    @property
    def _bytes(self) -> int:
        return len(self) * math.prod(self._source.shape)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (b, C, S, S) and labels int64 (b,), on the device, at positions `order` (m,).

        The last batch may be short. What comes is the same wherever the images are. The host waits for the
        device at most once, at the start; UserError if an image file is unfit.
        """
        on_device = order.to(self._device)
        cuts = range(0, len(order), batch_size)
        if self._images is not None:
            images: Iterator[Tensor] = (self._images.index_select(0, on_device[cut : cut + batch_size]) for cut in cuts)
        else:
            images = self._load(order.cpu().numpy(), batch_size, self._workers)
        for cut, batch in zip(cuts, images, strict=True):
            yield batch, self._device_labels.index_select(0, on_device[cut : cut + batch_size])

    def _fill(self) -> Tensor:
        """All images in one tensor on the device, read in blocks so that the host never holds them twice."""
        try:
            images = torch.empty(len(self), *self._source.shape, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"data.in_memory: {len(self)} images take {self._bytes / 2**30:.1f} GiB, more than "
                f"is free on {self._device}; use auto or never"
            ) from None
        workers = self._workers if self._source.decodes else 0
        start = 0
        for batch in self._load(np.arange(len(self)), FILL_BATCH, workers):
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def _load(self, order: np.ndarray, batch_size: int, workers: int) -> Iterator[Tensor]:
        """The images at positions `order` batch by batch, from a DataLoader, on the device."""
        rows = self._indices[order]
        cuts = [rows[cut : cut + batch_size] for cut in range(0, len(rows), batch_size)]
        loader = DataLoader(
            _Batches(self._source),
            batch_sampler=cuts,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context="fork" if workers else None,  # the source is inherited, not copied
            generator=torch.Generator(),  # or the loader would draw from torch's global one
        )
        try:
            for batch in _started(loader):
                if isinstance(batch, UserError):
                    raise batch
                yield batch.to(self._device, non_blocking=True)
        except RuntimeError as error:  # a worker that was killed
            raise RunError(f"loading {self._source.name} failed: {first_line(error)}") from error


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Its workers inherit what is blocked, from their first moment, and leave it to the rank.

    Launchers signal whole process groups; a worker that ended at once would fail the step that is to be finished.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Batches(Dataset):
    """Whole batches for a DataLoader. An error is a value: raised in a worker it comes with a traceback."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitems__(self, indices: np.ndarray) -> Tensor | UserError:
        try:
            return self._source.images(indices)
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
