"""Writes a small random checkpoint in the real layout, for tests, benches and first steps.

The geometry has what makes the big model awkward: head_dim not width / heads, grouped query heads,
YaRN with a position-dependent query scale, an MLP of an odd number of 16-blocks. The weights mean
nothing.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoint.fp8_source import write_fp8_source
from halfbyte.checkpoint.inventory import (
    Expected,
    expected_eagle_tensors,
    expected_tensors,
    shapes_to_write,
)
from halfbyte.checkpoint.metadata import Quantization, unquantized
from halfbyte.checkpoint.names import Layout, foreign_name, hub_to_native_rows, rotary_heads
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.modules import decoder_linears, eagle_fuse

_TEXT = TextConfig(
    num_layers=8,
    width=128,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=304,  # 19 blocks of 16
    vocab_size=512,
    norm_eps=1e-5,
    max_positions=4096,
    rope=RopeConfig(
        theta=1e6,
        kind="yarn",
        factor=64.0,
        original_max_positions=64,
        beta_fast=4.0,
        beta_slow=1.0,
        llama_4_scaling_beta=0.1,
    ),
    tied_head=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=11,
)
_VISION = VisionConfig(
    num_layers=2,
    width=64,
    num_heads=4,
    head_dim=16,
    mlp_width=96,
    patch_size=14,
    image_size=280,
    num_channels=3,
    rope_theta=10000.0,
    norm_eps=1e-5,
    activation="silu",
    spatial_merge_size=2,
    projector_activation="gelu",
    projector_bias=False,
    image_token_id=10,
    feature_layer=-1,
)
# Largest input that the FP8 dialect declares for every linear; normalised inputs stay below it.
_INPUT_AMAX = 8.0


def tiny_config(*, layers: int = 8, vision: bool = False, tied_head: bool = False) -> ModelConfig:
    """The architecture that `write_tiny_checkpoint` writes unless told another."""
    text = replace(_TEXT, num_layers=layers, tied_head=tied_head)
    return ModelConfig(text, _VISION if vision else None)


def write_tiny_checkpoint(
    directory: str | Path,
    *,
    layers: int = 8,
    seed: int = 0,
    vision: bool = False,
    tied_head: bool = False,
    dialect: Literal["none", "mistral-fp8"] = "none",
    config: ModelConfig | None = None,
    layout: Layout | None = None,
    raw_config: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Write random weights of `tiny_config(...)`, or of `config`, to a new directory.

    dialect     "none" is bf16; "mistral-fp8" is what Mistral publishes
    layout      a hub layout; else `hf`, or `hf-text` without vision
    raw_config  a config.json that says what `config` says, in other words; else one is made
    returns     the config; equal arguments give equal bytes
    """
    config = config or tiny_config(layers=layers, vision=vision, tied_head=tied_head)
    directory = Path(directory)
    layout = layout or ("hf" if config.vision is not None else "hf-text")
    raw_config = raw_config or hub_config(config)
    if dialect == "none":
        _write_bf16(directory, config, seed, layout, raw_config)
        return config
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "bf16"
        _write_bf16(plain, config, seed, layout, raw_config)
        amax = {linear.name: _INPUT_AMAX for linear in decoder_linears(config)}
        write_fp8_source(Checkpoint.open(plain), amax, directory)
    return config


