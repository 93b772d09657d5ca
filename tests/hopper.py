"""Small checkpoints in a geometry that the CUDA kernels take: bf16, FP8 source, mixed, native."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from halfbyte.checkpoint.names import foreign_name, hub_to_native_rows, rotary_heads
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.modules import WeightFormat, decoder_linears
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import Recipe, load_recipe, parse_recipe


def hopper_config(layers: int = 6, *, tied_head: bool = False) -> ModelConfig:
    """YaRN with a query scale, grouped queries, odd widths (no multiples of a K block)."""
    text = TextConfig(
        num_layers=layers,
        width=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=304,
        vocab_size=515,
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
        tied_head=tied_head,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
    )
    return ModelConfig(text, None)


def write_fp8(directory: Path, config: ModelConfig) -> Path:
    """The dialect in which Mistral publishes, random weights."""
    write_tiny_checkpoint(directory, config=config, dialect="mistral-fp8")
    return directory


def recipe_by_parts(
    attention: str, mlp: str, head: str, *, samples: int = 64, tokens: int = 512
) -> Recipe:
    """Attention, MLPs and output head in a format each; scales by maxima."""
    fields: dict[str, Any] = {
        "name": f"{attention}-{mlp}-{head}",
        "rules": [
            {"part": "decoder", "group": "attention", "format": attention},
            {"part": "decoder", "group": "mlp", "format": mlp},
            {"part": "head", "format": head},
        ],
        "keep": ["embedding", "vision", "projector"],
        "kv_cache": "fp8",
        "scales": {"weights": "amax", "activations": "amax"},
        "calibration": {
            "blend": "builtin", "samples": samples, "tokens_per_sample": tokens, "seed": 0
        },
    }  # fmt: skip
    return parse_recipe(yaml.safe_dump(fields), "parts.yaml")


def uniform_recipe(format: WeightFormat, head: WeightFormat) -> Recipe:
    """Every decoder linear in one format, the output head in one of its own."""
    return recipe_by_parts(format, format, head)


def write_mixed(directory: Path, fp8: Path, scratch: Path, recipe: Recipe | None = None) -> Path:
    """`fp8` through a recipe; the big model's: interior MLPs in NVFP4, FP8 keys and values."""
    vocabulary = Checkpoint.open(fp8).config.text.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (4, 64), generator=generator)
    save_file({"batch0.input_ids": ids}, scratch / "tokens.safetensors")
    quantize(
        QuantizeConfig(
            source=fp8,
            output=directory,
            recipe=recipe or load_recipe("medium-3.5"),
            calibration_tokens=scratch / "tokens.safetensors",
            with_errors=False,
        )
    )
    return directory


def write_native(directory: Path, hub: Path) -> Path:
    """A bf16 checkpoint of ours in Mistral's own layout, q and k rows in pairs."""
    checkpoint = Checkpoint.open(hub)
    directory.mkdir()
    foreign = {}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        heads = rotary_heads(name, checkpoint.config) if tensor.ndim > 1 else None
        stored = tensor if heads is None else hub_to_native_rows(tensor, heads)
        foreign[foreign_name(name, "mistral", "none")] = stored.contiguous()
    save_file(foreign, directory / "consolidated.safetensors", {"format": "pt"})
    text = checkpoint.config.text
    params = {
        "dim": text.width,
        "n_layers": text.num_layers,
        "head_dim": text.head_dim,
        "hidden_dim": text.mlp_width,
        "n_heads": text.num_heads,
        "n_kv_heads": text.num_kv_heads,
        "rope_theta": text.rope.theta,
        "norm_eps": text.norm_eps,
        "vocab_size": text.vocab_size,
        "tied_embeddings": text.tied_head,
        "max_position_embeddings": text.max_positions,
        "model_type": "transformer",
    }
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def compressed_config(
    *, channel: bool = True, dynamic: bool = True, kv: bool = False, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it for FP8."""

    def arguments(strategy: str, *, is_dynamic: bool) -> dict[str, Any]:
        return {
            "actorder": None,
            "block_structure": None,
            "dynamic": is_dynamic,
            "group_size": None,
            "num_bits": 8,
            "observer": None if is_dynamic else "minmax",
            "observer_kwargs": {},
            "strategy": strategy,
            "symmetric": True,
            "type": "float",
        }

    group = {
        "input_activations": arguments("token" if dynamic else "tensor", is_dynamic=dynamic),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": arguments("channel" if channel else "tensor", is_dynamic=False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": 1.46,
        "ignore": list(ignore),
        "kv_cache_scheme": arguments("tensor", is_dynamic=False) if kv else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.12.2",
    }


def write_compressed(
    directory: Path,
    bf16: Path,
    *,
    channel: bool = True,
    dynamic: bool = True,
    kv: bool = False,
    ignore: Sequence[str] = ("lm_head",),
) -> Path:
    """A bf16 checkpoint in FP8 as llm-compressor lays it out: scales in bf16, of rows or one."""
    checkpoint = Checkpoint.open(bf16)
    foreign: dict[str, torch.Tensor] = {}
    quantized = [one.name for one in decoder_linears(checkpoint.config)]
    if "lm_head" not in ignore:
        quantized.append("head")

    def spelt(name: str) -> str:
        return foreign_name(name, checkpoint.layout, "compressed")

    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        linear = name.removesuffix(".weight")
        if linear not in quantized:
            foreign[spelt(name)] = tensor
            continue
        largest = tensor.float().abs().amax(1, keepdim=True)
        scale = ((largest if channel else largest.amax().reshape(1)) / 448.0).bfloat16()
        codes = (tensor.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        foreign[spelt(name)] = codes
        foreign[spelt(f"{linear}.weight_scale")] = scale
        if not dynamic:
            foreign[spelt(f"{linear}.input_scale")] = torch.tensor([0.02]).bfloat16()
    for layer in range(checkpoint.config.text.num_layers if kv else 0):
        for role in ("k_scale", "v_scale"):
            name = spelt(f"decoder.{layer}.attention.{role}")
            foreign[name] = torch.tensor([0.01 * (layer + 1)]).bfloat16()
    directory.mkdir()
    save_file(foreign, directory / "model.safetensors", {"format": "pt"})
    raw = dict(checkpoint.raw_config)
    raw["quantization_config"] = compressed_config(
        channel=channel, dynamic=dynamic, kv=kv, ignore=ignore
    )
    (directory / "config.json").write_text(json.dumps(raw))
    return directory
