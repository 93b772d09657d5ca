import random
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.errors import FormatError, UsageError
from halfbyte.modules import WeightFormat, decoder_linears
from halfbyte.recipe.plan import Size, format_plan, make_plan, plan_size, plan_sizes
from halfbyte.recipe.schema import Recipe, load_recipe, parse_recipe

# Mistral Medium 3.5: the published geometry of decoder and Pixtral encoder.
MEDIUM = ModelConfig(
    TextConfig(
        88, 12288, 96, 8, 128, 28672, 131072, 1e-5, 262144, RopeConfig(1e6), False, 1, (2,), 11
    ),
    VisionConfig(48, 1664, 16, 104, 8192, 14, 1540, 3, 1e4, 1e-5, "silu", 2, "gelu", False, 10, -1),
)
SMOLLM2 = ModelConfig(
    TextConfig(30, 576, 9, 3, 64, 1536, 49152, 1e-5, 8192, RopeConfig(1e5), True, 1, (2,), 2), None
)

# By hand: N is an NVFP4 MLP, 8 an FP8 one.
MLP_OF_88 = "8888" + "N" * 83 + "8"
MLP_OF_30 = "8888" + "N" * 25 + "8"
MLP_OF_8 = "8888NNN8"


def depth(config: ModelConfig, layers: int) -> ModelConfig:
    return replace(config, text=replace(config.text, num_layers=layers))


def recipe(*rules: dict[str, Any], keep: str = "embedding head vision projector") -> Recipe:
    fields = {
        "name": "test",
        "rules": [{"part": "decoder", **rule} for rule in rules],
        "keep": keep.split(),
        "kv_cache": "fp8",
        "scales": {"weights": "amax", "activations": "amax"},
        "calibration": {"blend": "builtin", "samples": 8, "tokens_per_sample": 64, "seed": 0},
    }
    return parse_recipe(yaml.safe_dump(fields), "x.yaml")


ATTENTION = {"group": "attention", "format": "fp8"}


@pytest.mark.parametrize("table", [MLP_OF_88, MLP_OF_30, MLP_OF_8])
def test_one_recipe_for_every_depth(table: str) -> None:
    plan = make_plan(load_recipe("medium-3.5"), depth(MEDIUM, len(table)))
    assert len(plan.formats) == 7 * len(table)
    for layer, mark in enumerate(table):
        for short in ("q", "k", "v", "o"):
            assert plan.formats[f"decoder.{layer}.attention.{short}"] == "fp8"
        for short in ("gate", "up", "down"):
            wanted = {"8": "fp8", "N": "nvfp4"}[mark]
            assert plan.formats[f"decoder.{layer}.mlp.{short}"] == wanted
    assert plan.kv_cache == "fp8" and plan.recipe_name == "medium-3.5"
    assert list(plan.formats) == [x.name for x in decoder_linears(depth(MEDIUM, len(table)))]


def test_the_real_model_weighs_what_the_reference_says() -> None:
    mixed = make_plan(load_recipe("medium-3.5"), MEDIUM)
    assert plan_size(mixed, MEDIUM) == Size(95_224_810_496, 2_890)
    bf16: dict[str, WeightFormat] = dict.fromkeys(mixed.formats, "bf16")
    assert plan_size(replace(mixed, formats=bf16, kv_cache="bf16"), MEDIUM).num_bytes == (
        255_408_420_352
    )
    sizes = plan_sizes(mixed, MEDIUM)
    assert sizes["vision"].num_tensors == 434 + 4
    assert sizes["kv scales"] == Size(704, 176)


