"""Strict reading of config.json and params.json."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint.fields import model_config, rope_config
from halfbyte.checkpoint.native_fields import native_config
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import RopeConfig
from halfbyte.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data/checkpoint"


def golden() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((DATA / "modelopt-tiny/source-config.json").read_text())
    return raw


def put(path: str, value: Any) -> dict[str, Any]:
    """The golden config with one field changed; `...` removes it."""
    raw = golden()
    *parents, last = path.split(".")
    here = raw
    for parent in parents:
        here = here[parent]
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return raw


def test_the_golden_config_in_full() -> None:
    config = model_config(golden(), has_head=True)
    text, vision = config.text, config.vision
    assert (text.num_layers, text.width, text.mlp_width, text.vocab_size) == (8, 256, 448, 512)
    assert (text.num_heads, text.num_kv_heads, text.head_dim) == (8, 2, 32)
    assert (text.norm_eps, text.max_positions, text.tied_head) == (1e-5, 1024, False)
    assert (text.bos_token_id, text.eos_token_ids, text.pad_token_id) == (1, (2,), 11)
    assert text.rope == RopeConfig(1e6, "yarn", 64.0, 16, 4.0, 1.0, 1.0, 0.0, 0.0)
    assert vision is not None
    assert (vision.num_layers, vision.width, vision.num_heads, vision.head_dim) == (2, 96, 4, 24)
    assert (vision.rope_theta, vision.activation, vision.projector_activation) == (
        10000.0, "silu", "gelu",
    )  # fmt: skip
    assert (vision.spatial_merge_size, vision.image_token_id, vision.feature_layer) == (2, 10, -1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("final_logit_softcapping", 30.0, r"config\.json: unknown field .*final_logit_softcapping"),
        ("text_config.attn_logit_softcapping", 50.0, "text_config: unknown .*softcapping = 50.0"),
        ("text_config.query_pre_attn_scalar", 128, "text_config: unknown .*query_pre_attn_scalar"),
        ("text_config.rope_parameters.low_freq_factor", 1.0, "rope_parameters: unknown field"),
        ("text_config.rope_parameters.truncate", False, "truncate = False is not implemented"),
        ("text_config.rope_parameters.partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5"),
        ("text_config.rope_parameters.attention_factor", 1.0, "attention_factor = 1.0, but"),
        ("text_config.rope_parameters.rope_type", "linear", "'linear' and type 'yarn' disagree"),
        ("text_config.rope_parameters.factor", ..., "lacks factor"),
        ("text_config.rope_parameters.factor", "64", "a number was expected"),
        ("text_config.rope_parameters.factor", float("inf"), "a number was expected"),
        ("text_config.rope_parameters.rope_theta", ..., "lacks rope_theta"),
        ("text_config.rope_parameters", ..., "lacks rope_parameters"),
        ("text_config.rope_parameters", [1], "an object was expected"),
        ("text_config.rope_theta", 5.0, "rope_parameters.rope_theta and rope_theta disagree"),
        ("text_config.rope_scaling", {"type": "yarn"}, "rope_parameters and rope_scaling disagree"),
        ("text_config.sliding_window", 512, "sliding_window = 512: in this model a token attends"),
        ("text_config.sliding_window", "512", "sliding_window = '512': in this model a token"),
        ("text_config.layer_types", ["sliding_attention"], "'sliding_attention': only full_att"),
        ("text_config.layer_types", "full_attention", "only full_attention"),
        ("text_config.attention_bias", True, "attention_bias = True is not implemented"),
        ("text_config.hidden_act", "gelu", "hidden_act = 'gelu' is not implemented"),
        ("text_config.model_type", "llama4", "model_type = 'llama4' is not implemented"),
        ("text_config.rms_norm_eps", ..., "lacks rms_norm_eps"),
        ("text_config.hidden_size", 0, "hidden_size: must not be 0"),
        ("text_config.hidden_size", -1, "a whole number was expected"),
        ("text_config.hidden_size", True, "a whole number was expected"),
        ("text_config.num_key_value_heads", 3, "8 query heads do not share 3 KV heads"),
        ("text_config.head_dim", 31, "head_dim = 31: must be even"),
        ("text_config.eos_token_id", "2", "token ids were expected"),
        ("text_config", ..., "lacks text_config"),
        ("model_type", "qwen3", "model_type 'qwen3' is not one of"),
        ("vision_config.model_type", "siglip", "model_type = 'siglip'"),
        ("vision_config.rope_parameters.rope_type", "yarn", "rope_type = 'yarn'"),
        ("vision_config.head_dim", 32, "4 heads of 32 are not 96"),
        ("vision_config.num_registers", 4, "vision_config: unknown field"),
        ("vision_feature_layer", [-1, -2], "only one layer"),
        ("tie_word_embeddings", "no", "must be true or false"),
        ("text_config.rms_norm_eps", 0, "rms_norm_eps = 0: must be at least"),
        ("text_config.rms_norm_eps", -1e9, "rms_norm_eps = -1e\\+09: must be at least"),
        ("text_config.rms_norm_eps", 2, "rms_norm_eps = 2: must be .* at most 1"),
        ("text_config.rope_parameters.rope_theta", 0, "rope_theta = 0: must be at least 1"),
        ("text_config.rope_parameters.rope_theta", -1e6, "rope_theta = -1e\\+06: must be at least"),
        ("text_config.rope_parameters.factor", 0, "factor = 0: must be at least 1"),
        ("text_config.rope_parameters.beta_slow", 0, "beta_slow 0 must be above 0"),
        ("text_config.rope_parameters.beta_fast", 0.5, "the slow one no larger"),
        ("text_config.rope_parameters.mscale", -1, "mscale = -1: must be at least 0"),
        ("text_config.rope_parameters.llama_4_scaling_beta", -1, "beta = -1: must be at least 0"),
        ("text_config.rope_parameters.rope_theta", 10**400, "a number was expected: 1000"),
        ("text_config.hidden_size", 10**4000, "a whole number was expected: 1000"),
        ("text_config.eos_token_id", 10**50, "token ids were expected"),
        ("vision_config.rope_parameters.rope_theta", 0, "rope_theta = 0: must be at least 1"),
        ("is_encoder_decoder", True, "unknown field .* is_encoder_decoder = True"),
        ("auto_map", {"AutoModel": "x.Y"}, "unknown field .* auto_map"),
    ],
)
def test_a_field_that_changes_numerics_is_refused_by_name(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_config(put(path, value), has_head=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.attention_dropout", 0.1),
        ("text_config.use_cache", False),
        ("transformers_version", "9.9"),
        ("text_config.initializer_range", 1.0),
        ("vision_feature_layer", ...),
        ("image_token_index", ...),
        ("projector_hidden_act", ...),
        ("multimodal_projector_bias", ...),
        ("text_config.rope_parameters.llama_4_scaling_beta", ...),
        ("text_config.rope_parameters.mscale", ...),
        ("text_config.rope_parameters.mscale_all_dim", ...),
        ("text_config.rope_parameters.type", ...),
        ("text_config.rope_parameters.rope_type", ...),
        ("text_config.head_dim", ...),
        ("text_config.head_dim", None),
        ("vision_config.rope_parameters", ...),
        ("vision_config.rope_parameters.rope_type", "default"),
        ("vision_config.head_dim", ...),
        ("tie_word_embeddings", ...),
        ("text_config.tie_word_embeddings", ...),
        ("unsloth_version", "2026.1"),
        ("text_config.unsloth_fixed", True),
        ("torchscript", False),
        ("text_config.torchscript", False),
        ("vision_config.torchscript", False),
        ("is_encoder_decoder", False),
        ("text_config.add_cross_attention", False),
        ("pruned_heads", {}),
        ("text_config.max_length", 20),
        ("text_config.bad_words_ids", None),
        ("tie_word_embeddings", True),  # contradicts text_config; the stored head decides
    ],
)
def test_what_libraries_leave_out_or_add_changes_nothing(path: str, value: Any) -> None:
    assert model_config(put(path, value), has_head=True) == model_config(golden(), has_head=True)


def test_older_rope_spelling_means_the_same() -> None:
    raw = golden()
    parameters = raw["text_config"].pop("rope_parameters")
    raw["text_config"]["rope_theta"] = parameters.pop("rope_theta")
    raw["text_config"]["rope_scaling"] = parameters
    assert model_config(raw, has_head=True) == model_config(golden(), has_head=True)
    raw["text_config"]["rope_scaling"] = None
    assert model_config(raw, has_head=True).text.rope == RopeConfig(1e6)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "factor"),
    [
        (1.0, 0.0, 1 + 0.1 * math.log(64)),
        (1.0, 1.0, 1.0),
        (None, None, 1 + 0.1 * math.log(64)),
        (2.0, 0.0, 1 + 0.1 * math.log(64)),  # one of the two alone counts for nothing
        (0.707, 1.0, (1 + 0.0707 * math.log(64)) / (1 + 0.1 * math.log(64))),
    ],
)
def test_attention_factor_follows_the_publishing_library(
    mscale: float | None, all_dim: float | None, factor: float
) -> None:
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "mscale": mscale, "mscale_all_dim": all_dim,
    }  # fmt: skip
    rope = rope_config(parameters, "rope")
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert rope_config({**parameters, "attention_factor": factor}, "rope") == rope
    assert replace(rope, factor=1.0).attention_factor == 1.0


@pytest.mark.parametrize("positions", [4096, 4097])
@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_a_window_is_what_silence_means_for_type_mistral(kind: str, positions: int) -> None:
    raw = put("text_config.max_position_embeddings", positions)
    raw["text_config"]["model_type"] = kind
    assert raw["text_config"]["sliding_window"] is None
    full = model_config(raw, has_head=True)
    del raw["text_config"]["sliding_window"]
    if kind == "mistral" and positions > 4096:
        with pytest.raises(CheckpointError, match=r'which means 4096.*"sliding_window": null'):
            model_config(raw, has_head=True)
    else:
        assert model_config(raw, has_head=True) == full


@pytest.mark.parametrize("window", [1024, 1025, 4096])
@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_a_window_as_long_as_the_context_hides_nothing(kind: str, window: int) -> None:
    raw = put("text_config.model_type", kind)
    assert raw["text_config"]["max_position_embeddings"] == 1024
    full = model_config(raw, has_head=True)
    raw["text_config"]["sliding_window"] = window
    assert model_config(raw, has_head=True) == full


LLAVA = {
    "model_type": "llava", "vision_feature_select_strategy": "full", "spatial_merge_size": ...,
    "image_seq_length": 1,
}  # fmt: skip


def llava(**changes: Any) -> dict[str, Any]:
    """The golden config as of the class that was made for Pixtral 12B."""
    raw = golden() | LLAVA | changes
    return {name: value for name, value in raw.items() if value is not ...}


def test_llava_of_a_pixtral_tower_has_no_merger() -> None:
    vision = model_config(llava(), has_head=True).vision
    assert vision is not None
    assert (vision.has_merger, vision.spatial_merge_size, vision.feature_layer) == (False, 1, -1)
    assert (vision.image_token_id, vision.projector_bias) == (10, False)
    # What its class means by saying nothing.
    silent = llava(image_token_index=..., multimodal_projector_bias=..., vision_feature_layer=...)
    vision = model_config(silent, has_head=True).vision
    assert vision is not None
    found = (vision.image_token_id, vision.projector_bias, vision.feature_layer)
    assert found == (32000, True, -2)


@pytest.mark.parametrize("strategy", ["default", ...])
def test_llava_that_drops_a_patch_is_refused(strategy: Any) -> None:
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy = 'default'"):
        model_config(llava(vision_feature_select_strategy=strategy), has_head=True)


def test_a_written_llava_config_is_read_as_itself() -> None:
    config = model_config(llava(), has_head=True)
    assert model_config(hub_config(config), has_head=True) == config


def test_query_scale_needs_the_length_it_counts_from() -> None:
    with pytest.raises(CheckpointError, match="needs original_max_position_embeddings"):
        rope_config({"rope_theta": 1e5, "llama_4_scaling_beta": 0.1}, "rope")


@pytest.mark.parametrize("kind", ["mistral3", "ministral3"])
def test_the_stored_head_decides_what_the_config_leaves_open(make: Any, kind: str) -> None:
    raw = hub_config(make.full if kind == "mistral3" else make.text_only)
    raw.pop("tie_word_embeddings")
    raw.get("text_config", raw).pop("tie_word_embeddings", None)
    assert model_config(raw, has_head=True).text.tied_head is False
    assert model_config(raw, has_head=False).text.tied_head is True
    # The library's own defaults, where nobody can look at the tensors.
    assert model_config(raw, has_head=None).text.tied_head is (kind == "mistral3")


def test_a_tied_model_that_stores_a_head_is_refused(make: Any) -> None:
    raw = hub_config(make.text_only) | {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="store a head of their own"):
        model_config(raw, has_head=True)
    assert model_config(raw, has_head=False).text.tied_head


def test_both_names_of_the_image_token() -> None:
    raw = golden()
    raw["image_token_id"] = raw.pop("image_token_index") + 5
    vision = model_config(raw, has_head=True).vision
    assert vision is not None and vision.image_token_id == 15


NATIVE_TOWER: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48,
    "patch_size": 16, "image_size": 64,
}  # fmt: skip
NATIVE: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
    "rope_theta": 1e6, "norm_eps": 1e-5, "vocab_size": 128,
    "yarn": {"original_max_position_embeddings": 4096, "factor": 64, "apply_scale": True,
             "beta": 4, "alpha": 1},
}  # fmt: skip


def test_native_yarn_follows_apply_scale() -> None:
    rope = native_config(NATIVE, has_head=True).text.rope
    assert rope == RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, 1.0, 0.0, 0.0)
    off = {**NATIVE, "yarn": {**NATIVE["yarn"], "apply_scale": False}}
    assert native_config(off, has_head=True).text.rope.mscale_all_dim == 1.0
    scaled = {**NATIVE, "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 4096}}
    assert native_config(scaled, has_head=True).text.rope.llama_4_scaling_beta == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, "moe = .* is not implemented"),
        ({"use_biases": True}, "use_biases = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096: .* the last 4096 positions of 131072"),
        ({"vision_encoder": {**NATIVE_TOWER, "mm_projector_id": "patch_merge"}}, "without a norm"),
        ({"vision_encoder": {**NATIVE_TOWER, "spatial_merge_size": 2}}, "without a norm"),
        ({"softcap": 3}, "unknown field .* softcap = 3"),
        ({"yarn": {**NATIVE["yarn"], "gamma": 1}}, "yarn: unknown field"),
        (
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}},
            "counts from 8",
        ),
        ({"dim": None}, "lacks dim"),
    ],
)
def test_native_fields_are_read_as_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        native_config({**NATIVE, **change}, has_head=True)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else []
    )
    return [p for key in keys for p in ((*prefix, key), *paths(value[key], (*prefix, key)))]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(data=st.data(), junk=JUNK)
def test_junk_anywhere_gives_a_config_or_a_clear_error(data: st.DataObject, junk: Any) -> None:
    raw = golden()
    *parents, last = data.draw(st.sampled_from(paths(raw)))
    here = raw
    for parent in parents:
        here = here[parent]
    here[last] = junk
    try:
        config = model_config(raw, has_head=data.draw(st.sampled_from([None, True, False])))
    except CheckpointError:
        return
    assert config.text.num_layers <= 4096


@given(data=st.data(), junk=JUNK)
def test_junk_in_params_json(data: st.DataObject, junk: Any) -> None:
    raw = json.loads(json.dumps(NATIVE))
    *parents, last = data.draw(st.sampled_from(paths(raw)))
    here = raw
    for parent in parents:
        here = here[parent]
    here[last] = junk
    with contextlib.suppress(CheckpointError):
        native_config(raw, has_head=True)


def test_what_native_files_leave_out_is_what_the_publisher_s_library_takes() -> None:
    bare = {k: v for k, v in NATIVE["yarn"].items() if k not in ("beta", "alpha", "apply_scale")}
    rope = native_config({**NATIVE, "yarn": bare}, has_head=True).text.rope
    assert (rope.beta_fast, rope.beta_slow, rope.mscale_all_dim) == (32.0, 1.0, 1.0)
    tower = {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 24, "patch_size": 2, "image_size": 28,
        "mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True,
    }  # fmt: skip
    vision = native_config({**NATIVE, "vision_encoder": tower}, has_head=True).vision
    assert vision is not None
    assert (vision.head_dim, vision.num_channels, vision.spatial_merge_size) == (8, 3, 1)
    assert (vision.projector_bias, vision.image_token_id) == (False, 10)
    told = {**tower, "adapter_bias": True, "spatial_merge_size": 2, "image_token_id": 7}
    vision = native_config({**NATIVE, "vision_encoder": told}, has_head=True).vision
    assert vision is not None and vision.projector_bias
    assert (vision.spatial_merge_size, vision.image_token_id) == (2, 7)
