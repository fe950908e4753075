"""Where a run begins: from weights of others, and with only some parts trained. Held against the files themselves."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from jobs import TINY, arrays, fdiff, on_ranks
from safetensors.torch import load_file, save_file

from fdiff import load_model
from fdiff.comm import SoloCommunicator
from fdiff.config import (
    Config,
    DataConfig,
    FederationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    SampleConfig,
)
from fdiff.config_file import options_in
from fdiff.errors import UserError
from fdiff.federation import forecast_run, initial, memory_of_rank, open_checkpoint, run, save_model
from fdiff.federation.assemble import set_up_rank
from fdiff.model import build_model, frozen_parts, parts_of, sizes_of
from fdiff.plan import shared_parts

CPU = torch.device("cpu")
BASE = Config(
    method="udec",
    federation=FederationConfig(clients=2, rounds=1, local_epochs=1),
    data=DataConfig(image_side=8, limit=16),
    model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=4),
    optim=OptimConfig(batch_size=8, ema=0.5),
    sample=SampleConfig(every=0),
)


def at(config: Config, folder: Path, **model: object) -> Config:
    return replace(config, run=RunConfig(dir=str(folder)), model=replace(config.model, **model))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run whose clients keep private parts, a run of one model, and an export of each."""
    folder = tmp_path_factory.mktemp("done")
    for method in ("udec", "full"):
        run(at(replace(BASE, method=method), folder / method), SoloCommunicator(), CPU)
        saved = open_checkpoint(folder / method)
        save_model(folder / f"{method}.safetensors", saved, 1 if method == "udec" else None, True)
    return folder


def state(config: Config) -> dict[str, torch.Tensor]:
    """What a rank begins with, by parameter name."""
    return dict(set_up_rank(config, SoloCommunicator(), CPU).host.trainer.model.named_parameters())


def test_a_run_begins_with_the_weights_that_it_is_told(done):
    for given, file in (
        ({"init": "udec.safetensors"}, "udec"),
        ({"init": "udec", "init_client": 1}, "udec"),  # its moving average, as fdiff sample draws
        ({"init": "udec/checkpoints/round-000001", "init_client": 1}, "udec"),
        ({"init": "full"}, "full"),
    ):
        config = at(BASE, done / "new", **{**given, "init": str(done / given["init"])})
        expected = load_file(done / f"{file}.safetensors")
        begun = state(config)
        assert begun.keys() == expected.keys()
        assert all(torch.equal(begun[name], expected[name]) for name in expected), given


def test_all_that_a_client_keeps_begins_there_too(done):
    config = at(BASE, done / "new", init=str(done / "full.safetensors"))
    rank = set_up_rank(config, SoloCommunicator(), CPU)
    flat = rank.host.trainer.buckets.flat
    for client in rank.host.clients:
        kept = rank.host.state(client)
        assert torch.equal(kept["ema"], flat) and torch.equal(kept["private"], flat[: len(kept["private"])])
    assert torch.equal(rank.host.shared, flat[len(kept["private"]) :])


def test_it_is_read_again_until_there_is_a_checkpoint_and_then_never(done, tmp_path):
    file = tmp_path / "begin.safetensors"
    shutil.copy(done / "full.safetensors", file)
    config = at(replace(BASE, federation=replace(BASE.federation, rounds=2)), tmp_path / "run", init=str(file))
    run(config, SoloCommunicator(), CPU)
    half = replace(config, run=RunConfig(dir=str(tmp_path / "half")))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("")  # as a start leaves it that was killed in its first round
    run(replace(half, federation=BASE.federation), SoloCommunicator(), CPU, resume=True)
    file.unlink()
    shutil.copytree(tmp_path / "half", tmp_path / "moved")  # this process has locked the other
    run(replace(half, run=RunConfig(dir=str(tmp_path / "moved"))), SoloCommunicator(), CPU, resume=True)
    one, two = arrays(tmp_path / "run", 2), arrays(tmp_path / "moved", 2)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert f"init: {file}" in (tmp_path / "moved" / "config.yaml").read_text()
    with pytest.raises(UserError, match="begin.safetensors: is not there"):
        run(replace(config, run=RunConfig(dir=str(tmp_path / "third"))), SoloCommunicator(), CPU)


