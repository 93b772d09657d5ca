"""A small random checkpoint in the format that `halfbyte quantize` writes: FP8 and NVFP4."""

from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint.inventory import shapes_to_write
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config, modelopt_configs
from halfbyte.config import ModelConfig
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.formats.nvfp4 import encode_nvfp4, nvfp4_tensor_scale
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.modules import WeightFormat, decoder_linears, fused_partners

# Normalised inputs of the tiny models stay below it.
_INPUT_AMAX = 8.0


def write_mixed(directory: Path, config: ModelConfig) -> None:
    """Attention FP8, MLP NVFP4, FP8 cache; text models only."""
    assert config.vision is None
    plain = directory.with_name(directory.name + "-bf16")
    write_tiny_checkpoint(plain, config=config)
    source = Checkpoint.open(plain)
    formats: dict[str, WeightFormat] = {
        one.name: "nvfp4" if one.group == "mlp" else "fp8" for one in decoder_linears(config)
    }
    quantization = Quantization("modelopt", formats, "fp8")
    with ShardWriter(directory, shapes_to_write(config, quantization, "hf-text")) as writer:

        def add(name: str, tensor: Tensor) -> None:
            writer.add(foreign_name(name, "hf-text", "modelopt"), tensor)

        for name in source.names():
            linear = name.removesuffix(".weight")
            if linear not in formats:
                add(name, source.tensor(name))
            elif formats[linear] == "fp8":
                scale = fp8_scale(source.tensor(name).abs().amax())
                add(name, encode_fp8(source.tensor(name), scale))
                add(f"{linear}.weight_scale", scale)
                add(f"{linear}.input_scale", torch.tensor(_INPUT_AMAX / 448.0))
            else:
                amax = max(
                    source.tensor(f"{member}.weight").abs().amax()
                    for member in fused_partners(linear)
                )
                codes = encode_nvfp4(source.tensor(name), nvfp4_tensor_scale(amax))
                add(name, codes[0])
                add(f"{linear}.weight_scale", codes[1])
                add(f"{linear}.tensor_scale", codes[2])
                add(f"{linear}.input_scale", torch.tensor(_INPUT_AMAX / (6.0 * 448.0)))
        for layer in range(config.text.num_layers):
            add(f"decoder.{layer}.attention.k_scale", torch.tensor(0.03))
            add(f"decoder.{layer}.attention.v_scale", torch.tensor(0.02))
        raw, older = modelopt_configs(hub_config(config), formats, "fp8", "hf-text")
        writer.write_json("config.json", raw)
        writer.write_json("hf_quant_config.json", older)
        eos = list(config.text.eos_token_ids)
        writer.write_json("generation_config.json", {"eos_token_id": eos})
        writer.finish()
