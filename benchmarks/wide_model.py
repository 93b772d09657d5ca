"""A synthetic source of any width, made on the spot; no benchmark of its own.

Weights are drawn with replacement from one pool of normal values, so that a layer of 1.4e9 weights
takes seconds. They mean nothing; shapes, formats and bytes are those of the real model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoint.inventory import expected_tensors, shapes_to_write
from halfbyte.checkpoint.metadata import Quantization, unquantized
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config, mistral_fp8_config
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.formats.minifloat import encode_e4m3
from halfbyte.modules import decoder_linears
from halfbyte.recipe.schema import Recipe, parse_recipe

POOL = 1 << 26
# Largest of the values drawn, in standard deviations: code 448.
LARGEST_SIGMA = 5.8


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of Mistral Medium 3.5 unless told otherwise."""

    width: int = 12288
    mlp_width: int = 28672
    num_heads: int = 96
    num_kv_heads: int = 8
    head_dim: int = 128


def text_config(widths: Widths, *, layers: int, vocab_size: int) -> TextConfig:
    return TextConfig(
        num_layers=layers,
        width=widths.width,
        num_heads=widths.num_heads,
        num_kv_heads=widths.num_kv_heads,
        head_dim=widths.head_dim,
        mlp_width=widths.mlp_width,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        max_positions=262144,
        rope=RopeConfig(
            theta=1e6,
            kind="yarn",
            factor=64.0,
            original_max_positions=4096,
            beta_fast=4.0,
            beta_slow=1.0,
        ),
        tied_head=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=11,
    )


def mixed_recipe(*, layers: int, activations: str = "amax") -> Recipe:
    """FP8 attention, FP8 in the first layer's MLP, NVFP4 in the others: both kinds of layer."""
    last = layers - 1
    return parse_recipe(
        "name: wide\n"
        "rules:\n"
        "  - {part: decoder, group: attention, format: fp8}\n"
        "  - {part: decoder, group: mlp, layers: [0], format: fp8}\n"
        f"  - {{part: decoder, group: mlp, layers: [1-{last}], format: nvfp4}}\n"
        "keep: [embedding, head, vision, projector]\n"
        "kv_cache: fp8\n"
        f"scales: {{weights: amax, activations: {activations}}}\n"
        "calibration: {blend: builtin, samples: 4, tokens_per_sample: 64, seed: 0}\n",
        "wide",
    )


def write_source(
    directory: Path, text: TextConfig, *, dialect: str = "mistral-fp8", seed: int = 0
) -> Path:
    """Write a checkpoint of random weights: bf16, or the FP8 dialect in which Mistral publishes."""
    config = ModelConfig(text, None)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(POOL, generator=generator).clamp_(-LARGEST_SIGMA, LARGEST_SIGMA)
    values[:2] = torch.tensor([LARGEST_SIGMA, -LARGEST_SIGMA])
    codes = encode_e4m3(values * (448.0 / LARGEST_SIGMA))
    values = values.to(torch.bfloat16)
    linears = {linear.name for linear in decoder_linears(config)}
    formats = dict.fromkeys(linears, "bf16" if dialect == "none" else "fp8")
    quantization = Quantization(dialect, formats, "bf16")
    shapes = {
        name: (shape, torch.bfloat16 if shape == () else dtype)
        for name, (shape, dtype) in shapes_to_write(config, quantization, "hf-text").items()
    }
    with ShardWriter(directory, shapes) as writer:

        def add(name: str, tensor: Tensor) -> None:
            writer.add(foreign_name(name, "hf-text", dialect), tensor)

        for name, expected in expected_tensors(config, unquantized(config)).items():
            linear = name.removesuffix(".weight")
            if "norm" in name:
                add(name, torch.ones(expected.shape, dtype=torch.bfloat16))
            elif linear in linears and dialect == "mistral-fp8":
                scale = LARGEST_SIGMA / math.sqrt(expected.shape[1]) / 448.0
                add(name, _drawn(codes, expected.shape, generator))
                add(f"{linear}.weight_scale", torch.tensor(scale, dtype=torch.bfloat16))
                add(f"{linear}.input_scale", torch.tensor(8 / 448, dtype=torch.bfloat16))
            else:
                inputs = expected.shape[1] if name != "embedding.weight" else 1
                drawn = _drawn(values, expected.shape, generator)
                add(name, drawn.mul_(1 / math.sqrt(inputs)))
        raw = hub_config(config)
        writer.write_json(
            "config.json", raw if dialect == "none" else mistral_fp8_config(raw, "hf-text")
        )
        writer.write_file("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}}).encode())
        return writer.finish()


def _drawn(pool: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor filled with runs of the pool that begin at random places; the extremes included."""
    count = math.prod(shape)
    filled = torch.empty(count, dtype=pool.dtype)
    start = 0
    while start < count:
        first = 0 if start == 0 else int(torch.randint(0, len(pool), (), generator=generator))
        part = min(len(pool) - first, count - start)
        filled[start : start + part] = pool[first : first + part]
        start += part
    return filled.view(shape)


def write_tokens(path: Path, *, rows: int, tokens: int, vocab_size: int, seed: int = 0) -> Path:
    """Random token ids in the layout that `--calibration-tokens` reads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, tokens), generator=generator)
    save_file({"batch0.input_ids": ids}, path)
    return path
