"""Whole exports against Model Optimizer's, as docs/reference/formats.md#what-equal-means asks."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_models import DATA, MODELS
from halfbyte.calibrate.stream import KEYS, READERS, VALUES, LayerStatistics
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import read_config
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.formats.fp8 import Profile
from halfbyte.modules import decoder_linears
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.layer import cache_scales, quantize_layer
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe
from tolerances import OWN_FORWARD_SCALE, OWN_FORWARD_SCALE_MOST

GoldenModel = Callable[[str], Path]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def is_measured(name: str) -> bool:
    return name.endswith((".input_scale", ".k_scale", ".v_scale"))


@pytest.mark.parametrize("model", MODELS)
def test_export_is_the_reference_export(
    golden_model: GoldenModel, model: str, tmp_path: Path
) -> None:
    golden = golden_model(model)
    config = QuantizeConfig(
        source=golden / "source",
        output=tmp_path / "out",
        recipe=load_recipe("medium-3.5"),
        calibration_tokens=golden / "calibration.safetensors",
    )
    quantize(config)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(golden / "export")
    assert ours.keys() == theirs.keys()
    far = 0
    for name, expected in theirs.items():
        if not is_measured(name):
            assert same_bytes(ours[name], expected), name
            continue
        assert ours[name].dtype == torch.float32 and ours[name].shape == ()
        error = abs(float(ours[name]) / float(expected) - 1)
        assert error <= OWN_FORWARD_SCALE, name
        far += error > OWN_FORWARD_SCALE_MOST
    assert far < sum(map(is_measured, theirs)) / 4
    for file in ("config.json", "hf_quant_config.json"):
        assert _facts(tmp_path / "out" / file) == _facts(golden / "export" / file)
    assert Checkpoint.open(tmp_path / "out").quantization.dialect == "modelopt"


def _facts(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(path.read_text())
    for part in (raw, raw.get("quantization_config", {})):
        part.pop("producer", None)
        part.pop("transformers_version", None)
    return raw


@pytest.mark.parametrize(
    "model, profile",
    [
        (model, profile)
        for model in MODELS
        for profile in ("ieee", "cuda")
        if (model, profile) != ("modelopt-tiny-fp8", "cuda")  # the reference has none
    ],
)
def test_recorded_maxima_give_the_reference_bytes(
    golden_model: GoldenModel, model: str, profile: Profile
) -> None:
    golden = golden_model(model)
    recorded = load_file(golden / "amax-before-export.safetensors")
    checkpoint = Checkpoint.open(golden / "source")
    plan = make_plan(load_recipe("medium-3.5"), checkpoint.config)
    expected = (
        tensors_of(golden / "export")
        if profile == "ieee"
        else load_file(golden / "export-cuda-subset.safetensors")
    )
    compared = 0
    for layer in range(checkpoint.config.text.num_layers):
        statistics = LayerStatistics(layer, _observed(recorded, layer))
        made = cache_scales(layer, statistics, profile, "amax")
        cpu = torch.device("cpu")
        for linear in quantize_layer(checkpoint, layer, plan, statistics, profile, cpu):
            made |= linear.tensors
        for name, tensor in made.items():
            foreign = _reference_name(name)
            if foreign in expected:
                assert same_bytes(tensor, expected[foreign]), name
                compared += 1
    quantized = [name for name in expected if "layers." in name and "norm" not in name]
    assert compared == len([name for name in quantized if "language_model" in name])
    assert compared > len(decoder_linears(checkpoint.config))


@pytest.mark.parametrize("profile", ["ieee", "cuda"])
def test_the_hardest_bf16_layer_has_the_reference_bytes(tmp_path: Path, profile: Profile) -> None:
    """Zero blocks, ties and scales at their limits, from BF16; all other weights are ones."""
    kept = DATA / "golden" / "modelopt-tiny"
    tmp_path.joinpath("config.json").write_bytes(
        (DATA / "checkpoint/modelopt-tiny/source-config.json").read_bytes()
    )
    config, quantization, _ = read_config(tmp_path)
    source = load_file(kept / "source-layer-4.safetensors")
    ones = {
        foreign_name(name, "hf", "none"): torch.ones(want.shape, dtype=torch.bfloat16)
        for name, want in expected_tensors(config, quantization).items()
    }
    assert source.keys() < ones.keys()
    save_file({**ones, **source}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    plan = make_plan(load_recipe("medium-3.5"), config)
    recorded = load_file(kept / "amax-before-export.safetensors")
    statistics = LayerStatistics(4, _observed(recorded, 4))
    made = cache_scales(4, statistics, profile, "amax")
    for linear in quantize_layer(checkpoint, 4, plan, statistics, profile, torch.device("cpu")):
        made |= linear.tensors
    found = {_reference_name(name): _described(tensor) for name, tensor in made.items()}
    expected = json.loads((kept / "export-layer-4.json").read_text())[profile]
    assert len(expected) == 20 and {name: found[name] for name in expected} == expected


def _described(tensor: Tensor) -> list[Any]:
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def _observed(recorded: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.language_model.layers.{layer}"
    cache = {KEYS: "k", VALUES: "v"}
    observed = {tap: recorded[f"{prefix}.self_attn.{x}_bmm_quantizer"] for tap, x in cache.items()}
    for tap, readers in READERS.items():
        module = _reference_name(f"decoder.{layer}.{readers[0]}.weight").removesuffix(".weight")
        observed[tap] = recorded[f"{module}.input_quantizer"]
    return observed


def _reference_name(name: str) -> str:
    """A second spelling of the names, so that a slip in the first one shows."""
    _, layer, rest = name.split(".", 2)
    group, rest = rest.split(".", 1)
    if rest in ("k_scale", "v_scale"):
        rest = f"{rest[0]}_proj.{rest}"
    else:
        short, role = rest.split(".")
        rest = f"{short}_proj.{'weight_scale_2' if role == 'tensor_scale' else role}"
    part = "self_attn" if group == "attention" else "mlp"
    return f"model.language_model.layers.{layer}.{part}.{rest}"
