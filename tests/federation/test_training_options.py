"""Options of training: nothing where they are off, ordinary torch and diffusers where they are on, exact on resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jobs import TINY, arrays, fdiff, largest_difference, on_ranks
from torch import Tensor

from fdiff import seeds
from fdiff.bench.baseline import Loop, as_plain
from fdiff.checkpoint import Damaged
from fdiff.config import Config, DataConfig, DiffusionConfig, FederationConfig, ModelConfig, OptimConfig, SampleConfig
from fdiff.data import Shard, open_source
from fdiff.errors import UserError
from fdiff.federation.client import Client, Trainer
from fdiff.federation.host import Host
from fdiff.federation.local_optimizer import STEPS, clip, decay_at, rate_at
from fdiff.federation.validate import check_client, has_client_files
from fdiff.model import build_model, check_forward, describe_model, drop_labels, layout_of

CPU = torch.device("cpu")
BASE = Config(
    method="udec",
    federation=FederationConfig(clients=1, local_epochs=2),
    data=DataConfig(image_side=8, channels=1),
    model=ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=4),
    optim=OptimConfig(batch_size=4, lr=1e-3),
)
DOUBLE = replace(BASE, runtime=replace(BASE.runtime, precision="float64"))
IMAGES = 10  # in an epoch: two whole batches and a short one


def client_of(config: Config, index: int = 0) -> Client:
    return Client(index, Shard(open_source(config.data, "train"), range(IMAGES), CPU))


def trained(config: Config, rounds: int = 2) -> tuple[Trainer, list[float]]:
    """A trainer after so many rounds of one client, and the losses of all epochs."""
    trainer, client, losses = Trainer(config, CPU), client_of(config), []
    for round in range(1, rounds + 1):
        trainer.prepare(client, round)
        losses += trainer.train(client, round).losses
    return trainer, losses


# --- off


def test_options_that_come_to_nothing_change_no_bit():
    """A bound that is never reached, a warm-up of one step, a decay of less than the last bit."""
    nothing = replace(BASE.optim, warmup_steps=1, grad_clip=1e6, weight_decay=1e-200)
    (plain, losses), (other, same) = trained(BASE), trained(replace(BASE, optim=nothing))
    assert losses == same and torch.equal(plain.buckets.flat, other.buckets.flat)
    assert torch.equal(plain._noise.get_state(), other._noise.get_state())


def test_models_and_files_of_today_have_nothing_new():
    config = replace(BASE, model=replace(BASE.model, classes=10))
    assert describe_model(config).encoder.label.weight.shape == (10, 32)
    dropping = replace(config, model=replace(config.model, class_dropout=0.1))
    assert describe_model(dropping).encoder.label.weight.shape == (11, 32)
    assert not Trainer(BASE, CPU).working and not has_client_files(replace(BASE, method="full"))


# --- on


def ordinary(config: Config, rounds: int) -> tuple[dict[str, Tensor], list[float]]:
    """What anybody would write for the same training in float64: its parameters, and each step's loss."""
    images = open_source(config.data, "train").images(range(IMAGES)).double() / 127.5 - 1
    model, optim = build_model(config).double(), config.optim
    losses, taken = [], 0
    ac = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    signal, noise = ac.sqrt(), (1 - ac).sqrt()
    for round in range(1, rounds + 1):
        shuffling = seeds.torch_stream(config.run.seed, "shuffling", 0, round)
        draws = seeds.torch_stream(config.run.seed, "noise", 0, round)
        adam = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        rise = torch.optim.lr_scheduler.LambdaLR(adam, lambda t, before=taken: min(1, (before + t + 1) / 7))
        for _ in range(config.federation.local_epochs):
            for batch in torch.randperm(IMAGES, generator=shuffling).split(optim.batch_size):
                flips = torch.rand(len(batch), generator=draws) < 0.5
                x0 = torch.stack([x.flip(-1) if flip else x for x, flip in zip(images[batch], flips, strict=True)])
                t = torch.randint(1000, (len(x0),), generator=draws)
                epsilon = torch.randn(x0.shape, generator=draws).double()
                s, n = signal[t].view(-1, 1, 1, 1), noise[t].view(-1, 1, 1, 1)
                adam.zero_grad()
                loss = F.smooth_l1_loss(model(s * x0 + n * epsilon, t), s * epsilon - n * x0)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
                adam.step()
                rise.step()
                taken += 1
                losses.append(loss.item())
    return dict(model.named_parameters()), losses


