"""The package's federated training against the sequential float64 oracle, and against centralised training.

The measure: for each tensor of each client's whole model, the largest |a - b| over the tensor in units of the
tensor's scale, which is its largest |b|, or 0.01 if that is less (the biases of norms start at 0 and come to
about 0.001); b is the oracle's. Whatever is wrong with a weight, a part, a batch or a moment moves elements by
about a learning rate, 1e-4, in those units 1e-4 to 1e-2.

A float64 run is held to 1e-10 in every element. In float32 a few elements say nothing: Adam, when fresh, steps by
the learning rate in the direction of the gradient's sign, which is a matter of rounding where the gradient is next
to zero (a thousandth of the tensor's root mean square). The oracle marks those, less than 2 % of all; they are held
to the two learning rates a round by which they may differ, all others to 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from ranks import train_in_turn
from torch import Tensor

from fdiff import config as cfg
from fdiff import seeds
from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.data import open_source
from fdiff.data.partition import partition_indices
from fdiff.federation.rounds import run
from fdiff.federation.saved import open_checkpoint
from fdiff.model.buckets import arena_order, layout_of
from fdiff.model.building import build_model
from fdiff.model.unet import PARTS

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("full", "usplit", "ulatdec", "udec")
BOUND = {"float64": 1e-10, "float32": 1e-5}
SMALLEST_SCALE = 0.01
CPU = torch.device("cpu")

# Steps of 12 images: 1, 3, 1 and 1 in an epoch, all but the last client's with a short batch; very unequal weights.
SIZES = (10, 28, 10, 12)
BASE = Config(
    federation=cfg.FederationConfig(clients=4, rounds=3, local_epochs=2),
    data=cfg.DataConfig(image_side=8, limit=60, partition="quantity-skew", seed=4),
    model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=4),
    optim=cfg.OptimConfig(batch_size=12),
    sample=cfg.SampleConfig(every=0),
    run=cfg.RunConfig(seed=11),
)


@pytest.fixture
def one_thread():
    """Tensors this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configure(method: str, fraction: float = 1.0, keep_optimizer: bool = False, ema: float = 0.0) -> Config:
    federation = replace(BASE.federation, fraction=fraction, keep_optimizer=keep_optimizer)
    return replace(BASE, method=method, federation=federation, optim=replace(BASE.optim, ema=ema))


VARIANTS = {
    **{method: configure(method) for method in METHODS},
    **{f"{method}-half": configure(method, fraction=0.5) for method in METHODS},
    "full-kept-ema": configure("full", keep_optimizer=True, ema=0.9),
    "encoder+decoder-half-ema": configure("encoder+decoder", fraction=0.5, ema=0.9),
    "udec-half-kept-ema": configure("udec", fraction=0.5, keep_optimizer=True, ema=0.9),
}