def write_tiny_eagle(
    directory: str | Path,
    target: ModelConfig,
    *,
    layers: int = 2,
    seed: int = 0,
    dialect: Literal["none", "mistral-fp8"] = "none",
    replaced: Mapping[str, Tensor] | None = None,
) -> ModelConfig:
    """Write a random EAGLE draft model for `target` in Mistral's layout to a new directory.

    dialect   "mistral-fp8" has every linear in FP8, `eagle_linear` too
    replaced  canonical tensor name -> what is written instead of random bf16 weights
    returns   the draft model's config
    """
    directory = Path(directory)
    directory.mkdir(parents=True)
    config = ModelConfig(replace(target.text, num_layers=layers, tied_head=False), None)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, Tensor] = {}
    for name, expected in expected_eagle_tensors(config, bf16_eagle(config)).items():
        values = (replaced or {}).get(name, _random(name, expected, generator))
        heads = rotary_heads(name, config)
        if heads is not None:
            values = hub_to_native_rows(values, heads)
        linear = name.removesuffix(".weight")
        if dialect == "none" or "norm" in linear:
            files[foreign_name(name, "mistral", "none")] = values.contiguous()
            continue
        scale = fp8_scale(values.abs().amax()).to(torch.bfloat16)
        codes = encode_fp8(values, scale.float(), "direct")
        input_scale = fp8_scale(torch.tensor(_INPUT_AMAX)).to(torch.bfloat16).reshape(())
        for role, tensor in (
            ("weight", codes),
            ("weight_scale", scale),
            ("input_scale", input_scale),
        ):
            files[foreign_name(f"{linear}.{role}", "mistral", dialect)] = tensor
    save_file(files, directory / "consolidated.safetensors")
    params = json.dumps(native_params(config.text, dialect), indent=4)
    (directory / "params.json").write_text(params, encoding="utf-8")
    return config


def bf16_eagle(config: ModelConfig) -> Quantization:
    """How a draft model of this config is stored in bf16, the product that joins included."""
    plain = unquantized(config)
    return replace(plain, formats={**plain.formats, eagle_fuse(config).name: "bf16"})


def native_params(text: TextConfig, dialect: Literal["none", "mistral-fp8"]) -> dict[str, object]:
    """The content of `params.json` for a text model, in Mistral's names."""
    rope = text.rope
    params: dict[str, object] = {
        "dim": text.width,
        "n_layers": text.num_layers,
        "head_dim": text.head_dim,
        "hidden_dim": text.mlp_width,
        "n_heads": text.num_heads,
        "n_kv_heads": text.num_kv_heads,
        "rope_theta": rope.theta,
        "norm_eps": text.norm_eps,
        "vocab_size": text.vocab_size,
        "tied_embeddings": text.tied_head,
        "max_position_embeddings": text.max_positions,
    }
    if rope.kind == "yarn":
        params["yarn"] = {
            "original_max_position_embeddings": rope.original_max_positions,
            "factor": rope.factor,
            "apply_scale": rope.mscale_all_dim == 0.0,
            "beta": rope.beta_fast,
            "alpha": rope.beta_slow,
        }
    if rope.llama_4_scaling_beta:
        params["llama_4_scaling"] = {
            "original_max_position_embeddings": rope.original_max_positions,
            "beta": rope.llama_4_scaling_beta,
        }
    if dialect == "mistral-fp8":
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return params


def _write_bf16(
    directory: Path,
    config: ModelConfig,
    seed: int,
    layout: Layout,
    raw_config: Mapping[str, Any],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(directory, shapes_to_write(config, unquantized(config), layout)) as writer:
        for name, expected in expected_tensors(config, unquantized(config)).items():
            writer.add(foreign_name(name, layout, "none"), _random(name, expected, generator))
        writer.write_json("config.json", raw_config)
        eos = list(config.text.eos_token_ids)
        writer.write_json("generation_config.json", {"eos_token_id": eos})
        writer.finish()


def _random(name: str, expected: Expected, generator: torch.Generator) -> Tensor:
    """Norms around 1, weights that keep the variance of what passes through them."""
    values = torch.randn(expected.shape, generator=generator)
    if "norm" in name:
        return (1 + 0.1 * values).to(torch.bfloat16)
    if name.endswith("bias"):
        return (0.1 * values).to(torch.bfloat16)
    inputs = values[0].numel() if name != "embedding.weight" else 1
    return (values / math.sqrt(inputs)).to(torch.bfloat16)