def test_the_demo_model_weighs_what_its_file_does() -> None:
    size = plan_size(make_plan(load_recipe("medium-3.5"), SMOLLM2), SMOLLM2)
    assert 133e6 < size.num_bytes < 135e6  # docs/reference/formats.md#gguf
    assert size.num_tensors == 30 * 2 + 5 * 23 + 25 * 26 + 2


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [ATTENTION, {"group": "mlp", "format": "fp8"},
             {"group": "mlp", "layers": [2], "format": "nvfp4"}],
            r"rule 3 overlaps rule 2: both claim decoder\.2\.mlp\.gate",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": ["0-2"], "format": "fp8"},
             {"group": "mlp", "layers": ["4..-1"], "format": "fp8"}],
            r"says nothing about decoder\.3\.mlp\.gate and 2 others",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": ["4..-5"], "format": "fp8"}],
            r"rule 2: layers 4\.\.-5 match nothing in a model of 8 layers",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": ["80-90"], "format": "fp8"}],
            r"rule 2: layers 80\.\.90 go past layer 7, the last of this model",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": [-9], "format": "fp8"}],
            r"rule 2: layers -9 go past layer 7",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": ["0-3", 3], "format": "fp8"}],
            "rule 2 names layer 3 twice",
        ),
        (
            [ATTENTION, {"group": "mlp", "layers": ["0-7", -1], "format": "fp8"}],
            "rule 2 names layer 7 twice",
        ),
        (
            [{"group": "attention", "linears": ["q", "o"], "format": "fp8"},
             {"group": "attention", "linears": ["k", "v"], "format": "nvfp4"},
             {"group": "mlp", "format": "fp8"}],
            r"decoder\.0\.attention\.q is fp8, decoder\.0\.attention\.k is nvfp4; engines run",
        ),
        (
            [ATTENTION, {"group": "mlp", "linears": ["gate"], "format": "fp8"},
             {"group": "mlp", "linears": ["up", "down"], "format": "bf16"}],
            r"mlp\.gate is fp8, decoder\.0\.mlp\.up is bf16",
        ),
    ],
)  # fmt: skip
def test_recipes_that_are_no_partition(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(recipe(*rules), depth(MEDIUM, 8))


def test_parts_that_nobody_mentions() -> None:
    rules = (ATTENTION, {"group": "mlp", "format": "fp8"})
    with pytest.raises(UsageError, match="says nothing about head"):
        make_plan(recipe(*rules, keep="embedding vision projector"), MEDIUM)
    with pytest.raises(UsageError, match="says nothing about vision and 1 others"):
        make_plan(recipe(*rules, keep="embedding head"), MEDIUM)
    # Parts that this model does not have need no mention: no vision here, and a tied head.
    assert make_plan(recipe(*rules, keep="embedding"), SMOLLM2).formats


def test_down_may_differ_from_gate_and_up() -> None:
    plan = make_plan(
        recipe(
            ATTENTION,
            {"group": "mlp", "linears": ["gate", "up"], "format": "nvfp4"},
            {"group": "mlp", "linears": ["down"], "format": "bf16"},
        ),
        SMOLLM2,
    )
    assert plan.formats["decoder.5.mlp.up"] == "nvfp4"
    assert plan.formats["decoder.5.mlp.down"] == "bf16"


def test_a_width_that_has_no_whole_blocks() -> None:
    odd = replace(SMOLLM2, text=replace(SMOLLM2.text, mlp_width=1544))
    with pytest.raises(
        FormatError,
        match=r"decoder\.4\.mlp\.down: 1544 input features; NVFP4 needs a multiple of 16",
    ):
        make_plan(load_recipe("medium-3.5"), odd)
    assert make_plan(load_recipe("fp8"), odd).formats


@given(num_layers=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_any_partition_is_a_plan_whatever_the_order_of_its_rules(
    num_layers: int, seed: int
) -> None:
    rng = random.Random(seed)
    config = depth(SMOLLM2, num_layers)
    wanted: dict[str, str] = {}
    rules: list[dict[str, Any]] = []
    for group, shorts in (("attention", "q k v o"), ("mlp", "gate up down")):
        chosen: dict[str, list[int]] = {}
        for layer in range(num_layers):
            format_ = rng.choice(["bf16", "fp8", "nvfp4"])
            chosen.setdefault(format_, []).append(layer)
            for short in shorts.split():
                wanted[f"decoder.{layer}.{group}.{short}"] = format_
        for format_, layers in chosen.items():
            # Every layer is written from the start or from the end, at random.
            spelt = [layer - num_layers if rng.random() < 0.5 else layer for layer in layers]
            rules.append({"group": group, "layers": spelt, "format": format_})
    rng.shuffle(rules)
    plan = make_plan(recipe(*rules), config)
    assert dict(plan.formats) == wanted
    # Taking a layer from a rule leaves it unclaimed.
    victim = rng.randrange(len(rules))
    shorter = [{**r, "layers": r["layers"][n == victim :]} for n, r in enumerate(rules)]
    with pytest.raises(UsageError, match="says nothing about"):
        make_plan(recipe(*[rule for rule in shorter if rule["layers"]]), config)


def test_the_table_adds_up() -> None:
    plan = make_plan(load_recipe("medium-3.5"), MEDIUM)
    table = format_plan(plan, MEDIUM)
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["recipe", "medium-3.5,", "KV", "cache", "fp8"]
    assert "decoder.{0-3,87}.mlp.gate" in table and "decoder.{4-86}.mlp.down" in table
    numbers = [int(line[-1].replace(",", "")) for line in lines[2:]]
    assert sum(numbers[:-1]) == numbers[-1] == 95_224_810_496
    assert lines[-1][:3] == ["total", "2,890", "tensors"]
    full = format_plan(plan, MEDIUM, every_layer=True).splitlines()
    assert len(full) == 2 + 616 + 4 + 1
    assert sum(int(line.split()[-1].replace(",", "")) for line in full[2:-1]) == numbers[-1]