def shards(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Images (n_k, C, S, S) uint8 and labels of each client."""
    source, data = open_source(config.data, "train"), config.data
    cut = partition_indices(source.labels, data.partition, config.federation.clients, data.beta, data.seed)
    return [(source.images(indices), torch.from_numpy(source.labels[indices])) for indices in cut]


def initial_weights(config: Config) -> oracle.Weights:
    return oracle.renamed(dict(build_model(config).named_parameters()), config)


@cache
def expected(config: Config) -> list[oracle.Model]:
    """What the oracle makes of it; the same for every precision."""
    images, labels = zip(*shards(config), strict=True)
    return oracle.run(config, initial_weights(config), list(images), list(labels))


def trained(config: Config, ema: bool = False) -> list[oracle.Weights]:
    """Each client's model after the last round, from the run's checkpoint, under the oracle's names."""
    saved = open_checkpoint(config.run_dir)
    assert saved.round == config.federation.rounds
    order = arena_order(PARTS, oracle.SHARED[config.method])
    layout = sorted(layout_of(build_model(config)), key=lambda slot: order.index(slot.part))
    private = len(oracle.SHARED[config.method]) < 3
    models = []
    for client in range(config.federation.clients):
        flat = saved.parameters(client if private else None, ema)
        pieces = flat.split([slot.numel for slot in layout])
        named = {slot.name: p.view(slot.shape) for slot, p in zip(layout, pieces, strict=True)}
        models.append(oracle.renamed(named, config))
    return models


def difference(config: Config, got: list[oracle.Weights], expected: list[oracle.Weights], fragile: oracle.Weights):
    """The measure of this file's docstring, over all clients and tensors."""
    worst = 0.0
    for weights, theirs in zip(got, expected, strict=True):
        assert weights.keys() == theirs.keys()
        for name, b in theirs.items():
            off = (weights[name] - b).abs()
            if config.runtime.precision == "float32":
                off = settled(off, fragile[name], 2 * config.optim.lr * config.federation.rounds)
            worst = max(worst, (off.max() / max(b.abs().max(), SMALLEST_SCALE)).item())
    return worst


def settled(off: Tensor, fragile: Tensor, limit: float) -> Tensor:
    """The differences without the fragile elements', which have a limit of their own."""
    assert off[fragile].le(limit).all()
    return off.masked_fill(fragile, 0)


def fragile(models: list[oracle.Model]) -> oracle.Weights:
    """Where any client met a gradient next to zero in the first step of a fresh Adam."""
    trained = [m.fragile for m in models if m.fragile]
    return {name: torch.stack([marks[name] for marks in trained]).any(0) for name in trained[0]}


def prepare(config: Config, precision: str, tmp_path: Path) -> Config:
    runtime = replace(config.runtime, precision=precision, threads=1)
    return replace(config, runtime=runtime, run=replace(config.run, dir=str(tmp_path / "run")))


def check(config: Config, models: list[oracle.Model]) -> None:
    """Hold the run of this configuration against the oracle's, moving averages included."""
    bound, marks = BOUND[config.runtime.precision], fragile(models)
    assert difference(config, trained(config), [m.weights for m in models], marks) <= bound
    if config.optim.ema:
        assert difference(config, trained(config, ema=True), averages(config, models), marks) <= bound


def averages(config: Config, models: list[oracle.Model]) -> list[oracle.Weights]:
    """The clients' moving averages, with the last round's mean of them in the shared parts."""
    _, reporters = oracle.who(config, config.federation.rounds)
    mean = oracle.mean_of_parts([m.average for m in models], reporters, [len(m.images) for m in models])
    return [m.average | mean for m in models]


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        ("usplit", "float64"),
        ("usplit", "float32"),
        ("udec", "float64"),
        *(pytest.param(v, "float64", marks=pytest.mark.slow) for v in VARIANTS if v not in ("usplit", "udec")),
        *(pytest.param(v, "float32", marks=pytest.mark.slow) for v in VARIANTS if v != "usplit"),
    ],
)
def test_a_federation_is_the_oracles(variant, precision, tmp_path):
    config = prepare(VARIANTS[variant], precision, tmp_path)
    run(config, SoloCommunicator(), CPU)
    check(config, expected(VARIANTS[variant]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.rare), 4])  # more ranks, more ways to differ
def test_a_federation_on_several_ranks_is_the_oracles(ranks, tmp_path):
    cases = [(method, "float64") for method in METHODS]
    cases += [("usplit", "float32"), ("udec-half-kept-ema", "float64")]
    configs = [prepare(VARIANTS[v], precision, tmp_path / str(i)) for i, (v, precision) in enumerate(cases)]
    train_in_turn(configs, ranks, tmp_path)
    for (variant, _), config in zip(cases, configs, strict=True):
        check(config, expected(VARIANTS[variant]))


def test_the_comparison_means_something():
    """Shards as they are said to be, every tensor far from where it started, few elements left out."""
    config = VARIANTS["usplit"]
    models, start = expected(config), initial_weights(config)
    assert tuple(len(m.images) for m in models) == SIZES
    left_out = sum(marks.sum().item() for marks in fragile(models).values())
    assert 0 < left_out < 0.02 * sum(p.numel() for p in start.values())
    for name, p in start.items():
        moved = (models[0].weights[name] - p).abs().median() / max(p.abs().max(), SMALLEST_SCALE)
        assert moved > 10 * BOUND["float32"], name


def centralised(config: Config) -> dict[str, Tensor]:
    """Ordinary training in ordinary torch, a fresh Adam every E epochs, with the draws of client 0."""
    [(images, _)] = shards(config)
    model, fed, size = build_model(config).to(torch.float32), config.federation, config.optim.batch_size
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    signal, noise = products.sqrt().float(), (1 - products).sqrt().float()
    for round in range(1, fed.rounds + 1):
        shuffling = seeds.torch_stream(config.run.seed, "shuffling", 0, round)
        draws = seeds.torch_stream(config.run.seed, "noise", 0, round)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr)
        for _ in range(fed.local_epochs):
            for batch in torch.randperm(len(images), generator=shuffling).split(size):
                x0 = images[batch].float() / 127.5 - 1
                t = torch.randint(1000, (len(x0),), generator=draws)
                epsilon = torch.randn(x0.shape, generator=draws)
                x = signal[t].view(-1, 1, 1, 1) * x0 + noise[t].view(-1, 1, 1, 1) * epsilon
                optimizer.zero_grad()
                torch.nn.functional.smooth_l1_loss(model(x, t), epsilon).backward()
                optimizer.step()
    return dict(model.named_parameters())


def test_one_client_is_centralised_training_bit_for_bit(tmp_path):
    one = replace(BASE, federation=replace(BASE.federation, clients=1), data=replace(BASE.data, limit=70))
    config = prepare(one, "float32", tmp_path)
    run(config, SoloCommunicator(), CPU)
    [got] = trained(config)
    for name, tensor in oracle.renamed(centralised(config), config).items():
        assert torch.equal(got[name], tensor), name
