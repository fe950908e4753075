"""A client's shard: its images in the device's memory where they fit, else read by loader processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fdiff.data.loaders import PATIENCE_S, load
from fdiff.data.sources import Source
from fdiff.errors import UserError
from fdiff.runtime import free_memory, heed_stop

FILL_BATCH = 256  # images read at once while a shard is brought to its device


class Shard:
    """The images of `source` at `indices` (n,), of one client, on `device`.

    `in_memory` as `data.in_memory`; `auto` weighs the images against the memory that is free at this moment.
    `workers` processes decode image files (0: this one does) and are given up after `patience_s` without a batch.
    `labels` is (n,), int64, on the host.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        device: torch.device,
        *,
        in_memory: Literal["auto", "always", "never"] = "auto",
        workers: int = 2,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self._device, self._workers, self._patience_s = torch.device(device), workers, patience_s
        self.labels = torch.from_numpy(source.labels[self._indices])
        self._device_labels = self.labels.to(self._device)
        keep = in_memory == "always" or (in_memory == "auto" and 2 * self._bytes <= free_memory(self._device))
        self._images = self._fill() if keep else None
        if not keep and source.decodes:
            self._decode_all()

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def in_memory(self) -> bool:
        """Whether the images are in the device's memory."""
        return self._images is not None

    @property
    def _bytes(self) -> int:
        return len(self) * math.prod(self._source.shape) * self._source.dtype.itemsize

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, C, S, S) of the source's type and labels int64 (b,), on the device, at positions `order` (m,).

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
            images = torch.empty(len(self), *self._source.shape, dtype=self._source.dtype, device=self._device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"data.in_memory: {len(self)} images take {self._bytes / 2**30:.1f} GiB, more than "
                f"is free on {self._device}; use auto or never"
            ) from None
        workers = self._workers if self._source.decodes else 0
        order, start = np.argsort(self._indices, kind="stable"), 0  # what lies together is read together
        for batch in self._load(order, FILL_BATCH, workers):
            places = torch.from_numpy(order[start : start + len(batch)]).to(self._device)
            images.index_copy_(0, places, batch)
            start += len(batch)
        return images

    def _decode_all(self) -> None:
        """Find out now whether an image is unfit, and not after hours of training."""
        for _ in self._load(np.argsort(self._indices, kind="stable"), FILL_BATCH, self._workers):
            pass

    def _load(self, order: np.ndarray, batch_size: int, workers: int) -> Iterator[Tensor]:
        """The images at positions `order` batch by batch, on the device."""
        rows = self._indices[order]
        cuts = [rows[cut : cut + batch_size] for cut in range(0, len(rows), batch_size)]
        for batch in load(self._source.images, self._source.name, cuts, workers, self._patience_s):
            heed_stop()
            if self._device.type == "cuda":
                batch = batch.pin_memory()
            yield batch.to(self._device, non_blocking=True)
