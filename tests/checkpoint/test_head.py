"""A quantized output head on disk: as Model Optimizer writes it, and as we read it back."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.metadata import Quantization, read_config_in
from halfbyte.checkpoint.names import Layout
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.checkpoint.written_metadata import PRODUCER, hub_config, modelopt_configs
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.modules import WeightFormat, decoder_linears
from vllm_rules import require_vllm_reads

# What Model Optimizer 0.47 says of small models of 12 layers, by the formats that it was told:
# beside each a table of who gets which.
RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data/checkpoint/modelopt-heads.json").read_text()
)
CHOSEN: dict[str, tuple[str, str, str]] = {
    "attention fp8, mlp and head nvfp4": ("fp8", "nvfp4", "nvfp4"),
    "all nvfp4, head fp8": ("nvfp4", "nvfp4", "fp8"),
    "all and head nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
    "all and head fp8": ("fp8", "fp8", "fp8"),
    "all nvfp4": ("nvfp4", "nvfp4", "bf16"),
    "head nvfp4 alone": ("bf16", "bf16", "nvfp4"),
    "mlp and head nvfp4": ("bf16", "nvfp4", "nvfp4"),
    "all but layer 1 nvfp4, head nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
    "all but layer 3 and the mlp of 5 fp8": ("fp8", "fp8", "bf16"),
}
LEFT = {
    "all but layer 1 nvfp4, head nvfp4": r"decoder\.1\..*",
    "all but layer 3 and the mlp of 5 fp8": r"decoder\.(3|5\.mlp)\..*",
}


def formats_of(case: str, config: ModelConfig) -> dict[str, WeightFormat]:
    attention, mlp, head = CHOSEN[case]
    formats: dict[str, Any] = {
        x.name: attention if x.group == "attention" else mlp for x in decoder_linears(config)
    }
    left = re.compile(LEFT.get(case, "none"))
    found: dict[str, Any] = {
        name: "bf16" if left.fullmatch(name) else x for name, x in formats.items()
    }
    if head != "bf16":
        found["head"] = head
    return found


def twelve(make: Any, *, has_vision: bool) -> ModelConfig:
    config: ModelConfig = make.full if has_vision else make.text_only
    return replace(config, text=replace(config.text, num_layers=12))


@pytest.mark.parametrize("name", RECORDED)
def test_both_files_say_of_heads_what_the_reference_says(make: Any, name: str) -> None:
    kind, _, case = name.partition(": ")
    config = twelve(make, has_vision=kind == "vision")
    layout: Layout = "hf" if kind == "vision" else "hf-text"
    config_file, older = modelopt_configs(
        hub_config(config), formats_of(case, config), "fp8", layout
    )
    version = json.dumps(PRODUCER["version"])
    # Ours says the size of blocks in this file too, where engines look for it.
    size = config_file["quantization_config"].pop("group_size", None)
    assert size == (16 if older["quantization"]["quant_algo"] == "NVFP4" else None)
    for mine, theirs in (
        (config_file["quantization_config"], RECORDED[name]["quantization_config"]),
        (older, RECORDED[name]["hf_quant_config"]),
    ):
        assert json.dumps(mine).replace(version, '"0.47.0"') == json.dumps(theirs)


@pytest.mark.parametrize("layout", ["hf", "hf-old", "hf-text"])
@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_written_of_a_head_is_read_back(
    make: Any, tmp_path: Path, layout: Layout, case: str
) -> None:
    config = twelve(make, has_vision=layout != "hf-text")
    quantization = Quantization("modelopt", formats_of(case, config), "fp8")
    made = make.write(tmp_path, config, quantization, layout)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quantization == quantization
    assert checkpoint.names() == tuple(name for name in checkpoint.names() if name in made)
    assert set(checkpoint.names()) == set(made)
    assert verify(tmp_path).is_sound
    if layout != "hf-old":
        require_vllm_reads(tmp_path)
    # Either file alone says the same.
    raw = json.loads((tmp_path / "config.json").read_text())
    older = (tmp_path / "hf_quant_config.json").rename(tmp_path / "kept")
    assert Checkpoint.open(tmp_path).quantization == quantization
    older.rename(tmp_path / "hf_quant_config.json")
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Checkpoint.open(tmp_path).quantization == quantization


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_choice_of_formats_is_said_and_read(
    make: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Layers left out whole, beside others whose number begins alike, heads in any format."""
    config = twelve(make, has_vision=data.draw(st.booleans()))
    kinds = data.draw(
        st.sampled_from([["nvfp4", "bf16"], ["fp8", "bf16"], ["fp8", "nvfp4", "bf16"]])
    )
    chosen = data.draw(st.lists(st.sampled_from(kinds), min_size=4 * 12 + 1, max_size=4 * 12 + 1))
    groups = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    formats: dict[str, Any] = {}
    for x in decoder_linears(config):
        assert x.layer is not None
        short = x.name.rpartition(".")[2]
        place = next(i for i, group in enumerate(groups) if short in group)
        formats[x.name] = chosen[4 * x.layer + place]
    if chosen[-1] != "bf16":
        formats["head"] = chosen[-1]
    if set(formats.values()) == {"bf16"}:
        return
    folder = tmp_path_factory.mktemp("any")
    layout: Layout = "hf-text" if config.vision is None else "hf"
    raw, older = modelopt_configs(hub_config(config), formats, "fp8", layout)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "hf_quant_config.json").write_text(json.dumps(older))
    _, quantization, _ = read_config_in(folder, layout, has_head=True)
    assert quantization.formats == formats


def test_a_tied_model_has_no_head_to_quantize(make: Any, tmp_path: Path) -> None:
    tied = replace(make.text_only, text=replace(make.text, tied_head=True))
    formats: dict[str, Any] = {x.name: "fp8" for x in decoder_linears(tied)}
    make.write(tmp_path, tied, Quantization("modelopt", formats, "fp8"), "hf-text")
    assert Checkpoint.open(tmp_path).quantization.formats == formats
    raw, older = modelopt_configs(hub_config(tied), {**formats, "head": "nvfp4"}, "fp8", "hf-text")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(older))
    with pytest.raises(CheckpointError, match="names lm_head, which is no decoder linear"):
        Checkpoint.open(tmp_path)
