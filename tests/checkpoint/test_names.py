from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.names import (
    LAYOUTS,
    Dialect,
    Layout,
    canonical_module,
    canonical_name,
    detect_layout,
    foreign_module,
    foreign_name,
    hub_to_native_rows,
    is_scale,
    native_to_hub_rows,
    rotary_heads,
)
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.modules import linears

DIALECTS: tuple[Dialect, ...] = ("none", "mistral-fp8", "modelopt")


def all_names(config: ModelConfig, quantization: Quantization) -> list[str]:
    return [*expected_tensors(config, quantization)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_two_tensors_share_a_foreign_name(make: Any, layout: Layout, dialect: Dialect) -> None:
    names = all_names(make.full, make.quantization(make.full, dialect))
    foreign = [foreign_name(name, layout, dialect) for name in names]
    assert len(set(foreign)) == len(names)
    assert [canonical_name(name, layout, dialect) for name in foreign] == names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_survive_the_round_trip(make: Any, layout: Layout) -> None:
    for linear in linears(make.full):
        assert canonical_module(foreign_module(linear.name, layout), layout) == linear.name


@pytest.mark.parametrize(
    ("name", "layout", "dialect", "foreign"),
    [
        ("decoder.4.mlp.up.tensor_scale", "hf", "modelopt",
         "model.language_model.layers.4.mlp.up_proj.weight_scale_2"),
        ("decoder.0.attention.k_scale", "hf", "modelopt",
         "model.language_model.layers.0.self_attn.k_proj.k_scale"),
        ("decoder.0.attention.v_scale", "hf-old", "modelopt",
         "language_model.model.layers.0.self_attn.v_proj.v_scale"),
        ("decoder.11.attention.o.weight_scale", "hf", "mistral-fp8",
         "model.language_model.layers.11.self_attn.o_proj.weight_scale_inv"),
        ("decoder.11.attention.o.input_scale", "hf-text", "mistral-fp8",
         "model.layers.11.self_attn.o_proj.activation_scale"),
        ("decoder.3.mlp.down.weight_scale", "mistral", "mistral-fp8",
         "layers.3.feed_forward.w2.qscale_weight"),
        ("decoder.3.mlp.up.input_scale", "mistral", "mistral-fp8",
         "layers.3.feed_forward.w3.qscale_act"),
        ("head.weight", "hf-old", "none", "language_model.lm_head.weight"),
        ("head.weight", "mistral", "none", "output.weight"),
        ("encoder.1.mlp.gate.weight", "hf", "none",
         "model.vision_tower.transformer.layers.1.feed_forward.gate_proj.weight"),
        ("encoder.1.mlp.gate.weight", "mistral", "none",
         "vision_encoder.transformer.layers.1.feed_forward.w1.weight"),
        ("encoder.patch.weight", "hf-old", "none", "vision_tower.patch_conv.weight"),
        ("projector.merge.weight", "hf", "none",
         "model.multi_modal_projector.patch_merger.merging_layer.weight"),
        ("projector.norm.weight", "mistral", "none", "pre_mm_projector_norm.weight"),
        ("projector.out.bias", "mistral", "none", "vision_language_adapter.w_out.bias"),
    ],
)  # fmt: skip
def test_published_names(name: str, layout: Layout, dialect: Dialect, foreign: str) -> None:
    assert foreign_name(name, layout, dialect) == foreign
    assert canonical_name(foreign, layout, dialect) == name


@pytest.mark.parametrize(
    "foreign",
    [
        "model.language_model.layers.01.mlp.up_proj.weight",  # another spelling of layer 1
        "model.language_model.layers.0.mlp.up_proj.weight_scale_3",
        "model.language_model.layers.0.mlp.k_proj.k_scale",
        "model.language_model.layers.0.self_attn.q_proj.k_scale",
        "model.language_model.norm.weight_scale",
        "model.language_model.embed_tokens.input_scale",
        "weight",
        "",
    ],
)
def test_names_that_no_model_has_stay_unknown(foreign: str) -> None:
    assert canonical_name(foreign, "hf", "modelopt") is None


def test_a_role_the_dialect_lacks_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="tensor_scale"):
        foreign_name("decoder.0.mlp.up.tensor_scale", "hf", "mistral-fp8")
    with pytest.raises(CheckpointError, match="not a canonical module"):
        foreign_module("decoder.0.mlp.router", "hf")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_told_from_the_names(make: Any, layout: Layout) -> None:
    names = all_names(make.full, make.quantization(make.full, "none"))
    assert detect_layout([foreign_name(name, layout, "none") for name in names]) == layout


def test_names_of_another_architecture_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the layout is not known"):
        detect_layout(["transformer.h.0.attn.c_attn.weight"])


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 3))
def test_row_orders_are_inverse(heads: int, half: int, columns: int) -> None:
    rows = heads * half * 2
    weight = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    assert torch.equal(hub_to_native_rows(native_to_hub_rows(weight, heads), heads), weight)
    assert torch.equal(native_to_hub_rows(hub_to_native_rows(weight, heads), heads), weight)


def test_rows_of_one_head_by_hand() -> None:
    assert native_to_hub_rows(torch.arange(12), 2).tolist() == [
        0,
        2,
        4,
        1,
        3,
        5,
        6,
        8,
        10,
        7,
        9,
        11,
    ]


def test_row_order_gives_the_same_rotation() -> None:
    """Interleaved pairs rotated one way equal halves rotated the other way."""
    torch.manual_seed(0)
    heads, head_dim, width = 3, 8, 5
    native, x = torch.randn(heads * head_dim, width), torch.randn(width)
    angle = torch.randn(head_dim // 2)
    pairs = (native @ x).view(heads, head_dim // 2, 2)
    first = pairs[..., 0] * angle.cos() - pairs[..., 1] * angle.sin()
    second = pairs[..., 1] * angle.cos() + pairs[..., 0] * angle.sin()
    a, b = (native_to_hub_rows(native, heads) @ x).view(heads, 2, head_dim // 2).unbind(1)
    torch.testing.assert_close(a * angle.cos() - b * angle.sin(), first)
    torch.testing.assert_close(b * angle.cos() + a * angle.sin(), second)


def test_only_q_and_k_have_rotary_rows(make: Any) -> None:
    names = all_names(make.full, make.quantization(make.full, "none"))
    heads = {n: h for n in names if (h := rotary_heads(n, make.full)) is not None}
    assert heads["decoder.0.attention.q.weight"] == make.text.num_heads
    assert heads["decoder.0.attention.k.weight"] == make.text.num_kv_heads
    assert heads["encoder.0.attention.k.weight"] == make.vision.num_heads
    assert {name.split(".")[-2] for name in heads} == {"q", "k"}


def test_scales_of_every_dialect_are_told_from_what_they_scale() -> None:
    layer = "model.layers.0.mlp.up_proj"
    ours = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
    theirs = ("weight_scale_inv", "activation_scale", "qscale_weight", "qscale_act")
    for role in (*ours, *theirs):
        assert is_scale(f"{layer}.{role}"), role
    for name in (f"{layer}.weight", f"{layer}.bias", "model.norm.weight", "k_scale.weight"):
        assert not is_scale(name), name
