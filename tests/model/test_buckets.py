"""Flat buckets: parameters and gradients stay views of them, whatever happens to the model."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from fdiff.config import Config, DataConfig, ModelConfig
from fdiff.errors import RunError
from fdiff.model.buckets import Buckets, layout_of
from fdiff.model.building import build_model
from fdiff.model.unet import PARTS

CONFIG = Config(data=DataConfig(image_side=8), model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8))


@pytest.fixture
def buckets() -> Buckets:
    return Buckets(build_model(CONFIG), PARTS)


def train_a_step(buckets: Buckets) -> None:
    x = torch.randn(2, 1, 8, 8, dtype=buckets.flat.dtype)
    buckets.model(x, torch.tensor([3, 7])).square().mean().backward()
    flat = torch.nn.Parameter(buckets.flat)
    flat.grad = buckets.grad
    torch.optim.Adam([flat], fused=True).step()


def test_values_and_order_are_the_models(buckets):
    fresh = build_model(CONFIG)
    expected = torch.cat([p.reshape(-1) for part in PARTS for p in fresh.get_submodule(part).parameters()])
    assert torch.equal(buckets.flat, expected)
    assert list(buckets.sizes) == list(PARTS)
    for part in PARTS:
        assert torch.equal(buckets.part(part), torch.cat([p.reshape(-1) for p in getattr(fresh, part).parameters()]))


def test_parameters_and_gradients_share_storage_after_training_moving_and_loading(buckets):
    buckets.check_shared()
    before = buckets.flat.clone()
    train_a_step(buckets)
    buckets.check_shared()
    assert not torch.equal(buckets.flat, before)
    assert buckets.grad.abs().sum() > 0
    moved = buckets.flat.clone()
    buckets.to("cpu", torch.float64)
    buckets.check_shared()
    assert buckets.flat.dtype == torch.float64 and torch.equal(buckets.flat, moved.double())
    train_a_step(buckets)
    buckets.check_shared()
    buckets.model.load_state_dict(build_model(CONFIG).double().state_dict())
    buckets.check_shared()
    assert torch.equal(buckets.flat, before.double())


def test_writing_a_bucket_writes_the_parameters(buckets):
    buckets.part("decoder").fill_(2)
    assert all((p == 2).all() for p in buckets.model.decoder.parameters())
    assert not any((p == 2).all() for p in buckets.model.encoder.parameters())


def test_a_model_moved_behind_the_buckets_back_is_noticed(buckets):
    buckets.model.double()
    with pytest.raises(RunError, match=r"parameter of encoder\.\S+ no longer shares storage"):
        buckets.check_shared()


def test_a_gradient_set_to_none_is_noticed(buckets):
    buckets.model.zero_grad(set_to_none=True)
    with pytest.raises(RunError, match="gradient of"):
        buckets.check_shared()


def test_spans_are_of_neighbours(buckets):
    sizes = buckets.sizes
    assert buckets.span(PARTS) == slice(0, sum(sizes.values()))
    assert buckets.span(("bottleneck", "decoder")) == slice(sizes["encoder"], sum(sizes.values()))
    assert buckets.span(()) == slice(0, 0)
    with pytest.raises(ValueError, match="neighbours"):
        buckets.span(("encoder", "decoder"))


@pytest.mark.parametrize("shared", [s for n in range(4) for s in combinations(PARTS, n)], ids="+".join)
def test_shared_parts_are_one_range_at_the_end_whichever_they_are(shared):
    model = build_model(CONFIG)
    buckets = Buckets(model, shared)
    span = buckets.span(shared)
    assert span.stop in (0, len(buckets.flat)) and span.stop - span.start == sum(buckets.sizes[p] for p in shared)
    expected = [p.detach().reshape(-1) for part in shared for p in getattr(model, part).parameters()]
    assert torch.equal(buckets.flat[span], torch.cat([torch.empty(0), *expected]))
    assert list(buckets.sizes) == list(PARTS) and buckets.layout == layout_of(model)


def test_what_is_frozen_is_in_a_tensor_of_its_own_and_never_trained():
    model = build_model(CONFIG)
    model.bottleneck.block1.requires_grad_(False)
    kept = [p.clone() for p in model.bottleneck.block1.parameters()]
    buckets = Buckets(model, ("decoder",))
    assert len(buckets.flat) + len(buckets.frozen) == sum(p.numel() for p in model.parameters())
    assert {slot.part for slot in buckets.frozen_layout} == {"bottleneck"}
    train_a_step(buckets)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.bottleneck.block1.parameters(), strict=True))
    buckets.frozen.fill_(3)
    assert all((p == 3).all() for p in model.bottleneck.block1.parameters())
    buckets.to("cpu", torch.float64)
    assert buckets.frozen.dtype == torch.float64 and (model.bottleneck.block1.net[1].weight == 3).all()
