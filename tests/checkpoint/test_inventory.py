"""What must be stored, counted by hand for a small architecture."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.checkpoint.inventory import expected_eagle_tensors, expected_tensors
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.config import ModelConfig

# Width 32, 4 heads of 8, 2 KV heads, MLP 48, vocabulary 64.
LAYER = {
    "attention_norm.weight": (32,), "mlp_norm.weight": (32,),
    "attention.q.weight": (32, 32), "attention.k.weight": (16, 32),
    "attention.v.weight": (16, 32), "attention.o.weight": (32, 32),
    "mlp.gate.weight": (48, 32), "mlp.up.weight": (48, 32), "mlp.down.weight": (32, 48),
}  # fmt: skip


def shapes(found: Any) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in found.items()}


def decoder(layers: int) -> dict[str, tuple[int, ...]]:
    return {f"decoder.{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_model_holds_its_table_layers_norm_and_head(make: Any, tied: bool) -> None:
    config = ModelConfig(replace(make.text, num_layers=2, tied_head=tied), None)
    expected = {"embedding.weight": (64, 32), **decoder(2), "norm.weight": (32,)}
    if not tied:
        expected["head.weight"] = (64, 32)
    found = expected_tensors(config, unquantized(config))
    assert shapes(found) == expected
    assert {one.dtypes for one in found.values()} == {(torch.bfloat16,)}


def test_a_draft_model_has_neither_table_nor_head(make: Any) -> None:
    config = ModelConfig(replace(make.text, num_layers=2), None)
    plan = unquantized(config)
    plan = replace(plan, formats={**plan.formats, "eagle.fuse": "bf16"})
    found = expected_eagle_tensors(config, plan)
    assert shapes(found) == {"eagle.fuse.weight": (32, 64), **decoder(2), "norm.weight": (32,)}


@pytest.mark.parametrize("has_bias", [False, True])
def test_only_the_projectors_two_linears_may_have_a_bias(make: Any, has_bias: bool) -> None:
    vision = replace(make.vision, projector_bias=has_bias)
    config = ModelConfig(make.text, vision)
    found = shapes(expected_tensors(config, unquantized(config)))
    biases = {name for name in found if name.endswith(".bias")}
    assert biases == ({"projector.in.bias", "projector.out.bias"} if has_bias else set())
    for name in biases:
        assert found[name] == found[name.replace(".bias", ".weight")][:1]
    assert found["encoder.patch.weight"] == (16, 3, 2, 2)
