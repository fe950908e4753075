"""The memory that a rank needs, held against what its tensors really take, and jobs that are refused for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jobs import TINY, in_turn

from fdiff.comm import SoloCommunicator
from fdiff.config import Config, FederationConfig, OptimConfig
from fdiff.data import Shard, open_source
from fdiff.errors import UserError
from fdiff.federation import assemble
from fdiff.federation.client import Client, Trainer
from fdiff.federation.host import Host
from fdiff.federation.memory import activations, memory_of_rank
from fdiff.federation.snapshot import HostCopies, contents
from fdiff.presets import mini

CPU = torch.device("cpu")


def host_of(config: Config) -> Host:
    """A rank that hosts all clients, each with one image."""
    source = open_source(config.data, "train")
    clients = [Client(i, Shard(source, [i], CPU)) for i in range(config.federation.clients)]
    return Host(Trainer(config, CPU), clients)


def small(method: str, clients: int, **more: object) -> Config:
    federation = FederationConfig(clients=clients, **more)
    return replace(mini(), method=method, federation=federation, optim=OptimConfig(ema=0.9, batch_size=4))


def kept(host: Host, copies: HostCopies) -> int:
    """Bytes of all host memory that the clients and a checkpoint hold on to, after rounds that trained everybody."""
    metrics = {"round": 1, "reporters": {}}
    for _ in range(3):
        for client in host.clients:
            host.enter(client)
        contents(host, {c.index: 1 for c in host.clients}, metrics, host.shared, None, {}, copies)
    tensors = [t for c in host.clients for memory in (c.parked, c.spare) for t in memory.values()]
    return sum(t.nbytes for t in [*tensors, *copies._kept.values()])


@pytest.mark.parametrize("method", ["full", "ulatdec", "udec"])
@pytest.mark.parametrize("clients", [1, 2, 7])
@pytest.mark.parametrize("keep", [False, True])
def test_the_host_holds_what_the_budget_says(method, clients, keep):
    config = small(method, clients, keep_optimizer=keep)
    held, budget = kept(host_of(config), HostCopies()), memory_of_rank(config, 0, 1).host
    steps = 4 * (2 * clients - 1) * keep  # the count of steps of a kept optimizer is not worth a line of the budget
    assert held - steps <= budget <= held


def test_what_the_device_holds_does_not_depend_on_the_number_of_clients():
    budgets = [memory_of_rank(small("udec", clients), 0, 1) for clients in (2, 5, 100)]
    assert len({b.device for b in budgets}) == 1
    assert budgets[2].clients / (2 * 100 - 1) == budgets[0].clients / (2 * 2 - 1)


def test_a_step_keeps_what_the_budget_says():
    """The tensors saved for the backward pass of a real step, in the layout of the CPU."""
    config = replace(mini(), optim=OptimConfig(batch_size=8))
    trainer, seen = Trainer(config, CPU), dict[int, torch.Tensor]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        images, labels = torch.zeros(8, 1, 16, 16, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
        trainer.step(images, labels)
    arena = trainer.buckets.flat.untyped_storage().data_ptr()
    held = sum(t.untyped_storage().nbytes() for address, t in seen.items() if address != arena)
    assert activations(config) == pytest.approx(held, rel=0.1)


def test_a_job_that_will_not_fit_is_refused_before_it_starts(monkeypatch):
    config = small("udec", 100)
    monkeypatch.setattr(assemble, "free_memory", lambda device: 10_000_000)
    with pytest.raises(UserError, match=r"needs at least \d\.\d GiB on .* together, where 0\.0 GiB are free; lower"):
        assemble.set_up_rank(config, SoloCommunicator(), CPU)


@pytest.mark.slow
def test_ranks_of_one_node_are_refused_together_and_once(tmp_path):
    request = ["train", *TINY, "--optim.batch_size", 2_000_000, "--run.dir", "run"]
    (ranks,) = in_turn(2, [request], tmp_path)
    assert [rank.status for rank in ranks] == [2, 2]
    lines = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("fdiff: error")]
    assert len(lines) == 1 and "GiB are free" in lines[0]
