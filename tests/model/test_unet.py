"""The UNet: its size to the last parameter, its output and gradients against the oracle's."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch

from fdiff.config import Config, DataConfig, ModelConfig
from fdiff.model.building import build_unet
from fdiff.model.unet import PARTS, UNet

TINY = ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=4)
# Of 16 maps at the last width: 3, 30 and 2 inside (with a single one, the norm takes out what time adds); 8, 5 and 1
# selected.
BOTTLENECKS = [
    {"bottleneck_width": 0.2},
    {"bottleneck_width": 1.9, "bottleneck_attention": "linear"},
    {"bottleneck_width": 0.1, "bottleneck_blocks": 3},
    {"bottleneck_blocks": 0},
    {"bottleneck_blocks": 0, "bottleneck_attention": "linear"},
    {"bottleneck_blocks": 1},
    {"bottleneck_blocks": 4, "bottleneck_select": 0.3},
    {"bottleneck_attention": "none"},
    {"bottleneck_select": 0.5},
    {"bottleneck_select": 0.001, "bottleneck_width": 2, "bottleneck_blocks": 1, "bottleneck_attention": "none"},
]


def make(model: ModelConfig, channels: int = 1) -> UNet:
    """A float64 UNet in which no parameter is 0 or 1, as norms are at first, so that each one matters."""
    unet = build_unet((channels, 8, 8), model).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return unet


def inputs(model: ModelConfig, channels: int, side: int, n: int = 3) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(n, channels, side, side, generator=random, dtype=torch.float64)
    t = torch.tensor([0, 999, 487])[:n]
    return x, t, torch.randint(model.classes, (n,), generator=random) if model.classes else None


def count(model: ModelConfig, channels: int = 1) -> dict[str, int]:
    with torch.device("meta"):
        unet = build_unet((channels, 8, 8), model)
    return {part: sum(p.numel() for p in unet.get_submodule(part).parameters()) for part in PARTS}


def test_the_papers_model_has_the_papers_parameters():
    sizes = count(ModelConfig(dim=28))
    assert sizes == {"encoder": 1_280_642, "bottleneck": 999_376, "decoder": 716_297}
    assert sum(sizes.values()) == 2_996_315


def test_three_channels_cost_a_wider_stem_and_output():
    grey, rgb = count(ModelConfig(dim=28)), count(ModelConfig(dim=28), channels=3)
    assert rgb["encoder"] - grey["encoder"] == 2 * 18 * 7 * 7  # 18 kernels for each further channel
    assert rgb["decoder"] - grey["decoder"] == 2 * (28 + 1)
    assert rgb["bottleneck"] == grey["bottleneck"]


def test_classes_cost_an_embedding_in_the_encoder():
    without, conditioned = count(ModelConfig(dim=28)), count(ModelConfig(dim=28, classes=10))
    assert conditioned == without | {"encoder": without["encoder"] + 10 * 4 * 28}


@pytest.mark.parametrize(
    ("model", "channels", "side"),
    [
        (TINY, 1, 8),
        (TINY, 1, 2),
        (TINY, 3, 6),
        (ModelConfig(dim=8, dim_mults=(1, 2, 4), heads=2, head_dim=4), 1, 12),
        (ModelConfig(dim=10, dim_mults=(2, 1, 3), heads=1, head_dim=8, classes=7), 3, 4),
        (ModelConfig(dim=6, dim_mults=(1,), heads=3, head_dim=2), 1, 5),
        (ModelConfig(dim=28, dim_mults=(1, 2, 4)), 1, 28),
        *[(replace(TINY, **variant), 1, 8) for variant in BOTTLENECKS],
    ],
    ids=str,
)
def test_output_is_the_oracles(model, channels, side):
    unet, (x, t, labels) = make(model, channels), inputs(model, channels, side)
    config = Config(model=model, data=DataConfig(image_side=side, channels=channels))
    weights = oracle.renamed(dict(unet.named_parameters()), config)
    assert len(weights) == len(list(unet.parameters()))
    with torch.no_grad():
        expected, got = oracle.unet(weights, config, x, t, labels), unet(x, t, labels)
    assert got.shape == x.shape
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("variant", [{}, *BOTTLENECKS], ids=str)
def test_every_parameter_has_a_gradient_and_it_is_the_oracles(variant):
    model = replace(TINY, classes=3, **variant)
    unet, (x, t, labels) = make(model), inputs(model, 1, 4)
    config = Config(model=model, data=DataConfig(image_side=4))
    weights = oracle.renamed(dict(unet.named_parameters()), config)
    leaves = [p.requires_grad_() for p in weights.values()]
    unet(x, t, labels).square().sum().backward()
    expected = torch.autograd.grad(oracle.unet(weights, config, x, t, labels).square().sum(), leaves)
    for (name, p), g in zip(unet.named_parameters(), expected, strict=True):
        assert g.abs().max() > 0, name
        assert (p.grad - g).abs().max() <= 1e-10 * g.abs().max(), name


def test_gradient_is_the_slope():
    """Central differences along random directions, a part at a time, and along the input."""
    unet, (x, t, labels) = make(TINY), inputs(TINY, 1, 4)
    random = torch.Generator().manual_seed(3)

    def value() -> torch.Tensor:
        return unet(x, t, labels).square().mean()

    for tensors in (*(list(unet.get_submodule(p).parameters()) for p in PARTS), [x.requires_grad_()]):
        gradients = torch.autograd.grad(value(), tensors)
        directions = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in tensors]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                for p, d in zip(tensors, directions, strict=True):
                    p += step * d
                ends.append(value())
            for p, d in zip(tensors, directions, strict=True):
                p += 1e-6 * d
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6, atol=1e-9)


def test_images_of_a_batch_do_not_meet():
    """Each image's output depends on its own pixels, timestep and label alone."""
    model = ModelConfig(dim=8, dim_mults=(1, 2), heads=2, head_dim=4, classes=5)
    unet, (x, t, labels) = make(model), inputs(model, 1, 8)
    with torch.no_grad():
        together = unet(x, t, labels)
        alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(len(x))])
        assert not torch.allclose(unet(x, t, (labels + 1) % 5), together, rtol=1e-3)
        assert not torch.allclose(unet(x, t.flip(0), labels), together, rtol=1e-3)
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
