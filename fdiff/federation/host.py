"""The clients of one rank: one is in the trainer, the state of the others is parked on the host.

One client a rank, the normal case, never moves: its parameters are the trainer's buckets, and what is averaged is
averaged there in place. With more, each in turn enters the trainer: the shared parts come from a copy of the global
ones, everything else from the client's own tensors on the host. The device then holds two copies of the shared parts
beside the trainer, whatever the number of clients; the host holds each client's private state.

What is parked is also what a checkpoint writes, without another copy: the host then holds that state twice, as it was
when the round was complete and as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fdiff.federation.client import Client, Trainer
from fdiff.federation.compressed import begin_federation


class Host:
    """The trainer and the clients that share it. `shared` (n,) are the current global parameters, on the device.

    `federation` is what all ranks keep alike beside them: see `compressed`.
    """

    def __init__(self, trainer: Trainer, clients: list[Client]) -> None:
        self.trainer, self.clients = trainer, clients
        self._parts = trainer.shared_parts
        buckets = trainer.buckets
        self._shared_span = buckets.span(self._parts)
        self._private = buckets.flat[: self._shared_span.start]
        self._resident = clients[0]
        self._parked = False  # whether what the resident has parked is what it has in the trainer
        self._in_place = len(clients) == 1
        self.shared = buckets.flat[self._shared_span]
        self.federation = begin_federation(trainer.config, buckets.layout, self._parts, self.shared)
        if not self._in_place:
            self.shared, self._next = (self.shared.clone() for _ in range(2))
            for client in clients[1:]:
                client.parked = {name: _host_copy(t) for name, t in self._working().items()}

    @property
    def slices(self) -> dict[str, slice]:
        """The range of each shared part within `shared`."""
        spans = {part: self.trainer.buckets.span((part,)) for part in self._parts}
        start = self._shared_span.start
        return {part: slice(s.start - start, s.stop - start) for part, s in spans.items()}

    @property
    def alone(self) -> bool:
        """Whether this rank has one client, whose parameters are averaged where they are trained."""
        return self._in_place

    def start(self) -> Tensor:
        """The global parameters (n,) with which a round begins, where training and averaging leave them."""
        return self.shared.clone() if self._in_place else self.shared

    def left_out(self, client: int) -> Tensor:
        """What compression has left out so far of a hosted client's reports (n,), wherever it is now."""
        return self.state(next(c for c in self.clients if c.index == client))["left-out"]

    @property
    def average(self) -> Tensor:
        """Where this round's average is to be built; it becomes `shared` by `adopt_average`."""
        return self.shared if self._in_place else self._next

    def adopt_average(self) -> None:
        """The average is complete: from now on it is what every client's shared parts are."""
        if not self._in_place:
            self.shared, self._next = self._next, self.shared
            self._resident_shared().copy_(self.shared)

    def enter(self, client: Client) -> Tensor:
        """Bring a client into the trainer, with the global shared parts; returns its shared parts (n,), to train."""
        if client is not self._resident:
            self._park()
            for name, tensor in self._working().items():
                tensor.copy_(client.parked[name], non_blocking=True)
            self._resident = client
        self._parked = False
        if not self._in_place:
            self._resident_shared().copy_(self.shared)
        if self.trainer.anchor is not None:
            self.trainer.anchor.copy_(self.shared)
        return self.shared if self._in_place else self._resident_shared()

    def set_aside(self, client: Client, parameters: Tensor) -> None:
        """If the run keeps them, copy a client's shared parts (n,) as it trained them: averaging may overwrite them."""
        if self.trainer.config.run.keep_local:
            client.trained = _host_copy(parameters)

    def lend(self, client: Client) -> dict[str, Tensor]:
        """A client's own tensors on the host, which stay as they are until all are lent anew.

        They are complete when the device has been waited for. What was lent before must not be needed any more.
        """
        client.lent = False
        if client is self._resident:
            self._park()
        client.lent = True
        return client.parked

    def state(self, client: Client) -> dict[str, Tensor]:
        """A client's own tensors: `private` (m,) and those of `Trainer.working`, wherever they are now."""
        return self._working() if client is self._resident else client.parked

    @contextmanager
    def undoing(self, client: Client) -> Iterator[None]:
        """If the block fails, the client's own tensors are again what they were before it."""
        kept = {name: tensor.clone() for name, tensor in self.state(client).items()}
        try:
            yield
        except Exception:
            for name, tensor in self.state(client).items():
                tensor.copy_(kept[name])
            raise

    @contextmanager
    def using_parameters(self, flat: Tensor) -> Iterator[None]:
        """Inside the block the model has these parameters (P,); afterwards its own again."""
        own = self.trainer.buckets.flat
        kept = own.clone()
        own.copy_(flat)
        try:
            yield
        finally:
            own.copy_(kept)

    def parameters(self, client: int | None, ema: Tensor | None) -> Tensor:
        """A whole model (P,): a hosted client's, by its index, or the global one (None) where no part is private.

        Its shared parts are the global ones, or with `ema` (n,) that average, and so are its private parts.
        """
        shared = self.shared if ema is None else ema
        owner = self.clients[0] if client is None else next(c for c in self.clients if c.index == client)
        state = self.state(owner)
        private = state["private"] if ema is None else state["ema"][: self._shared_span.start]
        return torch.cat((private.to(shared.device), shared))

    @property
    def moving_averages(self) -> dict[int, Tensor]:
        """Each client's own moving average (P,), wherever it is now."""
        return {client.index: self.state(client)["ema"] for client in self.clients}

    def shared_range(self, flat: Tensor) -> Tensor:
        """The shared range (n,) of something the size of a model (P,), on the device."""
        return flat[self._shared_span].to(self.shared.device)

    def _resident_shared(self) -> Tensor:
        return self.trainer.buckets.flat[self._shared_span]

    def _working(self) -> dict[str, Tensor]:
        return {"private": self._private, **self.trainer.working}

    def _park(self) -> None:
        client, working = self._resident, self._working()
        if self._parked:
            return
        if client.lent:
            client.parked, client.spare, client.lent = client.spare, client.parked, False
        if not client.parked:
            client.parked = {n: torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for n, t in working.items()}
        for name, tensor in working.items():
            client.parked[name].copy_(tensor, non_blocking=True)
        self._parked = True


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu()
    return copy.pin_memory() if tensor.is_cuda else copy.clone()
