"""diffusers' UNet in three parts: the same network, with options that are checked before anybody asks diffusers."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fdiff import config_unet2d
from fdiff.bench.baseline import Baseline
from fdiff.config import Config, DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, from_dict, to_dict
from fdiff.config_file import apply_config_file, as_yaml, options_in
from fdiff.errors import UserError
from fdiff.federation.client import Trainer
from fdiff.federation.memory import activations
from fdiff.model import PARTS, build_model, check_model, describe_model, diffusion, parts_of, sizes_of
from fdiff.model.building import build_unet2d
from fdiff.model.parts import parameters_by_part
from fdiff.presets import preset

DATA = DataConfig(image_side=8, channels=1)
SMALL = ModelConfig(kind="unet2d", dim=8, dim_mults=(1, 2), head_dim=4)


def config_of(model: ModelConfig = SMALL, **more: object) -> Config:
    return Config(data=DATA, model=model, **more)


def with_options(**options: object) -> Config:
    return config_of(replace(SMALL, options=options))


@pytest.mark.parametrize("name", ["fmnist", "celeba", "cifar10", "mini"])
def test_every_preset_can_have_it_and_no_memory_is_taken_to_say_so(name):
    config = preset(name)
    config = replace(config, model=replace(config.model, kind="unet2d"))
    check_model(config)
    assert parts_of(config) == PARTS == tuple(sizes_of(config)) and activations(config) > 0
    widths = [config.model.dim * m for m in config.model.dim_mults]
    whole = config_unet2d.complete(config.model)
    assert whole["block_out_channels"] == widths
    assert all(width % whole["norm_num_groups"] == width % whole["attention_head_dim"] == 0 for width in widths)
    assert whole["down_block_types"][-1] == "AttnDownBlock2D" and whole["up_block_types"][0] == "AttnUpBlock2D"


def test_each_part_is_what_the_readme_says():
    by_part = parameters_by_part(build_model(config_of(replace(SMALL, classes=3))))
    first = {part: {name.split(".")[0] for name in named} for part, named in by_part.items()}
    assert first == {
        "encoder": {"conv_in", "time_embedding", "class_embedding", "down_blocks"},
        "bottleneck": {"mid_block"},
        "decoder": {"up_blocks", "conv_norm_out", "conv_out"},
    }


@pytest.mark.parametrize("classes", [0, 3])
def test_it_predicts_what_diffusers_does(classes):
    model = build_model(config_of(replace(SMALL, classes=classes))).eval()
    theirs = UNet2DModel(**{k: v for k, v in dict(model.config).items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(model.state_dict())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 999])
    labels = torch.tensor([0, 1, 2]) if classes else None
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), theirs(x, t, labels).sample)


def test_a_config_file_of_diffusers_makes_that_very_network(tmp_path):
    theirs = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, freq_shift=1,
        flip_sin_to_cos=False, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    theirs.save_config(tmp_path)
    config = with_options(**options_in(tmp_path / "config.json", "unet2d"))
    model = build_model(config)
    model.load_state_dict(theirs.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 500])
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t), theirs.eval()(x, t).sample)
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    assert apply_config_file(Config(), tmp_path / "run.yaml") == config  # which needs the file never again
    (tmp_path / "short.yaml").write_text(f"model: {{kind: unet2d, config: {tmp_path}/config.json}}\n")
    assert apply_config_file(config_of(), tmp_path / "short.yaml").model.options == config.model.options
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", "block_out_channels": [8, 16]}')
    with pytest.raises(
        UserError, match="must have an entry for each width of .8, 16."
    ):  # of diffusers' four by default
        with_options(**options_in(tmp_path / "config.json", "unet2d"))


BAD_FILES = {
    "no file": (None, "cannot be read"),
    "no JSON": ("{", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON|more than"),
    "a list": ("[1]", "has no settings"),
    "another class": ('{"_class_name": "UNet2DConditionModel"}', "is of a UNet2DConditionModel"),
    "a setting too many": ('{"cross_attention_dim": 8}', "'cross_attention_dim', which is no setting of UNet2DModel"),
    "a near one": ('{"norm_num_group": 8}', "did you mean norm_num_groups"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_config_file_that_is_none_is_refused_in_one_line(tmp_path, name):
    text, told = BAD_FILES[name]
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        options_in(file, "unet2d")
    assert str(raised.value).startswith(f"model.config: {file}") and "\n" not in str(raised.value)


def test_a_config_file_is_for_no_other_model(tmp_path):
    with pytest.raises(UserError, match="model.config: .* is not valid with model.kind unet; it is for"):
        options_in(tmp_path / "config.json", "unet")


OPTIONS = {
    "unknown": ({"layer_per_block": 1}, "UNet2DModel has no such setting: did you mean layers_per_block"),
    "fourier": ({"time_embedding_type": "fourier"}, "takes the logarithm of the timestep"),
    "no middle": ({"mid_block_type": None}, "null is not valid: without a middle block there is no part bottleneck"),
    "cross-attention": ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "each one of DownBlock2D"),
    "skips of CPU constants": ({"up_block_types": ["SkipUpBlock2D"] * 2}, "each one of UpBlock2D"),
    "levels": ({"down_block_types": ["DownBlock2D"]}, "an entry for each width of .8, 16."),
    "groups": ({"norm_num_groups": 3}, "must divide all of block_out_channels .8, 16."),
    "heads": ({"attention_head_dim": 32}, "must be at most the width there, 16"),
    "a word": ({"layers_per_block": "two"}, "must be a whole number between 1 and 32"),
    "true is no number": ({"layers_per_block": True}, "must be a whole number"),
    "channels": ({"in_channels": 3}, "3 is a config for other channels; the model sees images with 1"),
    "noise of another shape": ({"out_channels": 2}, "a config for other channels"),
    "side": ({"sample_size": 32}, "32 is a config for another side; the model sees images with 8"),
    "labels": ({"num_class_embeds": 10}, "10 is a config for other labels; the run has none"),
    "other input": ({"class_embed_type": "identity"}, "it must be null"),
    "few timesteps": ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "at least diffusion.timesteps"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_in_one_line(name):
    options, told = OPTIONS[name]
    with pytest.raises(UserError, match=told) as raised:
        with_options(**options)
    assert str(raised.value).startswith("model.options.") and "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["heads", "bottleneck_width", "bottleneck_blocks", "bottleneck_select"])
def test_a_field_of_the_papers_unet_is_not_ignored(field):
    with pytest.raises(UserError, match=f"model.{field}: .* not valid with model.kind unet2d"):
        config_of(replace(SMALL, **{field: 3 if field != "bottleneck_select" else 0.5}))


def test_a_side_that_its_levels_cannot_halve_is_refused():
    with pytest.raises(UserError, match="data.image_side: 8 cannot be halved evenly by the 5 stages of model.options"):
        with_options(block_out_channels=[8] * 5)
    with pytest.raises(UserError, match="by the 5 stages of model.dim_mults"):
        config_of(replace(SMALL, dim_mults=(1,) * 5))


def test_what_follows_from_the_classes_is_not_stored():
    config = config_of(replace(SMALL, classes=10, options={"num_class_embeds": 10, "block_out_channels": (8, 16)}))
    assert config.model.options == {"block_out_channels": [8, 16]} and from_dict(to_dict(config)) == config
    assert activations(config) > 0


@settings(max_examples=6)
@given(st.integers(2, 32), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 64))
def test_any_widths_make_a_network_that_can_be_built(half, mults, head_dim):
    model = ModelConfig(kind="unet2d", dim=2 * half, dim_mults=tuple(mults), head_dim=head_dim)
    config = Config(data=replace(DATA, image_side=4), model=model)
    check_model(config)
    assert next(iter(describe_model(config).parameters())).is_meta


def test_settings_that_do_not_go_together_are_diffusers_to_refuse():
    told = "model.options: diffusers' UNet2DModel cannot be made of them .ValueError: "
    with pytest.raises(UserError, match=told) as raised:
        check_model(with_options(attn_norm_num_groups=7))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_a_step_learns_in_every_precision(precision):
    config = config_of(replace(SMALL, classes=2), runtime=RuntimeConfig(precision=precision))
    trainer = Trainer(config, torch.device("cpu"))
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    before = trainer.buckets.flat.clone()
    losses = [float(trainer.step(images, labels)) for _ in range(12)]
    assert sum(losses[-4:]) < sum(losses[:4]) and (trainer.buckets.flat != before).float().mean() > 0.9
    assert trainer.buckets.flat.dtype == (torch.float64 if precision == "float64" else torch.float32)


def test_there_is_no_plain_loop_of_it_to_measure_against():
    with pytest.raises(UserError, match="the loop that everybody writes is there for unet, not for unet2d"):
        Baseline(config_of(), torch.device("cpu"), np.zeros((1, 1, 8, 8), np.uint8))


def test_a_layout_is_refused():
    with pytest.raises(UserError, match="runtime.layout: 'channels-last' is for model.kind unet; use auto"):
        Trainer(config_of(runtime=RuntimeConfig(layout="channels-last")), torch.device("cpu"))


@pytest.mark.parametrize("classes", [0, 2])
def test_it_never_waits_for_the_host_so_it_can_be_captured(classes):
    """On fake tensors of a GPU: a number that the host asks for, or a tensor that is elsewhere, is an error."""
    config = config_of(replace(SMALL, classes=classes))
    with FakeTensorMode():
        with torch.device("cuda"):
            model = build_unet2d(DATA.shape, config.model)
        x, t = torch.randn(4, 1, 8, 8, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        schedule = diffusion.make_schedule(DiffusionConfig(), torch.float32, "cuda")
        loss = diffusion.loss(model, schedule, x, t, x, t if classes else None)
    assert loss.device.type == "cuda"


@pytest.mark.rare  # a minute of torch's compiler; the network is diffusers' own, which is compiled everywhere
def test_it_is_one_graph_to_the_compiler():
    model = build_model(config_of())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 9])
    whole = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(whole(x, t), model(x, t))
    torch.compiler.reset()


def test_nobody_else_needs_diffusers(monkeypatch):
    for path in (Path(__file__).parents[2] / "fdiff").rglob("*.py"):
        first = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        named = {name for node in first for name in [getattr(node, "module", ""), *(a.name for a in node.names)]}
        if path.name != "unet2d.py":  # which is imported where it is used
            assert not any(name.startswith(("diffusers", "fdiff.model.unet2d")) for name in named), path
    monkeypatch.setattr("fdiff.model.building.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="unet2d is diffusers', which is not installed; pip install 'fdiff.diffusers.'"):
        check_model(config_of())


def test_the_defaults_are_diffusers_own():
    signature = inspect.signature(UNet2DModel.__init__).parameters
    values = {n: p.default for n, p in signature.items() if n != "self"}
    theirs = {n: list(value) if isinstance(value, tuple) else value for n, value in values.items()}
    assert set(theirs) == set(config_unet2d.OPTIONS)
    assert config_unet2d.DEFAULTS == {n: v for n, v in theirs.items() if n in config_unet2d.DEFAULTS}
    sizes = {"sample_size", "in_channels", "out_channels", "num_class_embeds"}
    assert set(theirs) - set(config_unet2d.DEFAULTS) == sizes
    assert all(config_unet2d.OPTIONS[name][0](value) for name, value in theirs.items())
