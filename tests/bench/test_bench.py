"""The measurements: what they print, that they hold the right things side by side, and counts; never how fast."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from jobs import fdiff, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from fdiff.bench import checkpoint, measure, no_training, roofline, round, scale
from fdiff.bench.measure import compare, in_turns
from fdiff.comm import SoloCommunicator
from fdiff.config import CompressionConfig, Config, OptimConfig
from fdiff.data import Shard, open_source
from fdiff.federation.client import Client, Trainer
from fdiff.model import diffusion
from fdiff.presets import mini

CPU = torch.device("cpu")
SMALL = """--preset mini --model.dim 8 --model.dim_mults [1,2] --optim.batch_size 8 --runtime.threads 1
    --sample.batch_size 4 --diffusion.timesteps 60 --sample.steps 50""".split()


class Ops(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# --- the frame -----------------------------------------------------------------------------------------------------


def test_a_result_is_a_median_and_a_spread_beside_a_median():
    row = compare("x", [1.0, 2.0, 3.0, 4.0, 10.0], [1.5, 2.5], "bound", "ms").as_json()
    assert row == {"name": "x", "ours": 3.0, "bound": 2.0, "ratio": 1.5, "unit": "ms", "median": 3.0, "spread": 2.0}


@pytest.mark.parametrize("number", [0, 1])  # of the rank, if there were two
def test_what_compression_costs_a_rank_is_a_part_of_the_round(tmp_path, number):
    run = replace(mini().run, dir=str(tmp_path / "run"))
    config = replace(mini(), compression=CompressionConfig(kind="quantize"), run=run)
    with no_training.federation(no_training.quiet(config, 2), SoloCommunicator(), CPU) as federation:
        federation.rank = replace(federation.rank, placement=(number, number))
        before = federation.rank.host.shared.clone()
        round._compression(federation)["compression"]()
        assert torch.equal(federation.rank.host.shared, before)


def test_actions_take_turns_and_each_is_first_once():
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = in_turns(actions, SoloCommunicator(), CPU, repeats=3, warmup=1)
    assert {name: len(series) for name, series in taken.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"


def test_the_machine_is_described_and_its_name_is_not():
    about = measure.machine(SoloCommunicator(), CPU)
    assert about["ranks"] == 1 and about["torch"] == torch.__version__ and "host" not in about


# --- counts --------------------------------------------------------------------------------------------------------


def test_products_are_counted_by_hand():
    with roofline.Counter() as counter:
        torch.randn(6, 4) @ torch.randn(4, 5)
        torch.conv2d(torch.randn(2, 3, 8, 8), torch.randn(7, 3, 3, 3), padding=1)
    assert [work.flops for work in counter.work] == [2 * 6 * 4 * 5, 2 * (2 * 7 * 8 * 8) * 3 * 3 * 3]


def without_optimizer(trainer: Trainer) -> None:
    """On a CPU Adam looks at its count of steps, which there is on the host anyway."""
    trainer._optimizer.step = lambda: None


def test_a_training_step_asks_the_device_for_nothing_and_the_optimizer_sees_one_tensor():
    trainer = Trainer(replace(mini(), optim=OptimConfig(batch_size=4)), CPU)
    images, labels = torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    assert [len(group["params"]) for group in trainer._optimizer._adam.param_groups] == [1]
    without_optimizer(trainer)
    with Ops() as ops:
        trainer.step(images, labels)
    assert ops.calls["_local_scalar_dense"] == 0


def test_an_epoch_waits_for_the_device_once():
    config = replace(mini(), optim=OptimConfig(batch_size=4))
    trainer = Trainer(replace(config, federation=replace(config.federation, local_epochs=1)), CPU)
    asked = []
    without_optimizer(trainer)
    for images in (8, 32):
        client = Client(0, Shard(open_source(config.data, "train"), range(images), CPU))
        with Ops() as ops:
            trainer.prepare(client, 1)
            trainer.train(client, 1)
        asked.append(ops.calls["_local_scalar_dense"])
    assert asked[0] == asked[1] <= 4  # at the end: are the losses finite, their mean, are the parameters finite


def test_a_sampling_step_asks_the_device_for_nothing():
    trainer, config = Trainer(mini(), CPU), mini()
    asked = []
    for steps in (3, 9):
        table = diffusion.make_sampler(config.diffusion, replace(config.sample, steps=steps))
        with Ops() as ops:
            diffusion.sample(trainer.model, table, 1, torch.arange(2), (1, 16, 16))
        asked.append(ops.calls["_local_scalar_dense"])
    assert asked[0] == asked[1]


# --- the commands --------------------------------------------------------------------------------------------------


def results(printed: str) -> dict[str, dict]:
    """The results by name, after a look at what every one has to have."""
    report = json.loads(printed.strip().splitlines()[-1])
    assert set(report) == {"results", "machine"} and report["machine"]["cores"] >= 1
    for row in report["results"]:
        beside = (set(row) & {"baseline", "bound"}).pop()
        assert set(row) == {"name", "ours", beside, "ratio", "unit", "median", "spread"}
        assert row["ratio"] == pytest.approx(row["ours"] / row[beside])
    return {row["name"]: row for row in report["results"]}


@pytest.mark.slow
@pytest.mark.rare  # hundreds of steps; what a step computes is held against the oracle in test_parity.py
def test_step_and_sample(tmp_path):
    step = results(fdiff("bench", "step", "--json", *SMALL, cwd=tmp_path).check().out)
    (loss,) = [row for name, row in step.items() if name.startswith("loss after 200 steps")]
    assert loss["ratio"] == pytest.approx(1, abs=1e-4)
    assert len(step) == 3
    sample = results(fdiff("bench", "sample", "--json", *SMALL, cwd=tmp_path).check().out)
    assert [name.split(",")[0] for name in sample] == ["ddpm-60", "ddim-50"]


@pytest.mark.slow
def test_round_on_two_ranks_and_not_on_one(tmp_path):
    ranks = on_ranks(2, "bench", "round", "--json", *SMALL, cwd=tmp_path, before=measure_small_models)
    found = results("".join(rank.check().out for rank in ranks))
    whole = [name for name in found if " of " not in name]
    assert [name.split(",")[0] for name in whole] == ["full"] * 3 + ["usplit", "ulatdec", "udec"]
    for name in whole:
        parts = [found[f"{part} of {name}"] for part in ("all-reduce", "vote", "log line", "copy")]
        assert found[f"weights of {name}"]["ours"] > 0
        assert found[name]["bound"] == pytest.approx(sum(part["ours"] for part in parts))
    assert not list(tmp_path.glob("runs/.bench*"))
    alone = fdiff("bench", "round", *SMALL, cwd=tmp_path)
    assert alone.status == 2 and "1 rank has nothing to send" in alone.err


def measure_small_models(rank: int) -> None:
    round.WIDTHS = (8, 24)


def small(**more: object) -> Config:
    model = replace(mini().model, dim=8, dim_mults=(1, 2))
    federation = replace(mini().federation, keep_optimizer=False)
    return replace(mini(), model=model, federation=federation, optim=OptimConfig(batch_size=2), **more)


def test_checkpoint_writes_as_many_bytes_as_its_bound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "WIDTHS", (8,))
    monkeypatch.setattr(checkpoint, "REST_S", 0.0)
    monkeypatch.setattr(checkpoint, "STALLS", 2)
    written = []
    real = checkpoint._writer
    monkeypatch.setattr(checkpoint, "_writer", lambda path, size, comm: written.append(size) or real(path, size, comm))
    commit, stall = checkpoint.run(small(), SoloCommunicator(), CPU)
    assert commit.name.startswith("commit, 0.1 M parameters, 8 clients") and stall.beside > 0
    trainer = Trainer(small(method="udec"), CPU)
    private = sum(trainer.buckets.sizes[part] for part in ("encoder", "bottleneck"))
    assert written == [4 * (8 * private + trainer.buckets.sizes["decoder"])]


def test_scale_finds_the_memory_that_the_budget_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale, "CLIENTS", (1, 2, 5, 9))
    found = {result.name: result for result in scale.run(small(), SoloCommunicator(), CPU)}
    assert sum(name.startswith("round, ") for name in found) == 4
    assert found["host memory of 9 clients"].ratio == 1