def test_flips_warm_up_clipping_decay_and_v_are_those_of_ordinary_torch():
    optim = replace(BASE.optim, warmup_steps=7, grad_clip=0.3, weight_decay=0.1)
    config = replace(DOUBLE, optim=optim, data=replace(BASE.data, flip=True), diffusion=DiffusionConfig(objective="v"))
    trainer, _ = trained(config)
    expected, losses = ordinary(config, 2)
    assert int(trainer.working[STEPS]) == len(losses) == 12  # the warm-up ends within the second round
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-11)
    for off in ({"warmup_steps": 0}, {"grad_clip": None}, {"weight_decay": 0.0}):
        other, _ = trained(replace(config, optim=replace(optim, **off)))
        assert not torch.allclose(other.buckets.flat, trainer.buckets.flat, rtol=1e-6, atol=1e-8), off


def test_a_gradient_is_as_long_as_it_may_be_proximal_term_included():
    fed = replace(BASE.federation, proximal_mu=100.0)
    trainer = Trainer(replace(DOUBLE, federation=fed, optim=replace(BASE.optim, grad_clip=0.5)), CPU)
    trainer.anchor.zero_()
    trainer.step(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert trainer.buckets.grad.norm().item() == pytest.approx(0.5, rel=1e-6)
    short = torch.full((4,), 0.1)
    clip(short, 0.5)
    assert torch.equal(short, torch.full((4,), 0.1))
    broken = torch.tensor([1.0, float("inf")])
    clip(broken, 0.5)
    assert not broken.isfinite().all()  # which the round finds


def test_the_rate_rises_to_the_whole_one_and_stays():
    rates = [rate_at(OptimConfig(lr=0.3, warmup_steps=4), torch.tensor(t)).item() for t in (0, 1, 3, 4, 10**9)]
    assert rates == pytest.approx([0.075, 0.15, 0.3, 0.3, 0.3], rel=1e-15)


def test_the_average_is_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    optim = replace(BASE.optim, ema=0.6, ema_warmup=True)
    trainer = Trainer(replace(DOUBLE, optim=optim), CPU)
    trainer.prepare(client := client_of(DOUBLE), 1)
    flat = torch.nn.Parameter(trainer.buckets.flat)
    theirs = training_utils.EMAModel([flat], decay=0.6)
    for _ in range(16):  # 0.6 is reached after 12
        trainer.step(*next(iter(client.shard.batches(torch.arange(4), 4))))
        theirs.step([flat])
        torch.testing.assert_close(trainer.working["ema"], theirs.shadow_params[0].data, rtol=1e-12, atol=1e-14)
    assert theirs.cur_decay_value == 0.6
    for t in range(20):
        assert decay_at(optim, torch.tensor(t)).item() == pytest.approx(theirs.get_decay(t + 1), abs=1e-15)


def test_labels_are_dropped_as_often_as_asked_for_and_only_in_training(monkeypatch):
    model, stream = ModelConfig(classes=10, class_dropout=0.2), torch.Generator().manual_seed(0)
    labels = torch.arange(10_000) % 10
    dropped = drop_labels(labels, model, stream)
    lost = dropped == 10
    assert torch.equal(dropped[~lost], labels[~lost]) and abs(lost.float().mean().item() - 0.2) < 0.02
    seen: list[Tensor] = []
    trainer = Trainer(replace(BASE, model=replace(BASE.model, classes=10, class_dropout=0.5)), CPU)
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    trainer.prepare(client := client_of(BASE), 1)
    trainer.train(client, 1)
    assert len(seen) == 2 * 3 + 1 and {10} < set(torch.cat(seen[:-1]).tolist()) and 10 not in seen[-1]
    trainer.buckets.check_shared()
    assert trainer.buckets.grad.isfinite().all()


class OwnModel(torch.nn.Module):
    """A model of somebody's own that knows so many labels."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.label = torch.nn.Embedding(labels, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x + self.label(labels).view(-1, 1, 1, 1)


def test_a_model_of_ones_own_that_lacks_a_row_for_no_class_is_told_before_it_trains():
    config = replace(BASE, model=replace(BASE.model, classes=3, class_dropout=0.1))
    check_forward(OwnModel(config.model.label_rows), config)
    check_forward(OwnModel(3), replace(config, model=replace(config.model, class_dropout=0.0)))
    with pytest.raises(UserError, match="fails on images of .1, 8, 8. .IndexError: index out of range"):
        check_forward(OwnModel(3), config)


def test_the_plain_loop_of_the_benchmarks_follows_the_objective():
    every = replace(BASE.optim, warmup_steps=5, grad_clip=0.5, weight_decay=0.1, ema=0.9, ema_warmup=True)
    config = replace(
        BASE,
        optim=every,
        data=replace(BASE.data, flip=True),
        model=replace(BASE.model, classes=10, class_dropout=0.1),
        diffusion=DiffusionConfig(schedule="cosine", objective="v"),
        sample=SampleConfig(guidance=3.0),
    )
    config = as_plain(config)
    images = open_source(config.data, "train").images(range(IMAGES)).numpy()
    federation = replace(config.federation, local_epochs=1)
    _, losses = trained(replace(config, federation=federation), 1)
    plain = Loop(config, CPU, images).train(1, 1)
    assert losses[0] == pytest.approx(sum(n * x for n, x in zip((4, 4, 2), plain, strict=True)) / IMAGES, rel=1e-4)


# --- a client's steps over the whole run


def test_each_client_has_its_own_steps_and_one_that_fails_keeps_them(monkeypatch):
    config = replace(BASE, optim=replace(BASE.optim, warmup_steps=50))
    clients = [client_of(config, index) for index in range(3)]
    host = Host(Trainer(config, CPU), clients)

    def train(client: Client, round: int) -> None:
        host.enter(client)
        host.trainer.prepare(client, round)
        with host.undoing(client):
            host.trainer.train(client, round)

    for client, round in ((clients[0], 1), (clients[2], 1), (clients[0], 2)):
        train(client, round)
    monkeypatch.setattr(host.trainer, "_find_diverged", lambda *_: "the loss")
    with pytest.raises(Exception, match="after the last step the loss is not a finite number"):
        train(clients[2], 2)
    assert [int(host.state(client)[STEPS]) for client in clients] == [12, 0, 6]


def test_a_file_of_a_client_without_its_steps_is_damaged():
    config = replace(BASE, method="full", optim=replace(BASE.optim, warmup_steps=50))
    assert has_client_files(config)
    check_client(Path("client-0000.h5"), config, {STEPS: ((), "int64")})
    for found in ({}, {STEPS: ((), "float32")}, {STEPS: ((1,), "int64")}):
        with pytest.raises(Damaged, match="client-0000.h5: has no number of steps taken"):
            check_client(Path("client-0000.h5"), config, found)


EVERYTHING = """
--data.flip --optim.lr 1e-3 --optim.warmup_steps 7 --optim.grad_clip 0.5 --optim.weight_decay 0.1 --optim.ema 0.9
--optim.ema_warmup --diffusion.schedule cosine --diffusion.objective v --model.classes 10 --model.class_dropout 0.3
--sample.guidance 2 --federation.fraction 0.75 --federation.on_client_failure drop --runtime.reduction ordered
""".split()
ONLY_STEPS = "--optim.lr 1e-3 --optim.warmup_steps 7 --federation.fraction 0.75 --runtime.reduction ordered".split()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", ONLY_STEPS),
        pytest.param("udec", EVERYTHING, marks=pytest.mark.rare),  # the steps are all that is new of what is kept
    ],
)
def test_a_run_on_two_ranks_resumed_on_one_ends_as_one_never_stopped(tmp_path, method, options):
    """Clients sit out rounds, stop in the middle of their warm-up, and go on on another rank."""
    request = ["train", *TINY, *options, "--method", method, "--run.dir"]
    fdiff(*request, "one", cwd=tmp_path).check()
    for rank in on_ranks(2, *request, "two", "--federation.rounds", 2, cwd=tmp_path):
        rank.check()
    fdiff(*request, "two", "--resume", cwd=tmp_path).check()
    one, two = arrays(tmp_path / "one", 3), arrays(tmp_path / "two", 3)
    assert largest_difference(one, two) == 0
    steps = [int(one[f"client-{client:04d}/{STEPS}"]) for client in range(4)]
    assert sum(steps) == 3 * 3 * 2 and len(set(steps)) > 1  # rounds, clients, steps: not all were in each


# --- bad requests


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"optim": {"warmup_steps": -1}}, "optim.warmup_steps: -1 is not valid"),
        ({"optim": {"warmup_steps": 1.5}}, "optim.warmup_steps: 1.5 is not valid; it must be of type int"),
        ({"optim": {"grad_clip": 0.0}}, "optim.grad_clip: 0.0 is not valid; it must be greater than 0"),
        ({"optim": {"grad_clip": float("nan")}}, "optim.grad_clip: nan is not valid; it must be a finite number"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay: -0.1 is not valid"),
        ({"optim": {"ema_warmup": True}}, "optim.ema_warmup: is not valid with optim.ema 0; give --optim.ema"),
        ({"data": {"flip": 1}}, "data.flip: 1 is not valid; it must be of type bool"),
        (
            {"diffusion": {"schedule": "sigmoid"}},
            "diffusion.schedule: 'sigmoid' is not valid; choose one of linear",
        ),
        ({"diffusion": {"objective": "x0"}}, "diffusion.objective: 'x0' is not valid; choose one of noise, v"),
        ({"diffusion": {"schedule": "cosine"}}, "sample.clip: must be true with diffusion.schedule cosine and diffusi"),
        ({"model": {"class_dropout": 1.0, "classes": 2}}, "model.class_dropout: 1.0 is not valid; it must be in .0, 1"),
        ({"model": {"class_dropout": 0.1}}, "model.class_dropout: 0.1 is not valid with model.classes 0"),
        (
            {"model": {"classes": 2}, "sample": {"guidance": 2.0}},
            "sample.guidance: 2.0 is not valid with model.class",
        ),
        ({"sample": {"guidance": -1.0}}, "sample.guidance: -1.0 is not valid; it must be between 0 and 1000"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(fields, told):
    with pytest.raises(UserError, match=told) as refused:
        replace(BASE, **{group: replace(getattr(BASE, group), **those) for group, those in fields.items()})
    assert "\n" not in str(refused.value)


def test_what_needs_another_option_is_taken_with_it():
    cosine = DiffusionConfig(schedule="cosine", beta_start=0.5)  # beta_start is the linear schedule's
    assert replace(BASE, diffusion=cosine, sample=SampleConfig(clip=True)).diffusion == cosine
    assert replace(BASE, diffusion=replace(cosine, objective="v")).diffusion.objective == "v"
    assert layout_of(describe_model(replace(BASE, diffusion=replace(cosine, objective="v")))) == layout_of(
        describe_model(BASE)
    )
