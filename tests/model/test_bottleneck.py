"""Other bottlenecks: their sizes by hand, the maps that enter, what is refused. Their output: see `test_unet`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fdiff.config import Config, DataConfig, ModelConfig, from_dict, to_dict
from fdiff.errors import UserError
from fdiff.model import Buckets, build_model, diffusion, layout_of, parts_of, sizes_of
from fdiff.model.unet import Attention, Bottleneck, ConvNextBlock, PreNormResidual, UNet, gates

TINY = ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=4)
ODD = {"bottleneck_width": 0.5, "bottleneck_blocks": 3, "bottleneck_attention": "linear", "bottleneck_select": 0.4}


def config_of(model: ModelConfig) -> Config:
    return Config(data=DataConfig(image_side=8, channels=1), model=model)


def block(w: int, t: int) -> int:
    """Parameters of a block: time, 7×7, norm, 3×3, norm, 3×3."""
    return (t * w + w) + (49 * w + w) + 2 * w + (9 * w * 2 * w + 2 * w) + 4 * w + (9 * 2 * w * w + w)


def attention(w: int, h: int) -> int:
    """Parameters of softmax attention with a norm before it, h = heads · head_dim; a linear one has 2 · w more."""
    return 2 * w + 3 * h * w + (h * w + w)


def test_the_papers_bottleneck_is_what_it_was():
    """Names, order and the draws of the initial weights."""
    torch.manual_seed(3)
    parts = {"block1": ConvNextBlock(16, 16, 32), "attention": PreNormResidual(16, Attention(16, 2, 4))}
    parts["block2"] = ConvNextBlock(16, 16, 32)
    expected = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    torch.manual_seed(3)
    found = Bottleneck(16, 32, 2, 4).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sizes_of(Config()) == {"encoder": 1_280_642, "bottleneck": 999_376, "decoder": 716_297}


# The last width is 112, the time vector has 112, the heads together 128.
@pytest.mark.parametrize(
    "variant, expected",
    [
        ({}, 2 * block(112, 112) + attention(112, 128)),
        ({"bottleneck_width": 0.5}, 112 * 56 + 56 + 2 * block(56, 112) + attention(56, 128) + 56 * 112 + 112),
        ({"bottleneck_width": 2}, 112 * 224 + 224 + 2 * block(224, 112) + attention(224, 128) + 224 * 112 + 112),
        ({"bottleneck_width": 1e-9}, 112 * 1 + 1 + 2 * block(1, 112) + attention(1, 128) + 112 + 112),
        ({"bottleneck_width": 1.001}, 2 * block(112, 112) + attention(112, 128)),
        ({"bottleneck_blocks": 0}, attention(112, 128)),
        ({"bottleneck_blocks": 1}, block(112, 112) + attention(112, 128)),
        ({"bottleneck_blocks": 4}, 4 * block(112, 112) + attention(112, 128)),
        ({"bottleneck_attention": "linear"}, 2 * block(112, 112) + attention(112, 128) + 2 * 112),
        ({"bottleneck_attention": "none"}, 2 * block(112, 112)),
        ({"bottleneck_select": 0.3}, 112 + 2 * block(112, 112) + attention(112, 128)),
        (
            {"bottleneck_select": 0.3, "bottleneck_width": 0.25, "bottleneck_blocks": 0},
            112 + 112 * 28 + 28 + attention(28, 128) + 28 * 112 + 112,
        ),
    ],
    ids=str,
)
def test_sizes_are_those_by_hand(variant, expected):
    sizes = sizes_of(Config(model=ModelConfig(**variant)))
    assert sizes == {"encoder": 1_280_642, "bottleneck": expected, "decoder": 716_297}


@pytest.mark.parametrize(
    "blocks, names",
    [
        (0, ["attention"]),
        (1, ["block1", "attention"]),
        (3, ["enter", "block1", "block2", "attention", "block3", "leave"]),
        (4, ["block1", "block2", "attention", "block3", "block4"]),
    ],
)
def test_attention_follows_the_first_half_of_the_blocks(blocks, names):
    bottleneck = Bottleneck(8, 8, 1, 4, multiple=0.5 if "enter" in names else 1.0, blocks=blocks)
    assert [name for name, _ in bottleneck.named_children()] == names


@pytest.mark.parametrize(
    "share, width, count",
    [(0.5, 16, 8), (0.3, 16, 5), (1e-12, 16, 1), (0.07, 100, 7), (0.1, 30, 3), (0.071, 100, 8), (0.93, 16, 15)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exactly_so_many_maps_enter(share, width, count, dtype):
    bottleneck = Bottleneck(width, 8, 1, 4, select=share).to(dtype)
    random = torch.Generator().manual_seed(4)
    drawn = torch.randn(width, generator=random, dtype=torch.float64)
    for scores in (torch.zeros(width), drawn, drawn.round(), 1e30 * drawn, drawn.sign()):
        with torch.no_grad():
            bottleneck.scores.copy_(scores)
        open = gates(bottleneck.scores, bottleneck.selected)
        assert open.dtype == dtype and bottleneck.selected == count
        best = sorted(range(width), key=lambda i: (-bottleneck.scores[i].item(), i))[:count]  # of equal ones the first
        assert open.tolist() == [float(i in best) for i in range(width)]

    seen = []
    bottleneck.block1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    h = torch.randn(2, width, 3, 3, generator=random).to(dtype)
    bottleneck(h, torch.randn(2, 8, generator=random).to(dtype))
    closed = [i for i in range(width) if i not in best]
    assert torch.equal(seen[0][:, best], h[:, best]) and not seen[0][:, closed].any()


def test_all_maps_need_no_scores():
    for share in (1, 1.0, 0.97):  # of 16 maps
        assert Bottleneck(16, 8, 1, 4, select=share).scores is None


def test_the_gates_learn_as_a_sigmoid_would():
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    gates(scores, 2).backward(weight := torch.tensor([1.0, 2.0, -3.0, 4.0]))
    soft = scores.detach().sigmoid()
    torch.testing.assert_close(scores.grad, weight * soft * (1 - soft))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_selects_is_one_graph_to_the_compiler(precision):
    model = build_model(config_of(replace(TINY, **ODD)))
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([3, 900])
    schedule = diffusion.make_schedule(Config().diffusion, torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        plain = diffusion.loss(model, schedule, x, t, x)
        plain.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compiled = torch.compile(diffusion.loss, backend="aot_eager", fullgraph=True, dynamic=False)
        loss = compiled(model, schedule, x, t, x)
        loss.backward()
    assert plain.isfinite() and all(gradient.any() for gradient in expected)
    if precision is torch.float32:
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize(
    "variant",
    [ODD, {"bottleneck_blocks": 0}, {"bottleneck_attention": "none"}, {"bottleneck_width": 16.0}],
    ids=str,
)
def test_a_variant_is_built_laid_out_and_loaded_like_any_model(variant):
    config = config_of(replace(TINY, **variant))
    model, again = build_model(config), build_model(from_dict(to_dict(config)))
    assert isinstance(model, UNet) and parts_of(config) == ("encoder", "bottleneck", "decoder")
    assert sum(slot.numel for slot in layout_of(model)) == sum(p.numel() for p in model.parameters())
    buckets = Buckets(model, ("bottleneck",))
    with torch.no_grad():
        buckets.flat.add_(0.1)
    again.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(6)), torch.tensor([3, 900])
    assert torch.equal(model(x, t), again(x, t)) and math.isfinite(model(x, t).square().mean().item())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"bottleneck_width": 0}, "model.bottleneck_width: 0 is not valid; it must be greater than 0, and at most 16"),
        ({"bottleneck_width": 16.5}, "model.bottleneck_width: 16.5 is not valid"),
        ({"bottleneck_width": math.nan}, "model.bottleneck_width: nan is not valid"),
        ({"bottleneck_blocks": 5}, "model.bottleneck_blocks: 5 is not valid; it must be between 0 and 4"),
        ({"bottleneck_blocks": -1}, "model.bottleneck_blocks: -1 is not valid"),
        ({"bottleneck_blocks": 1.0}, "model.bottleneck_blocks: 1.0 is not valid; it must be of type int"),
        ({"bottleneck_attention": "full"}, "model.bottleneck_attention: 'full' is not valid; choose one of softmax, "),
        ({"bottleneck_select": 0.0}, "model.bottleneck_select: 0.0 is not valid; it must be in (0, 1]"),
        ({"bottleneck_select": 1.1}, "model.bottleneck_select: 1.1 is not valid"),
        (
            {"bottleneck_blocks": 0, "bottleneck_attention": "none", "bottleneck_width": 0.5},
            "model.bottleneck_blocks: 0 is not valid with model.bottleneck_attention none, since nothing would be left "
            "of the bottleneck; use --model.bottleneck_blocks 1 or --model.bottleneck_attention linear",
        ),
    ],
)
def test_bad_bottlenecks_are_refused_in_one_line(fields, words):
    with pytest.raises(UserError) as caught:
        from_dict({"model": fields})
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_model_of_ones_own_has_whatever_bottleneck_it_has():
    kind = {"kind": "somewhere:model", "bottleneck_blocks": 0, "bottleneck_attention": "none"}
    assert from_dict({"model": kind}).model.bottleneck_blocks == 0
