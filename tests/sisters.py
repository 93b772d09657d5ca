"""Small random models of the exact form of each model that shares this decoder.

`tests/data/sisters` holds their config.json (Pixtral Large's params.json) as published, as far as
it is known. Here only sizes shrink: widths, heads, layers and the vocabulary. Fields, rotary
settings, tie, type, dtype and layout stay, and so do head sizes, which YaRN's frequencies depend
on.
"""

import copy
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.fields import model_config
from halfbyte.checkpoint.inventory import shapes_to_write
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.names import (
    Layout,
    canonical_name,
    foreign_name,
    hub_to_native_rows,
    rotary_heads,
)
from halfbyte.checkpoint.native_fields import native_config
from halfbyte.checkpoint.written_metadata import hub_config, modelopt_configs
from halfbyte.config import ModelConfig
from halfbyte.model.tiny import write_tiny_checkpoint

CONFIGS = Path(__file__).parent / "data" / "sisters"


@dataclass(frozen=True, slots=True)
class Sister:
    """One published model.

    layout      of its files
    tokenizer   which of the kinds in `tokenizers_of_sisters` it ships
    """

    name: str
    layout: Layout
    tokenizer: str

    def __str__(self) -> str:
        return self.name

    @property
    def raw(self) -> dict[str, Any]:
        """Its config as published."""
        value: dict[str, Any] = json.loads((CONFIGS / f"{self.name}.json").read_text())
        return value

    @property
    def is_native(self) -> bool:
        return self.layout == "mistral"

    @property
    def is_fp8(self) -> bool:
        return "quantization_config" in self.raw

    @property
    def is_tied(self) -> bool:
        return bool(self.raw.get("text_config", {}).get("tie_word_embeddings"))

    def read(self, raw: dict[str, Any]) -> ModelConfig:
        """The architecture of a config of this model's form, in real sizes or small ones."""
        return (native_config if self.is_native else model_config)(raw, has_head=not self.is_tied)

    @property
    def config(self) -> ModelConfig:
        """The real architecture."""
        return self.read(self.raw)

    def small(self, *, layers: int, vocab_size: int = 800) -> dict[str, Any]:
        """The published config with small sizes."""
        raw = copy.deepcopy(self.raw)
        if self.is_native:
            _shrink(raw, layers, vocab_size, "dim", "hidden_dim", "n_layers", "n_heads")
            raw["n_kv_heads"] //= 4
            _shrink_tower(raw["vision_encoder"])
            return raw
        text = raw.get("text_config", raw)
        _shrink(
            text, layers, vocab_size, "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads",
        )  # fmt: skip
        text["num_key_value_heads"] //= 4
        if "vision_config" in raw:
            _shrink_tower(raw["vision_config"])
        return raw

    def write(
        self,
        directory: Path,
        *,
        layers: int = 3,
        vocab_size: int = 800,
        seed: int = 0,
        quantized: bool = True,
    ) -> ModelConfig:
        """Write random weights in this model's form; `quantized` False leaves FP8 sources bf16."""
        raw = self.small(layers=layers, vocab_size=vocab_size)
        config = self.read(raw)
        if self.is_native:
            _write_native(directory, config, raw, seed)
            return config
        is_fp8 = quantized and self.is_fp8
        raw.pop("quantization_config", None)
        write_tiny_checkpoint(
            directory,
            config=config,
            layout=self.layout,
            raw_config=raw,
            seed=seed,
            dialect="mistral-fp8" if is_fp8 else "none",
        )
        return config


SISTERS = (
    Sister("devstral-2-123b", "hf-text", "tekken-v13"),
    Sister("devstral-small-2-24b", "hf", "tekken-v13"),
    Sister("ministral-3-14b", "hf", "tekken-v13"),
    Sister("ministral-3-14b-reasoning", "hf", "tekken-v13"),
    Sister("ministral-3-8b", "hf", "tekken-v13"),
    Sister("ministral-3-3b", "hf", "tekken-v13"),
    Sister("mistral-small-3.2-24b", "hf-old", "tekken-v11"),
    Sister("devstral-small-1-24b", "hf-text", "tekken-v7"),
    Sister("mistral-large-2-123b", "hf-text", "spm-v3"),
    Sister("pixtral-large-124b", "mistral", "tekken-v3"),
    Sister("pixtral-large-124b-llava", "hf-old", "tekken-v3"),
)


def write_hollow(directory: Path, config: ModelConfig, quantization: Quantization) -> None:
    """A checkpoint whose only shard is a header and a hole: all names and sizes, no bytes."""
    layout: Layout = "hf-text" if config.vision is None else "hf"
    header: dict[str, Any] = {}
    offset = 0
    for name, (shape, dtype) in shapes_to_write(config, quantization, layout).items():
        num_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    raw = hub_config(config)
    if quantization.dialect == "modelopt":
        formats, cache = quantization.formats, quantization.kv_cache
        raw, older = modelopt_configs(raw, formats, cache, layout)
        (directory / "hf_quant_config.json").write_text(json.dumps(older))
    (directory / "config.json").write_text(json.dumps(raw))


_SAFETENSORS = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def always(sisters: Iterable[Sister], *names: str) -> list[Any]:
    """Parameters of a test: these sisters in every run, the others among the slow tests."""
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in names else [pytest.mark.slow])
        for one in sisters
    ]


def _shrink(
    fields: dict[str, Any], layers: int, vocab_size: int, width: str, mlp: str, depth: str,
    heads: str,
) -> None:  # fmt: skip
    """Widths become multiples of 16 still, grouped heads stay as many to a KV head."""
    fields[width] //= 32
    fields[mlp] //= 64
    fields[heads] //= 4
    fields[depth] = layers
    fields["vocab_size"] = vocab_size


def _shrink_tower(fields: dict[str, Any]) -> None:
    fields["hidden_size"] //= 8
    fields["num_attention_heads"] //= 8
    fields["intermediate_size"] //= 32
    fields["num_hidden_layers"] = 2


def _write_native(directory: Path, config: ModelConfig, raw: dict[str, Any], seed: int) -> None:
    """Mistral's own layout: params.json, one consolidated file, pairs interleaved."""
    hub = directory.with_name(f"{directory.name}-hub")
    write_tiny_checkpoint(hub, config=config, seed=seed)
    stored = {}
    for foreign, tensor in load_file(hub / "model.safetensors").items():
        name = canonical_name(foreign, "hf", "none")
        assert name is not None
        heads = rotary_heads(name, config)
        rows = tensor if heads is None else hub_to_native_rows(tensor, heads)
        stored[foreign_name(name, "mistral", "none")] = rows
    directory.mkdir(parents=True)
    save_file(stored, directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps(raw, indent=4))
