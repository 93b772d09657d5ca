import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.fields import model_config
from halfbyte.checkpoint.metadata import Quantization, read_config, read_config_in
from halfbyte.checkpoint.names import Layout
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.written_metadata import (
    PRODUCER,
    hub_config,
    mistral_fp8_config,
    modelopt_configs,
)
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.modules import WeightFormat, decoder_linears

DATA = Path(__file__).parents[1] / "data/checkpoint"
GOLDEN = ("modelopt-tiny", "modelopt-tiny-fp8")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


def formats_of(config: ModelConfig, group: str, chosen: WeightFormat) -> dict[str, WeightFormat]:
    return {x.name: chosen if x.group == group else "bf16" for x in decoder_linears(config)}


@pytest.mark.parametrize("model", GOLDEN)
def test_both_files_equal_the_references_byte_for_byte(make: Any, model: str) -> None:
    raw = json.loads((DATA / model / "source-config.json").read_text())
    config = model_config(raw, has_head=True)
    mine = modelopt_configs(raw, make.mixed_formats(config), "fp8", "hf")
    version = json.dumps(PRODUCER["version"])
    for name, value in zip(("export-config.json", "hf_quant_config.json"), mine, strict=True):
        text = json.dumps(value, indent=4).replace(version, '"0.47.0"')
        assert text == (DATA / model / name).read_text().strip()


@pytest.mark.parametrize("layout", ["hf", "hf-old", "hf-text"])
@pytest.mark.parametrize("kind", ["mixed", "fp8", "nvfp4", "mlp", "one"])
@pytest.mark.parametrize("kv_cache", ["fp8", "bf16"])
def test_what_is_written_is_read_back(
    make: Any, tmp_path: Path, layout: Layout, kind: str, kv_cache: Any
) -> None:
    config = make.text_only if layout == "hf-text" else make.full
    formats = {
        "mixed": make.mixed_formats(config),
        "fp8": {x.name: "fp8" for x in decoder_linears(config)},
        "nvfp4": {x.name: "nvfp4" for x in decoder_linears(config)},
        "mlp": formats_of(config, "mlp", "nvfp4"),
        "one": {x.name: "fp8" if x.name.endswith("3.mlp.down") else "bf16"
                for x in decoder_linears(config)},
    }[kind]  # fmt: skip
    quantization = Quantization("modelopt", formats, kv_cache)
    make.write(tmp_path, config, quantization, layout)
    assert read_config(tmp_path)[:2] == (config, quantization)
    # Either file alone says the same.
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "hf_quant_config.json").rename(tmp_path / "kept")
    assert Checkpoint.open(tmp_path).quantization == quantization
    (tmp_path / "kept").rename(tmp_path / "hf_quant_config.json")
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Checkpoint.open(tmp_path).quantization == quantization


def test_uniform_exclusions_as_the_reference_writes_them(make: Any) -> None:
    config = make.full
    raw = hub_config(config)
    fp8, older = modelopt_configs(
        raw, {x.name: "fp8" for x in decoder_linears(config)}, "fp8", "hf"
    )
    stated = fp8["quantization_config"]
    assert stated["ignore"] == [
        "lm_head",
        "model.language_model.embed_tokens",
        "model.multi_modal_projector*",
        "model.vision_tower*",
    ]
    assert older["quantization"]["exclude_modules"] == stated["ignore"]
    assert stated["quant_algo"] == "FP8" and "quantized_layers" not in stated
    assert stated["config_groups"]["group_0"]["targets"] == ["Linear"]
    nvfp4, _ = modelopt_configs(raw, formats_of(config, "mlp", "nvfp4"), "bf16", "hf")
    stated = nvfp4["quantization_config"]
    assert stated["group_size"] == 16 and "kv_cache_scheme" not in stated
    assert "model.language_model.layers.5.self_attn*" in stated["ignore"]
    assert sum("self_attn" in name for name in stated["ignore"]) == config.text.num_layers


def test_names_follow_the_layout_of_the_tensors(make: Any) -> None:
    prefixes: dict[Layout, str] = {
        "hf": "model.language_model.layers.",
        "hf-old": "language_model.model.layers.",
        "hf-text": "model.layers.",
    }
    for layout, prefix in prefixes.items():
        config = make.text_only if layout == "hf-text" else make.full
        written, older = modelopt_configs(
            hub_config(config), make.mixed_formats(config), "fp8", layout
        )
        layers = written["quantization_config"]["quantized_layers"]
        assert list(layers) == list(older["quantization"]["quantized_layers"])
        assert len(layers) == 42 and all(name.startswith(prefix) for name in layers)
        assert [name.rpartition(".")[2] for name in layers][:7] == [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]  # fmt: skip


def test_layer_10_sorts_before_layer_2_among_targets_only(make: Any) -> None:
    config = ModelConfig(replace(make.text, num_layers=12), None)
    written, _ = modelopt_configs(hub_config(config), make.mixed_formats(config), "fp8", "hf-text")
    stated = written["quantization_config"]
    attention = [n for n in stated["config_groups"]["group_0"]["targets"] if "q_proj" in n]
    assert [int(n.split(".")[2]) for n in attention] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    ordered = [int(n.split(".")[2]) for n in stated["quantized_layers"] if "q_proj" in n]
    assert ordered == list(range(12))


