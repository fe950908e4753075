"""Three rounds of compressed averages beside an independent one in float64, in loops over clients and values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fdiff import seeds
from fdiff.comm import SoloCommunicator
from fdiff.compression import Exchange, first_factors
from fdiff.config import CompressionConfig
from fdiff.federation.compressed import CompressedAggregation
from fdiff.model import Slot
from fdiff.plan import neighbours, plan_round, shared_parts

CLIENTS, SEED, DROPPED = 5, 3, {2: (1,)}  # in round 2 client 1 is dropped, if it is selected
WEIGHTS = {0: 10, 1: 30, 2: 20, 3: 5, 4: 35}
LAYOUT = [
    Slot("encoder.a", "encoder", 0, (8, 3, 2)), Slot("encoder.b", "encoder", 48, (9,)),
    Slot("bottleneck.a", "bottleneck", 0, (7, 7)), Slot("decoder.a", "decoder", 0, (6, 9)),
    Slot("decoder.b", "decoder", 54, (6,)),
]  # fmt: skip
SIZES = {"encoder": 57, "bottleneck": 49, "decoder": 60}
KINDS = {
    "quantize": CompressionConfig(kind="quantize", levels=5, block=16),
    "quantize, error feedback": CompressionConfig(kind="quantize", levels=5, block=16, error_feedback=True),
    "random-k": CompressionConfig(kind="random-k", fraction=0.2),
    "random-k, error feedback": CompressionConfig(kind="random-k", fraction=0.2, error_feedback=True),
    "top-k": CompressionConfig(kind="top-k", fraction=0.2),
    "top-k without": CompressionConfig(kind="top-k", fraction=0.2, error_feedback=False),
    "low-rank": CompressionConfig(kind="low-rank", rank=2),
}


def trained(client: int, round: int, start: np.ndarray) -> np.ndarray:
    """What a client makes of the parameters: any function of them will do."""
    random = np.random.default_rng([client, round])
    return 0.9 * start + 0.1 * random.normal(size=len(start)) * (client + 1)


class Oracle:
    """The same federation in NumPy, value by value."""

    def __init__(self, config: CompressionConfig, slices: dict[str, slice]) -> None:
        self.config, self.slices = config, slices
        n = max(span.stop for span in slices.values())
        self.shared, self.left = np.zeros(n), [np.zeros(n) for _ in range(CLIENTS)]
        self.q = {}
        start = 0
        factors = first_factors([s for s in LAYOUT if s.part in slices], config.rank, SEED).double().numpy()
        for slot in LAYOUT:
            if slot.part in slices and (shape := self.matrix(slot)):
                self.q[slot.name] = factors[start : start + shape[1] * config.rank].reshape(shape[1], config.rank)
                start += shape[1] * config.rank

    def matrix(self, slot: Slot) -> tuple[int, int] | None:
        n, m = slot.shape[0], math.prod(slot.shape[1:])
        return (n, m) if len(slot.shape) > 1 and self.config.rank * (n + m) < n * m else None

    def round(self, plan, number: int) -> None:
        updates = {c: trained(c, number, self.shared) - self.shared for c in plan.selected}
        noise = {}
        if self.config.kind == "quantize":
            for c in plan.selected:
                noise[c] = seeds.torch_stream(SEED, "quantize parameters", c, number)
        new = self.shared.copy()
        for part, reporters in plan.reporters.items():
            span, total = self.slices[part], sum(WEIGHTS[c] for c in reporters)
            w = {c: WEIGHTS[c] / total for c in reporters}
            x = {
                c: w[c] * (updates[c][span] + (self.left[c][span] if self.config.feeds_back else 0)) for c in reporters
            }
            kind = self.config.kind.replace("-", "_")
            arrived, sent = getattr(self, kind)(part, x, number, noise)
            new[span] = self.shared[span] + arrived
            if self.config.feeds_back:
                for c in reporters:
                    self.left[c][span] = (x[c] - sent[c]) / w[c]
        self.shared = new

    def quantize(self, part, x, number, noise):
        k, block, n = self.config.levels, self.config.block, SIZES[part]
        blocks = -(-n // block)
        chance = {}
        for c in x:
            drawn = torch.empty(blocks * block // 4, dtype=torch.int64).random_(-(2**63), None, generator=noise[c])
            chance[c] = ((drawn.numpy().view(np.int16).astype(float) + 32768.5) / 65536).reshape(blocks, block)
        arrived, sent = np.zeros(n), {c: np.zeros(n) for c in x}
        for i in range(n):
            b = i // block
            s = max(np.abs(x[c][b * block : (b + 1) * block]).max() for c in x)
            for c in x:
                if s > 0:
                    level = math.floor((x[c][i] / s + 1) * (k - 1) / 2 + chance[c][b, i % block])
                    sent[c][i] = -s + 2 * s * min(level, k - 1) / (k - 1)
                    arrived[i] += sent[c][i]
        return arrived, sent

    def random_k(self, part, x, number, noise):
        n = SIZES[part]
        m = math.ceil(self.config.fraction * n - 1e-9)
        at = torch.randperm(n, generator=seeds.torch_stream(SEED, f"positions {part}", round=number))[:m].tolist()
        sent = {c: np.array([x[c][i] if i in at else 0 for i in range(n)]) for c in x}
        return sum(sent.values()) * (1 if self.config.feeds_back else n / m), sent

    def top_k(self, part, x, number, noise):
        m = math.ceil(self.config.fraction * SIZES[part] - 1e-9)
        sent = {}
        for c in x:
            largest = sorted(range(len(x[c])), key=lambda i: -abs(x[c][i]))[:m]
            sent[c] = np.array([x[c][i] if i in largest else 0 for i in range(len(x[c]))])
        return sum(sent.values()), sent

    def low_rank(self, part, x, number, noise):
        arrived, sent = sum(x.values()), {c: x[c].copy() for c in x}
        for slot in (s for s in LAYOUT if s.part == part):
            if shape := self.matrix(slot):
                where = slice(slot.offset, slot.offset + math.prod(shape))
                matrices = {c: x[c][where].reshape(shape) for c in x}
                p, _ = np.linalg.qr(sum(matrices.values()) @ self.q[slot.name])
                self.q[slot.name] = sum(m.T @ p for m in matrices.values())
                arrived[where] = (p @ self.q[slot.name].T).ravel()
                for c in x:
                    sent[c][where] = (p @ (matrices[c].T @ p).T).ravel()
        return arrived, sent


@pytest.mark.parametrize("fraction", [1.0, 0.6])
@pytest.mark.parametrize("method", ["full", "usplit", "decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_are_the_oracles(kind, method, fraction):
    config, shared = KINDS[kind], shared_parts(method)
    starts = np.cumsum([0, *(SIZES[part] for part in shared)])
    slices = {part: slice(int(a), int(b)) for part, a, b in zip(shared, starts, starts[1:], strict=False)}
    oracle = Oracle(config, slices)
    layout = [slot for slot in LAYOUT if slot.part in shared]
    shares = torch.zeros(int(starts[-1]), dtype=torch.float64)
    left = [torch.zeros_like(shares) for _ in range(CLIENTS)]
    factors = first_factors(layout, config.rank, SEED).double()
    for number in range(1, 4):
        plan = plan_round(method, CLIENTS, number, SEED, fraction)
        dropped = [c for c in DROPPED.get(number, ()) if c in plan.selected]
        exchange = Exchange(SoloCommunicator(), config, layout, SEED, number, factors=factors)
        averaging = CompressedAggregation(
            plan, WEIGHTS, shares.clone(), shares, slices, neighbours(CLIENTS, 1), exchange, "parameters", False,
            left.__getitem__ if config.feeds_back else None,
        )  # fmt: skip
        for client in plan.selected:
            if client not in dropped:
                averaging.add(client, torch.from_numpy(trained(client, number, oracle.shared)))
        before = oracle.shared
        assert np.allclose(before, shares.numpy(), rtol=0, atol=1e-6)
        averaging.finish(dropped)
        oracle.round(plan.without(dropped), number)
        # The scale of a level is rounded in the dtype of the noise where levels are few.
        assert np.abs(oracle.shared - shares.numpy()).max() < 1e-6, number
        if config.feeds_back:
            assert max(np.abs(a - b.numpy()).max() for a, b in zip(oracle.left, left, strict=True)) < 1e-6
