"""What a model has to be: parts that hold each parameter once, and nothing else that trains."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import fdiff
from fdiff.config import Config, DataConfig, ModelConfig
from fdiff.errors import UserError
from fdiff.model import PARTS, UNet, build_model, check_forward, describe_model, layout_of, parts_of, sizes_of
from fdiff.model.parts import parameters_by_part
from fdiff.registry import BUILT_IN

CONFIG = Config(data=DataConfig(image_side=8, channels=1), model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8))


class Net(nn.Module):
    """Two layers, `a` and `b`, in two parts; `change` makes it what a case wants."""

    def __init__(self, change=lambda net: None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.parts = {"first": [self.a], "second": [self.b]}
        change(self)

    def forward(self, x, t, labels=None):
        return self.b(self.a(x))


def tie(net: Net) -> None:
    net.b = nn.Conv2d(1, 4, 3, padding=1)
    net.b.weight, net.parts = net.a.weight, {"first": [net.a], "second": [net.b]}


def put(name: str, module: nn.Module, part: str | None = None):
    def change(net: Net) -> None:
        setattr(net, name, module)
        if part:
            net.parts[part] = [*net.parts.get(part, []), module]

    return change


WHOLE = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
CASES = {
    "no parts": (lambda net: delattr(net, "parts"), "it has no attribute parts"),
    "empty parts": (lambda net: setattr(net, "parts", {}), "it has no attribute parts"),
    "in no part": (put("c", nn.Linear(2, 2)), "the parameter c.weight is in no part"),
    "in two parts": (lambda net: net.parts["second"].append(net.a), "a.weight is in the parts first and second"),
    "twice in one": (lambda net: net.parts["first"].append(net.a), "a.weight is in the parts first and first"),
    "nested in another": (lambda net: net.parts.update(all=[net]), "is in the parts first and all"),
    "tied": (tie, "a.weight and b.weight are one parameter"),
    "no parameters": (put("act", nn.ReLU(), "third"), "the part third has no parameters"),
    "somebody else's": (lambda net: net.parts["second"].append(nn.Linear(2, 2)), "not the model's"),
    "running statistics": (put("norm", nn.BatchNorm2d(4), "first"), r"the buffer norm\.running_mean .* nn\.GroupNorm"),
    "a name like a path": (lambda net: net.parts.update({"x/y": [net.a]}), "'x/y' is no name of a part"),
    "a name of a method": (lambda net: net.parts.update(full=net.parts.pop("first")), "'full' is no name"),
    "no list": (lambda net: net.parts.update(first=net.a), "the part first is no list of submodules"),
    "whole numbers": (
        put("n", nn.ParameterList([WHOLE])),
        "n.0 is torch.int64",
    ),
    "no shape yet": (put("c", nn.LazyLinear(3), "third"), "the parameter c.weight has no shape yet"),
    "nothing to train": (lambda net: net.requires_grad_(False), "all its parameters are frozen"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_be_shared_is_refused_by_name(case):
    change, told = CASES[case]
    with pytest.raises(UserError, match=told) as refused:
        parameters_by_part(Net(change))
    assert "\n" not in str(refused.value)


def test_a_constant_that_is_not_saved_may_be_kept():
    net = Net(lambda net: net.register_buffer("constant", torch.ones(3), persistent=False))
    assert list(parameters_by_part(net)) == ["first", "second"]


def test_frozen_parameters_count_nowhere(request):
    request.addfinalizer(forget("half-frozen"))

    def half_frozen(shape, model):
        return Net(lambda net: net.a.requires_grad_(False))

    fdiff.register_model("half-frozen", half_frozen)
    config = replace(CONFIG, model=ModelConfig(kind="half-frozen"))
    assert sizes_of(config) == {"second": 4 * 9 + 1} and parts_of(config) == ("second",)
    assert [slot.name for slot in layout_of(describe_model(config), frozen=True)] == ["a.weight", "a.bias"]


def forget(name: str, field: str = "model.kind"):
    from fdiff import registry

    return lambda: registry._registered[field].pop(name, None)


def test_the_papers_model_is_one_of_them():
    model = build_model(CONFIG)
    assert isinstance(model, UNet) and tuple(parameters_by_part(model)) == PARTS == parts_of(CONFIG)
    assert all(name.startswith(f"{part}.") for part, named in parameters_by_part(model).items() for name in named)


def test_initial_weights_are_those_of_the_seed_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = build_model(CONFIG).state_dict()
    torch.randn(7)
    again = build_model(CONFIG).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_model(replace(CONFIG, run=replace(CONFIG.run, seed=1))).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Builders:
    """Functions that ought to build a model, and what is said of each."""

    @staticmethod
    def raises(shape, model):
        raise RuntimeError("the weights are not there\nand more")

    @staticmethod
    def no_module(shape, model):
        return "a model"

    @staticmethod
    def wrong_shape(shape, model):
        return Net(lambda net: setattr(net, "forward", lambda x, t, labels=None: net.a(x)))

    @staticmethod
    def fails_forward(shape, model):
        return Net(lambda net: setattr(net, "forward", lambda x, t, labels=None: net.a(x.view(3, 7))))

    @staticmethod
    def has_options(shape, model, width=4):
        return Net()

    not_callable = 3


TOLD = {
    "raises": r"model\.kind: raises fails \(RuntimeError: the weights are not there\)",
    "no_module": r"model\.kind: no_module returns a str; it must be a torch\.nn\.Module",
    "wrong_shape": r"makes \(2, 4, 8, 8\) of images \(2, 1, 8, 8\); it must predict their noise",
    "fails_forward": r"fails on images of \(1, 8, 8\) \(RuntimeError: shape",
    "has_options": r"model\.options\.widht: has_options has no such option; its options are width",
    "not_callable": r"model\.kind: not_callable is no function that builds a model",
}


@pytest.mark.parametrize("name", TOLD)
def test_a_builder_of_somebody_elses_fails_in_one_line(name, request):
    request.addfinalizer(forget(name))
    fdiff.register_model(name, getattr(Builders, name))
    options = {"widht": 3} if name == "has_options" else {}
    config = replace(CONFIG, model=ModelConfig(kind=name, options=options))
    with pytest.raises(UserError, match=TOLD[name]) as refused:
        check_forward(build_model(config), config)
    assert re.fullmatch("[^\n]+", str(refused.value))


def test_options_are_for_models_of_ones_own():
    with pytest.raises(UserError, match=r"model\.options\.width: model\.kind unet has no options"):
        replace(CONFIG, model=ModelConfig(options={"width": 3}))
    for options in ({"a b": 1}, {"x": {"y": 1}}, {"x": float("nan")}, {3: 4}):
        with pytest.raises(UserError, match=r"model\.options: .* is not valid"):
            ModelConfig(kind="my:net", options=options)
            replace(CONFIG, model=ModelConfig(kind="my:net", options=options))


def test_names_of_fdiffs_own_cannot_be_registered():
    functions = fdiff.register_method, fdiff.register_model, fdiff.register_dataset
    for field, register in zip(BUILT_IN, functions, strict=True):
        for name in (*BUILT_IN[field], "a+b", "a:b", "", "a b", *(PARTS if field == "method" else ())):
            with pytest.raises(UserError, match="cannot be registered"):
                register(name, Net)