def test_the_sources_own_quantization_is_replaced(make: Any) -> None:
    raw = mistral_fp8_config(hub_config(make.full), "hf")
    assert raw["quantization_config"]["modules_to_not_convert"] == [
        "model.vision_tower", "model.multi_modal_projector", "lm_head",
    ]  # fmt: skip
    written, _ = modelopt_configs(raw, make.mixed_formats(make.full), "fp8", "hf")
    assert written["quantization_config"]["quant_method"] == "modelopt"
    assert list(written)[-1] == "quantization_config"


def test_nothing_quantized_has_no_export(make: Any) -> None:
    formats: dict[str, WeightFormat] = {x.name: "bf16" for x in decoder_linears(make.full)}
    with pytest.raises(CheckpointError, match="nothing is quantized"):
        modelopt_configs(hub_config(make.full), formats, "fp8", "hf")


def stated_edit(**changes: Any) -> Any:
    def change(raw: dict[str, Any]) -> None:
        raw["quantization_config"].update(changes)

    return change


LAYER = "model.language_model.layers.4.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stated_edit(quant_algo="INT4_AWQ"), "quant_algo 'INT4_AWQ' is not implemented"),
        (stated_edit(quantized_layers={}), "needs quantized_layers"),
        (
            stated_edit(quantized_layers={"model.embed_tokens": {"quant_algo": "FP8"}}),
            "names model.embed_tokens",
        ),
        (
            stated_edit(quantized_layers={LAYER: {"quant_algo": "W4A16_NVFP4"}}),
            "W4A16_NVFP4 is not implemented",
        ),
        (
            stated_edit(quantized_layers={LAYER: {"quant_algo": "NVFP4", "group_size": 32}}),
            "group_size = 32 is not implemented",
        ),
        (
            stated_edit(
                quantized_layers={
                    "language_model.model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}
                }
            ),
            "no decoder linear and no head of its own of this model in the spelling",
        ),
        (stated_edit(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (stated_edit(quant_method="awq"), "quant_method = 'awq' is not implemented"),
        (stated_edit(rotation="hadamard"), "unknown field .* rotation = 'hadamard'"),
        (stated_edit(config_groups={"group_0": {"weights": {"num_bits": 3}}}), "config_groups"),
        (
            lambda raw: raw.update(quantization_config={"quantization": {"quant_algo": "FP8"}}),
            "the nested form",
        ),
        (
            stated_edit(quantized_layers={LAYER: {"quant_algo": "NVFP4"}}),
            "disagree about decoder.0.attention.q",
        ),
        (stated_edit(kv_cache_scheme=None), "disagree about the KV cache"),
    ],
)
def test_quantization_that_we_do_not_implement_is_refused(
    make: Any, edit: Any, tmp_path: Path, change: Any, message: str
) -> None:
    make.checkpoint(tmp_path, "modelopt")
    edit(tmp_path / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stated_edit(activation_scheme="dynamic"), "activation_scheme = 'dynamic'"),
        (stated_edit(weight_block_size=[128, 128]), "weight_block_size"),
        (stated_edit(ignored_layers=["x"]), "unknown field .* ignored_layers"),
        (stated_edit(modules_to_not_convert="lm_head"), "must be a list of names"),
    ],
)
def test_fp8_sources_of_another_scheme_are_refused(
    make: Any, edit: Any, tmp_path: Path, change: Any, message: str
) -> None:
    make.checkpoint(tmp_path, "mistral-fp8")
    edit(tmp_path / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_fp8_source_may_leave_decoder_modules_alone(make: Any, tmp_path: Path) -> None:
    formats = formats_of(make.full, "mlp", "fp8")
    make.write(tmp_path, make.full, Quantization("mistral-fp8", formats, "bf16"))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] += [
        f"model.language_model.layers.{n}.self_attn" for n in range(make.text.num_layers)
    ]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Checkpoint.open(tmp_path).quantization.formats == formats


@pytest.mark.parametrize("vision", [True, False])
def test_hub_config_says_what_the_config_says(make: Any, vision: bool) -> None:
    config = make.full if vision else make.text_only
    assert model_config(hub_config(config), has_head=True) == config


def test_a_model_can_be_described_before_its_weights_are_there(make: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hub_config(make.full)))
    config, quantization, raw = read_config(tmp_path)
    assert config == make.full and quantization.dialect == "none"
    assert raw["model_type"] == "mistral3"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path / "..")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), junk=JUNK)
def test_junk_about_quantization_is_a_clear_error(
    make: Any, tmp_path: Path, data: st.DataObject, junk: Any
) -> None:
    """Wherever junk stands, the answer is another reading or a CheckpointError, never a crash."""
    config = make.text_only
    raw, older = modelopt_configs(hub_config(config), make.mixed_formats(config), "fp8", "hf-text")
    target = data.draw(st.sampled_from([raw["quantization_config"], older["quantization"]]))
    key = data.draw(st.sampled_from(sorted(target)))
    inner = target[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.sampled_from(sorted(inner)))] = junk
    else:
        target[key] = junk
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(older))
    with contextlib.suppress(CheckpointError):
        read_config_in(tmp_path, "hf-text", has_head=True)
