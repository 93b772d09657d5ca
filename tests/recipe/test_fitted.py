"""Shares of layers, the recipe fitted to a depth, and what is said of it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.config import ModelConfig
from halfbyte.errors import UsageError
from halfbyte.modules import decoder_linears
from halfbyte.recipe.fitted import fitted_recipe, named_or_fitted
from halfbyte.recipe.plan import make_plan, plan_size
from halfbyte.recipe.schema import LayerRange, Share, load_recipe, parse_recipe
from sisters import SISTERS

CONFIG = next(one for one in SISTERS if one.name == "ministral-3-8b").config
# FP8 MLPs at the beginning, by hand: 5 % of the depth to the nearest whole number, at least one.
FIRST = {88: 4, 40: 2, 34: 2, 30: 2, 29: 1, 26: 1, 3: 1, 10: 1, 50: 3, 100: 5}


def depth(layers: int, **changes: Any) -> ModelConfig:
    return replace(CONFIG, text=replace(CONFIG.text, num_layers=layers, **changes))


@pytest.mark.parametrize(("layers", "first"), FIRST.items())
def test_edges_follow_depth(layers: int, first: int) -> None:
    config = depth(layers)
    formats = make_plan(load_recipe("mixed"), config).formats
    fp8 = {*range(first), layers - 1}
    for linear in decoder_linears(config):
        wanted = "fp8" if linear.group == "attention" or linear.layer in fp8 else "nvfp4"
        assert formats[linear.name] == wanted, linear.name


def test_at_the_published_depth_the_two_are_one() -> None:
    plans = [make_plan(load_recipe(name), depth(88)) for name in ("mixed", "medium-3.5")]
    assert plans[0].formats == plans[1].formats and plans[0].kv_cache == plans[1].kv_cache
    assert fitted_recipe(depth(88)).recipe == load_recipe("medium-3.5")


@given(st.integers(1, 300), st.integers(1, 99))
def test_a_share_and_what_is_behind_it_are_all_layers(layers: int, percent: int) -> None:
    ends = (("0..P%", "fp8"), ("P%..-1", "nvfp4"))
    rules = "".join(
        f"  - {{part: decoder, group: mlp, layers: [{layer}], format: {kind}}}\n"
        for layer, kind in ((text.replace("P", str(percent)), kind) for text, kind in ends)
    )
    recipe = parse_recipe(
        "name: x\nrules:\n  - {part: decoder, group: attention, format: bf16}\n" + rules +
        "keep: [embedding, head, vision, projector]\nkv_cache: fp8\n"
        "scales: {weights: amax, activations: amax}\n"
        "calibration: {blend: builtin, samples: 1, tokens_per_sample: 1, seed: 0}\n",
        "x.yaml",
    )  # fmt: skip
    share = Share(percent).layers(layers)
    assert abs(share - layers * percent / 100) <= 0.5 or share == 1
    if share == layers:
        with pytest.raises(UsageError, match="go past layer"):
            make_plan(recipe, depth(layers))
        return
    formats = make_plan(recipe, depth(layers)).formats
    kinds = [formats[f"decoder.{layer}.mlp.up"] for layer in range(layers)]
    assert kinds == ["fp8"] * share + ["nvfp4"] * (layers - share)


def test_how_a_share_is_written() -> None:
    rules = load_recipe("mixed").rules
    assert rules[1].layers == (LayerRange(0, Share(5)), LayerRange(-1, -1))
    assert rules[2].layers == (LayerRange(Share(5), -2),)
    assert [str(one) for rule in rules[1:] for one in rule.layers or ()] == [
        "0..5%",
        "-1",
        "5%..-2",
    ]


@pytest.mark.parametrize("layers", range(1, 101))
def test_every_depth_has_a_recipe_and_a_reason(layers: int) -> None:
    config = depth(layers)
    fitted = fitted_recipe(config)
    formats = make_plan(fitted.recipe, config).formats
    assert formats[f"decoder.{layers - 1}.mlp.down"] == formats["decoder.0.mlp.down"] == "fp8"
    assert ("nvfp4" in formats.values()) is (layers >= 3)
    if layers >= 3:
        assert f"{layers} layers" in fitted.reason
        last = FIRST.get(layers, 0) - 1
        if fitted.recipe.name == "mixed" and last >= 0:
            shown = "0" if last == 0 else f"0-{last}"
            assert f"layers {shown} and {layers - 1}" in fitted.reason


def test_widths_that_nvfp4_cannot_hold_stay_fp8() -> None:
    fitted = fitted_recipe(depth(12, mlp_width=1000))
    assert fitted.recipe.name == "fp8"
    assert "1000 input features" in fitted.reason


def unread() -> ModelConfig:
    raise AssertionError("a named recipe needs no config")


def test_a_named_recipe_is_taken_without_a_word() -> None:
    assert named_or_fitted("fp8", unread) == (load_recipe("fp8"), None)
    recipe, said = named_or_fitted(None, lambda: CONFIG)
    assert recipe.name == "mixed"
    assert said is not None and "layers 0-1 and 33" in said and "--recipe" in said


@pytest.mark.parametrize("sister", SISTERS, ids=str)
def test_sisters_weigh_less_than_half_of_bf16(sister: Any) -> None:
    config = sister.config
    plan = make_plan(fitted_recipe(config).recipe, config)
    plain = replace(plan, formats=dict.fromkeys(plan.formats, "bf16"), kv_cache="bf16")
    share = plan_size(plan, config).num_bytes / plan_size(plain, config).num_bytes
    assert 0.3 < share < 0.55
