"""Methods as data: subsets of parts by their names, tables of one's own, and what is no method."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdiff import plan, registry
from fdiff.config import Config, ModelConfig
from fdiff.errors import UserError
from fdiff.federation import forecast_run
from fdiff.plan import NeedsImages, everyone, plan_round, private_parts, shared_parts, table_of
from fdiff.presets import preset

PARTS = ("encoder", "bottleneck", "decoder")
OTHERS = ("stem", "body", "neck", "head")
subsets = st.sets(st.sampled_from(OTHERS), min_size=1)


@pytest.fixture
def register(monkeypatch):
    """A function that registers a method for the test."""
    monkeypatch.setitem(registry._registered, "method", {})
    return lambda name, table: registry.register_method(name, table)


def test_names_of_the_four_are_the_same_everywhere():
    assert tuple(plan.METHODS) == registry.BUILT_IN["method"]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("decoder", "udec"), ("bottleneck+decoder", "ulatdec"), ("decoder+bottleneck", "ulatdec"),
        ("decoder+encoder+bottleneck", "full"), ("encoder", "encoder"), ("decoder+encoder", "encoder+decoder"),
    ],
)  # fmt: skip
def test_parts_of_the_papers_model_are_called_as_the_paper_calls_them(given, called):
    config = replace(Config(), method=given)
    assert config.method == called and config == replace(Config(), method=called)
    assert set(shared_parts(config.method)) == set(shared_parts(given))


@given(subsets, st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**40), st.floats(0.05, 1))
def test_any_subset_of_any_parts_is_shared_by_all_in_the_models_order(chosen, k, round, seed, fraction):
    method = "+".join(sorted(chosen))
    shared = shared_parts(method, OTHERS)
    assert shared == tuple(part for part in OTHERS if part in chosen)
    assert sorted((*shared, *private_parts(method, OTHERS))) == sorted(OTHERS)
    found = plan_round(method, k, round, seed, fraction, OTHERS)
    assert found.reporters == dict.fromkeys(shared, found.selected)
    assert len(found.segments()) == 1  # one call, wherever in the model the parts are


def test_full_is_all_parts_of_any_model_and_pairs_want_the_three():
    assert shared_parts("full", OTHERS) == OTHERS
    for method in ("usplit", "ulatdec", "udec"):
        with pytest.raises(UserError, match="which this model does not have; its parts are stem, body, neck, head"):
            table_of(method, OTHERS)


def test_a_function_is_told_the_round_and_gives_clients(register):
    seen = []

    def largest(selection):
        seen.append(selection)
        assert selection.stream().integers(1000) == selection.stream().integers(1000)
        return [max(selection.selected, key=lambda client: selection.images[client])]

    register("largest", {"decoder": largest, "encoder": everyone})
    images = {0: 5, 1: 9, 2: 7, 3: 9}
    found = plan_round("largest", 4, 2, 0, images=images)
    assert list(found.reporters.items()) == [("encoder", (0, 1, 2, 3)), ("decoder", (1,))]
    assert seen[0].round == 2 and seen[0].selected == (0, 1, 2, 3) and seen[0].parts == PARTS
    with pytest.raises(NeedsImages, match="numbers of images"):
        plan_round("largest", 4, 2, 0)


BROKEN = {
    "nobody": ({"decoder": lambda s: []}, "lets nobody report the part decoder in round 1"),
    "a stranger": ({"decoder": lambda s: [7]}, "has client 7 report the part decoder in round 1, and only 0, 1"),
    "unknown part": ({"tail": everyone}, "shares a part 'tail', which this model does not have; its parts are encoder"),
    "empty": ({}, "is no table of parts and functions"),
    "no table": (everyone, "is no table of parts and functions"),
    "no function": ({"decoder": [0, 1]}, "is no table of parts and functions"),
    "raises": ({"decoder": lambda s: 1 / 0}, r"fails for the part decoder in round 1 \(ZeroDivisionError"),
    "a mask": ({"decoder": lambda s: [True, False]}, r"fails for the part decoder in round 1 \(TypeError: True is no"),
    "floats": ({"decoder": lambda s: [0.9]}, r"fails for the part decoder in round 1 \(TypeError"),
    "changes sizes": ({"decoder": lambda s: s.images.clear() or [0]}, "fails for the part decoder in round 1"),
    "exits": ({"decoder": lambda s: exit("bye")}, r"fails for the part decoder in round 1 \(SystemExit: bye\)"),
    "all and one": ({"*": everyone, "decoder": everyone}, "which is all parts, beside others"),
    "no clients": ({"decoder": lambda s: ["x"]}, r"fails for the part decoder in round 1 \(TypeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_method_is_refused_in_one_line(case, register):
    table, told = BROKEN[case]
    register("mine", table)
    with pytest.raises(UserError, match=told) as refused:
        plan_round("mine", 2, 1, 0, images={0: 3, 1: 4})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("fedavg", "'fedavg' is not valid; choose one of full, usplit, ulatdec, udec, or some of the parts encoder"),
        ("encoder+tail", "names a part 'tail'; the parts are encoder, bottleneck, decoder"),
        ("encoder+encoder", "names a part twice"),
        ("", "'' is not valid"),
        ("encoder+", "names a part ''"),
    ],
)
def test_a_configuration_refuses_what_nobody_knows(method, told):
    with pytest.raises(UserError, match=told):
        replace(Config(), method=method)


def test_of_another_model_parts_are_found_out_later():
    config = replace(Config(), method="stem+head", model=ModelConfig(kind="my_model:net"))
    assert config.method == "stem+head"
    with pytest.raises(UserError, match=r"model\.kind: 'my_model:net' is code, .* add --model\.kind my_model:net"):
        forecast_run(replace(config, data=replace(config.data, image_side=16, channels=1)), 2)


def test_sharing_the_encoder_counts_by_hand():
    config = replace(preset("mini-k4"), method="encoder")
    cost = forecast_run(config, 4)
    sizes, rounds = cost["parameters"], config.federation.rounds
    assert cost["communicated_parameters"] == 4 * (sizes["total"] + (2 * rounds - 1) * sizes["encoder"])