def test_weights_that_do_not_fit_are_listed(done, tmp_path):
    def refused(told: str, **model: object) -> str:
        with pytest.raises(UserError, match=told) as raised:
            initial.read_initial(at(BASE, tmp_path / "new", **model))
        assert str(raised.value).startswith("model.init") and "\n" not in str(raised.value)
        return str(raised.value)

    full, udec = str(done / "full.safetensors"), str(done / "udec")
    for path in (full, str(done / "full")):
        wide = refused("does not fit the model", init=path, dim=16)
        assert "encoder.stem.weight (4, 1, 7, 7), the model (10, 1, 7, 7)" in wide and " more; give" in wide
    deep = refused("it has no encoder.stages.1.down.weight", init=full, dim_mults=(1, 2, 2))
    assert "more; give the model's settings" in deep
    assert "encoder.label.weight (5, 32)" in refused("it has no", init=full, classes=5)
    refused("head_dim 4, this run 2", init=full, heads=8, head_dim=2)  # of which no shape speaks
    refused("is of model.kind unet, this run of unet2d", init=full, kind="unet2d")
    refused("model.init_client: None is not valid; with udec each client has its own model: 0 to 1", init=udec)
    refused("model.init_client: 2 is not valid", init=udec, init_client=2)
    refused("model.init_client: 0 is not valid; full has one", init=str(done / "full"), init_client=0)
    refused("model.init_client: 0 is not valid; .* is no run of fdiff", init=full, init_client=0)
    refused("nowhere: is not there; give a file of fdiff export", init=str(tmp_path / "nowhere"))
    refused("is none of these; give a file", init=str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused("cannot be read as safetensors .*pickled weights are never read", init=str(tmp_path / "weights.bin"))
    spoilt = load_file(full)
    spoilt["decoder.out.bias"][0] = torch.nan
    save_file(spoilt, tmp_path / "nan.safetensors")
    refused("nan.safetensors: decoder.out.bias is not finite", init=str(tmp_path / "nan.safetensors"))
    halves = {name: tensor.half() for name, tensor in load_file(full).items()}
    save_file({**halves, "more": torch.ones(1)}, tmp_path / "more.safetensors")
    refused("more .1,., which the model lacks", init=str(tmp_path / "more.safetensors"))
    save_file({"decoder.out.bias": torch.ones(1, dtype=torch.int32)}, tmp_path / "whole.safetensors")
    refused("decoder.out.bias is I32; weights are one of F16", init=str(tmp_path / "whole.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((done / "full.safetensors").read_bytes()[:-10])
    refused("cut.safetensors: cannot be read", init=str(tmp_path / "cut.safetensors"))


def test_no_value_is_read_of_weights_that_do_not_fit(done, monkeypatch):
    for read in ("load_file", "read_checkpoint"):
        monkeypatch.setattr(initial, read, lambda *_: pytest.fail("read"))
    for path in ("full.safetensors", "full"):
        with pytest.raises(UserError, match="does not fit"):
            initial.read_initial(at(BASE, done / "new", init=str(done / path), dim=16))


def test_a_folder_of_diffusers_is_where_its_own_unet_begins(tmp_path):
    theirs = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "pipe" / "unet")
    options = options_in(tmp_path / "pipe" / "unet" / "config.json", "unet2d")
    config = at(BASE, tmp_path / "run", kind="unet2d", options=options, init=str(tmp_path / "pipe"))
    begun, expected = state(config), theirs.state_dict()
    assert begun.keys() == expected.keys() and all(torch.equal(begun[name], expected[name]) for name in expected)
    other = at(config, tmp_path / "run", options={**options, "norm_eps": 1e-5})
    with pytest.raises(UserError, match="it has norm_eps 1e-06, this run 1e-05; give --model.config"):
        initial.read_initial(other)
    file = tmp_path / "pipe" / "unet" / initial.DIFFUSERS_WEIGHTS
    old = {n.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn."): w for n, w in load_file(file).items()}
    save_file(old, file)  # as they were called before 2023
    assert state(config).keys() == expected.keys()
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors but diffusion_pytorch_model.bin; "):
        initial.read_initial(config)


def _go_in(rank: int) -> None:
    os.chdir(f"rank-{rank}")


def test_two_ranks_begin_alike_or_not_at_all(done, tmp_path):
    request = ["train", *TINY, "--model.head_dim", 4, "--federation.rounds", 1, "--model.train", "bottleneck+decoder"]
    request += ["--runtime.reduction", "ordered", "--runtime.timeout_s", 30, "--model.init"]
    for name, command in (("one", fdiff), ("two", partial(on_ranks, 2))):
        command(*request, done / "full", "--run.dir", name, cwd=tmp_path)
    one, two = arrays(tmp_path / "one", 1), arrays(tmp_path / "two", 1)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    weights = load_file(done / "full.safetensors")
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
        weights["decoder.out.bias"] += rank
        save_file(weights, tmp_path / f"rank-{rank}" / "begin.safetensors")
    ends = on_ranks(2, *request, "begin.safetensors", "--run.dir", tmp_path / "new", cwd=tmp_path, before=_go_in)
    assert [end.status for end in ends] == [2, 2]
    said = "".join(end.err for end in ends)
    assert said.count("\n") == 1 and "the weights of model.init: " in said and "on rank 0, " in said


# --- parts that are trained ----------------------------------------------------------------------------------------


def train_only(parts: str, method: str = "full", kind: str = "unet") -> Config:
    return replace(BASE, method=method, model=replace(BASE.model, train=parts, kind=kind))


def test_only_the_named_parts_are_trained_sent_and_counted(tmp_path):
    config = at(train_only("decoder+bottleneck", "udec"), tmp_path / "run")
    assert config.model.train == "bottleneck+decoder" and train_only("encoder+decoder+bottleneck").model.train is None
    run(config, SoloCommunicator(), CPU)
    fresh = dict(build_model(config).named_parameters())
    found = arrays(tmp_path / "run", 1)
    first = torch.cat([p.reshape(-1) for name, p in fresh.items() if name.startswith("encoder.")])
    assert np.array_equal(found["global/frozen"], first.detach().numpy())
    names = {name for name in found if name.split("/")[1] in ("parts", "private")}
    assert names == {"global/parts/decoder", "client-0000/private/bottleneck", "client-0001/private/bottleneck"}
    sizes = sizes_of(replace(config, model=replace(config.model, train=None)))
    assert len(found["client-0000/ema"]) == sizes["bottleneck"] + sizes["decoder"]
    cost = forecast_run(config, 2)
    total = {"total": sizes["bottleneck"] + sizes["decoder"]}
    assert cost["parameters"] == {part: sizes[part] for part in ("bottleneck", "decoder")} | total
    assert cost["bytes_by_purpose"]["parameters"] == 2 * 4 * sizes["decoder"]
    all_trained = replace(config, model=replace(config.model, train=None))
    saved = 4 * (memory_of_rank(all_trained, 0, 2).model - memory_of_rank(config, 0, 2).model) // 16
    assert saved == 4 * sizes["encoder"]  # no gradient, two moments and average; it itself stays
    save_model(tmp_path / "one.safetensors", open_checkpoint(tmp_path / "run"), 0, True)
    whole, again = load_model(tmp_path / "one.safetensors")
    assert again.model == config.model
    assert all(torch.equal(p, fresh[name]) for name, p in whole.named_parameters() if name.startswith("encoder."))


@pytest.mark.parametrize(
    ("train", "method", "shares"),
    [
        ("decoder", "full", "decoder"),
        ("decoder", "ulatdec", "decoder"),
        ("encoder+decoder", "usplit", "encoder+decoder"),
    ],
)
def test_a_method_shares_what_is_trained_of_its_parts(train, method, shares):
    config = train_only(train, method)
    assert "+".join(shared_parts(method, parts_of(config), frozen_parts(config))) == shares
    assert forecast_run(config, 2)["wire_bytes"] > 0


@pytest.mark.parametrize(("train", "method"), [("encoder", "udec"), ("encoder", "ulatdec"), ("decoder", "encoder")])
def test_a_method_that_shares_only_what_is_frozen_is_refused(train, method, tmp_path):
    with pytest.raises(UserError, match=f"method: {method} shares only .*, of which model.train has nothing trained"):
        run(at(train_only(train, method), tmp_path / "run"), SoloCommunicator(), CPU)


@pytest.mark.parametrize(
    ("train", "told"),
    [("tail", "'tail'; the parts are encoder, bottleneck, decoder"), ("", "a part ''"), ("decoder+decoder", "twice")],
)
def test_parts_that_are_none_are_refused(train, told):
    with pytest.raises(UserError, match=f"model.train: .*{told}"):
        train_only(train)


def test_parts_of_ones_own_model_are_frozen_alike(monkeypatch):
    from fdiff import registry

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
            self.parts = {"body": [self.a], "head": [self.b]}

    monkeypatch.setitem(registry._registered["model.kind"], "own", lambda shape, model: Own())
    config = train_only("head", kind="own")
    assert parts_of(config) == ("head",) and frozen_parts(config) == ("body",) and sizes_of(config) == {"head": 2}
    with pytest.raises(UserError, match="model.train: the model has no part 'tail'; its parts are body, head"):
        sizes_of(train_only("tail", kind="own"))
    with pytest.raises(UserError, match="method: body shares only body"):
        forecast_run(train_only("head", "body", "own"), 2)


def test_bf16_and_a_frozen_part_train_too():
    config = replace(train_only("decoder"), runtime=RuntimeConfig(precision="bf16"))
    trainer = set_up_rank(config, SoloCommunicator(), CPU).host.trainer
    before = trainer.buckets.frozen.clone(), trainer.buckets.flat.clone()
    trainer.step(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(trainer.buckets.frozen, before[0]) and not torch.equal(trainer.buckets.flat, before[1])
