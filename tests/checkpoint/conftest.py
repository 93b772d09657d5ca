"""Small random checkpoints in every dialect and layout, written by the format's own library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from zlib import crc32

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import Quantization, unquantized
from halfbyte.checkpoint.names import Layout, foreign_name, hub_to_native_rows, rotary_heads
from halfbyte.checkpoint.written_metadata import hub_config, mistral_fp8_config, modelopt_configs
from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.formats.nvfp4 import encode_nvfp4, nvfp4_tensor_scale
from halfbyte.model.tiny import native_params
from halfbyte.modules import WeightFormat, decoder_linears, fused_partners

YARN = RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, 1.0, 0.0, 0.0)
TEXT = TextConfig(6, 32, 4, 2, 8, 48, 64, 1e-5, 262144, YARN, False, 1, (2,), 11)
VISION = VisionConfig(2, 16, 2, 8, 24, 2, 28, 3, 10000.0, 1e-5, "silu", 2, "gelu", False, 10, -1)


def mixed_formats(config: ModelConfig) -> dict[str, WeightFormat]:
    """Attention and the edge MLPs FP8, interior MLPs NVFP4."""
    last = config.text.num_layers - 1
    interior = [
        x.name
        for x in decoder_linears(config)
        if x.group == "mlp" and x.layer is not None and 4 <= x.layer < last
    ]
    return {x.name: "nvfp4" if x.name in interior else "fp8" for x in decoder_linears(config)}


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Canonical bf16 tensors, each a function of its name alone."""
    made = {}
    for name, expected in expected_tensors(config, unquantized(config)).items():
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        made[name] = torch.randn(expected.shape, generator=generator).to(torch.bfloat16)
    return made


def quantized(config: ModelConfig, quantization: Quantization) -> dict[str, Tensor]:
    """Canonical tensors of a quantized checkpoint, by the rules of halfbyte.formats."""
    made = {}
    plain = weights(config)
    for name, weight in plain.items():
        linear = name.removesuffix(".weight")
        match quantization.formats.get(linear, "bf16"):
            case "bf16":
                made[name] = weight
            case "fp8":
                dtype = torch.float32
                if quantization.dialect == "mistral-fp8":
                    dtype = torch.bfloat16
                scale = fp8_scale(weight.abs().amax()).to(dtype)
                made[name] = encode_fp8(weight, scale.float())
                made[f"{linear}.weight_scale"] = scale
                made[f"{linear}.input_scale"] = torch.tensor(0.01, dtype=dtype)
            case "nvfp4":
                amax = torch.stack(
                    [plain[f"{p}.weight"].abs().amax() for p in fused_partners(linear)]
                ).amax()
                codes, scale, tensor_scale = encode_nvfp4(weight, nvfp4_tensor_scale(amax))
                made[name] = codes
                made[f"{linear}.weight_scale"] = scale
                made[f"{linear}.tensor_scale"] = tensor_scale
                made[f"{linear}.input_scale"] = torch.tensor(0.002)
    if quantization.kv_cache == "fp8":
        for layer in range(config.text.num_layers):
            made[f"decoder.{layer}.attention.k_scale"] = torch.tensor(0.03)
            made[f"decoder.{layer}.attention.v_scale"] = torch.tensor(0.02)
    return made


def params_json(config: ModelConfig, quantization: Quantization) -> dict[str, object]:
    """The native config of a test model."""
    dialect: Literal["none", "mistral-fp8"] = "none"
    if quantization.dialect == "mistral-fp8":
        dialect = "mistral-fp8"
    params = native_params(config.text, dialect)
    params["model_type"] = "transformer"
    vision = config.vision
    if vision is not None:
        params["vision_encoder"] = {
            "image_token_id": vision.image_token_id,
            "image_break_token_id": 12,
            "image_end_token_id": 13,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "mm_projector_id": "patch_merge",
            "spatial_merge_size": vision.spatial_merge_size,
            "hidden_size": vision.width,
            "num_channels": vision.num_channels,
            "image_size": vision.image_size,
            "max_image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "rope_theta": vision.rope_theta,
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": vision.projector_bias,
        }
    return params


def build(
    directory: Path,
    config: ModelConfig,
    quantization: Quantization,
    layout: Layout = "hf",
    shards: int = 1,
) -> dict[str, Tensor]:
    """Write a checkpoint; returns its canonical tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = quantized(config, quantization)
    foreign = {}
    for name, tensor in tensors.items():
        heads = rotary_heads(name, config) if layout == "mistral" and tensor.ndim > 1 else None
        stored = tensor if heads is None else hub_to_native_rows(tensor, heads)
        foreign[foreign_name(name, layout, quantization.dialect)] = stored
    stem = "consolidated" if layout == "mistral" else "model"
    _save(directory, foreign, stem, shards)
    if layout == "mistral":
        (directory / "params.json").write_text(json.dumps(params_json(config, quantization)))
        return tensors
    raw = hub_config(config)
    if quantization.dialect == "mistral-fp8":
        raw = mistral_fp8_config(raw, layout)
    if quantization.dialect == "modelopt":
        raw, older = modelopt_configs(raw, quantization.formats, quantization.kv_cache, layout)
        (directory / "hf_quant_config.json").write_text(json.dumps(older))
    (directory / "config.json").write_text(json.dumps(raw))
    return tensors


def _save(directory: Path, foreign: dict[str, Tensor], stem: str, shards: int) -> None:
    if shards == 1:
        save_file(foreign, directory / f"{stem}.safetensors", {"format": "pt"})
        return
    names = sorted(foreign)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: foreign[name] for name in names[number::shards]}
        save_file(part, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def quantization_of(config: ModelConfig, dialect: str) -> Quantization:
    """The usual quantization of a dialect."""
    if dialect == "modelopt":
        return Quantization("modelopt", mixed_formats(config), "fp8")
    if dialect == "mistral-fp8":
        formats: dict[str, WeightFormat] = {x.name: "fp8" for x in decoder_linears(config)}
        return Quantization("mistral-fp8", formats, "bf16")
    return unquantized(config)


class Builder:
    """What tests ask for: small models, and checkpoints of them."""

    text = TEXT
    vision = VISION
    full = ModelConfig(TEXT, VISION)
    text_only = ModelConfig(TEXT, None)
    write = staticmethod(build)
    quantization = staticmethod(quantization_of)
    weights = staticmethod(weights)
    mixed_formats = staticmethod(mixed_formats)

    def checkpoint(
        self,
        directory: Path,
        dialect: str = "none",
        layout: Layout = "hf",
        *,
        shards: int = 1,
        config: ModelConfig | None = None,
    ) -> dict[str, Tensor]:
        config = config or (self.text_only if layout == "hf-text" else self.full)
        return build(directory, config, quantization_of(config, dialect), layout, shards)


@pytest.fixture(scope="session")
def make() -> Builder:
    torch.set_num_threads(2)
    return Builder()


def edit_json(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Rewrite a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def edit() -> Callable[[Path, Callable[[dict[str, object]], None]], None]:
    return edit_json
