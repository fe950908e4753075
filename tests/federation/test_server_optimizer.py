"""Server optimizers and FedProx: beside their equations in float64, exact on resume, the average where it is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_jobs import Job
from jobs import TINY, arrays, fdiff, largest_difference, on_ranks, rows

from fdiff.comm import agree
from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig, OptimConfig
from fdiff.errors import RunError, UserError
from fdiff.federation import Trainer
from fdiff.federation.server_optimizer import state_of, step

N, ROUNDS = 50, 4


def oracle(config: FederationConfig, start: np.ndarray, averages: list[np.ndarray], rate: float) -> list[np.ndarray]:
    """Reddi et al., algorithm 2, value by value."""
    found, mean, squares = [], np.zeros(N), np.full(N, config.server_tau**2)
    x = start.copy()
    for average in averages:
        for i in range(N):
            update = average[i] - x[i]
            if config.server == "momentum":
                mean[i] = config.server_beta1 * mean[i] + update
                x[i] += rate * mean[i]
                continue
            mean[i] = config.server_beta1 * mean[i] + (1 - config.server_beta1) * update
            if config.server == "adam":
                squares[i] = config.server_beta2 * squares[i] + (1 - config.server_beta2) * update**2
            else:
                squares[i] -= (1 - config.server_beta2) * update**2 * np.sign(squares[i] - update**2)
            x[i] += rate * mean[i] / (np.sqrt(squares[i]) + config.server_tau)
        found.append(x.copy())
    return found


@pytest.mark.parametrize("server", ["momentum", "adam", "yogi"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_four_rounds_are_the_equations(server, rate):
    config = FederationConfig(server=server, server_lr=rate, server_beta1=0.7, server_beta2=0.95, server_tau=0.02)
    random = np.random.default_rng(0)
    start = random.normal(size=N)
    averages = [start + 0.1 * random.normal(size=N) for _ in range(ROUNDS)]
    x = torch.from_numpy(start.copy())
    state = {name: torch.full((N,), value, dtype=torch.float64) for name, value in state_of(config).items()}
    for average, expected in zip(averages, oracle(config, start, averages, rate), strict=True):
        out = torch.from_numpy(average.copy())
        step(config, x, out, state)
        assert np.allclose(out.numpy(), expected, rtol=0, atol=1e-13)
        x = out


def test_momentum_without_momentum_is_the_average_to_the_bit():
    config = FederationConfig(server="momentum", server_beta1=0.0, server_lr=1.0)
    start, average = torch.randn(1000), torch.randn(1000)
    out, state = average.clone(), {name: torch.zeros(1000) for name in state_of(config)}
    for _ in range(3):
        step(config, start, out, state)
        assert torch.equal(out, average)


def test_proximal_pulls_the_shared_parts_and_is_not_in_the_loss():
    config = Config(
        method="udec",
        federation=FederationConfig(proximal_mu=0.5),
        data=DataConfig(image_side=8, channels=1),
        model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
        optim=OptimConfig(batch_size=4, lr=1e-2),
    )
    images, labels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    gradients, losses = [], []
    for of in (config, replace(config, federation=FederationConfig())):
        trainer = Trainer(of, torch.device("cpu"))
        if trainer.anchor is not None:
            trainer.anchor.copy_(trainer.buckets.flat[trainer._shared] - 3)
        trainer._noise.manual_seed(1)
        losses.append(float(trainer.step(images, labels)))
        gradients.append(trainer.buckets.grad.clone())
    assert losses[0] == losses[1]
    span = trainer.buckets.span(("decoder",))
    assert torch.allclose(gradients[0][span], gradients[1][span] + 0.5 * 3, atol=1e-5)
    private = slice(0, span.start)
    assert torch.equal(gradients[0][private], gradients[1][private])


class Two:
    """A communicator of two, of which the other one answers as it is told."""

    rank, size = 0, 2

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def exchange(self, value: bytes) -> list[bytes]:
        return [value, self.answer]


def test_ranks_whose_shared_parts_drift_apart_are_named():
    agree(Two(b'[null, {"the shared parts": 7}]'), facts={"the shared parts": 7})
    agree(Two(b"[null, {}]"), facts={"the shared parts": 7})
    with pytest.raises(RunError, match="the shared parts: rank 1 has another than rank 0; give all ranks"):
        agree(Two(b'[null, {"the shared parts": 8}]'), facts={"the shared parts": 7})


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_each_ends_alike_on_two_ranks_and_resumed_on_one_and_not_as_the_average(tmp_path: Path) -> None:
    request = ["train", *TINY, "--optim.lr", 1e-3, "--sample.every", 0, "--runtime.reduction", "ordered", "--run.dir"]
    fdiff(*request, "average", cwd=tmp_path).check()
    average = arrays(tmp_path / "average", 3)
    kinds = {
        "momentum": ["--federation.server", "momentum"],
        "yogi": ["--federation.server", "yogi", "--method", "usplit", "--federation.fraction", 0.75],
        "adam": ["--federation.server", "adam", "--federation.proximal_mu", 0.1, "--compression.kind", "quantize"],
    }
    for name, more in kinds.items():
        fdiff(*request, f"one-{name}", *more, cwd=tmp_path).check()
        for rank in on_ranks(2, *request, f"two-{name}", *more, "--federation.rounds", 2, cwd=tmp_path):
            rank.check()
        fdiff(*request, f"two-{name}", *more, "--resume", cwd=tmp_path).check()
        one, two = (arrays(tmp_path / f"{ranks}-{name}", 3) for ranks in ("one", "two"))
        assert largest_difference(one, two) == 0
        assert "global/state/server-mean" in one and ("global/state/server-squares" in one) == (name != "momentum")
        assert not np.array_equal(one["global/parts/decoder"], average["global/parts/decoder"])
    assert rows(tmp_path / "one-adam")[0]["wire_bytes"] == 0


def drift(rank: int) -> None:
    """Rank 1 rounds otherwise: its step ends a little elsewhere."""
    from fdiff.federation import server_optimizer

    honest = server_optimizer.step

    def step(config, start, average, state):
        honest(config, start, average, state)
        if rank == 1:
            average[0] += 1e-3

    server_optimizer.step = step


@pytest.mark.slow
def test_a_rank_that_drifts_is_named_at_the_next_vote(tmp_path: Path) -> None:
    job = Job(["train", *TINY, "--federation.server", "adam", "--run.dir", "run"], 2, tmp_path, drift)
    assert job.wait(60) and job.statuses() == [1, 1], job.said()
    assert len(job.errors()) == 1 and "the shared parts: rank 1 has another than rank 0" in job.errors()[0]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*")} <= {"round-000001"}  # rank 0's


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"server": "sgd"}, "federation.server: 'sgd' is not valid; choose one of average, momentum, adam, yogi"),
        ({"server_lr": 0.0}, "federation.server_lr: 0.0 is not valid"),
        ({"server_beta1": 1.0}, "federation.server_beta1: 1.0 is not valid"),
        ({"server_tau": 0.0}, "federation.server_tau: 0.0 is not valid"),
        ({"proximal_mu": -1.0}, "federation.proximal_mu: -1.0 is not valid"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        Config(federation=FederationConfig(**changes))
