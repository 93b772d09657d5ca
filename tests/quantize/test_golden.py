"""Whole exports against Model Optimizer's, as checkpoint-format reference section 10 asks.

The golden data is kept beside the repository; formats are held to a subset of it in tests/formats.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.calibrate.stream import KEYS, READERS, VALUES, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.formats.fp8 import Profile
from halfbyte.modules import decoder_linears
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.layer import cache_scales, quantize_layer
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe
from tolerances import OWN_FORWARD_SCALE, OWN_FORWARD_SCALE_MOST

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
MODELS = ("modelopt-tiny", "modelopt-tiny-fp8")

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the repository"),
]


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
def test_export_is_the_reference_export(model: str, tmp_path: Path) -> None:
    config = QuantizeConfig(
        source=GOLDEN / model / "source",
        output=tmp_path / "out",
        recipe=load_recipe("medium-3.5"),
        calibration_tokens=GOLDEN / model / "calibration.safetensors",
    )
    quantize(config)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / model / "export")
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
        assert _facts(tmp_path / "out" / file) == _facts(GOLDEN / model / "export" / file)
    assert Checkpoint.open(tmp_path / "out").quantization.dialect == "modelopt"


def _facts(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(path.read_text())
    for part in (raw, raw.get("quantization_config", {})):
        part.pop("producer", None)
        part.pop("transformers_version", None)
    return raw


@pytest.mark.parametrize(
    "model, profile",
    [("modelopt-tiny", "ieee"), ("modelopt-tiny", "cuda"), ("modelopt-tiny-fp8", "ieee")],
)
def test_recorded_maxima_give_the_reference_bytes(model: str, profile: Profile) -> None:
    recorded = load_file(GOLDEN / model / "amax-before-export.safetensors")
    checkpoint = Checkpoint.open(GOLDEN / model / "source")
    plan = make_plan(load_recipe("medium-3.5"), checkpoint.config)
    expected = (
        tensors_of(GOLDEN / model / "export")
        if profile == "ieee"
        else load_file(GOLDEN / model / "export-cuda-subset.safetensors")
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
