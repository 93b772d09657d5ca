"""What vLLM asks of an export, read anew from its files alone, without any reader of ours.

Rules: docs/reference/formats.md#what-serving-engines-expect.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def require_vllm_reads(directory: Path) -> None:
    """Fail unless every stored tensor is what `quantization_config` makes vLLM expect."""
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert raw["quant_method"] == "modelopt" and "quantization" not in raw
    stored: dict[str, tuple[Any, list[int]]] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored[name] = (file.get_tensor(name).dtype, file.get_slice(name).get_shape())
    modules = {name.rpartition(".")[0] for name in stored if name.endswith(".weight")}

    def is_ignored(module: str) -> bool:
        return any(
            module == pattern or (pattern.endswith("*") and module.startswith(pattern[:-1]))
            for pattern in raw["ignore"]
        )

    for module in modules:
        listed = raw.get("quantized_layers", {}).get(module)
        if raw["quant_algo"] == "MIXED_PRECISION":
            kind = None if listed is None else listed["quant_algo"]
        else:
            is_linear = module.endswith(("_proj", "lm_head")) or "multi_modal" in module
            kind = raw["quant_algo"] if is_linear and not is_ignored(module) else None
        dtype, shape = stored[f"{module}.weight"]
        if kind is None:
            assert dtype == torch.bfloat16, module
            assert f"{module}.weight_scale" not in stored, module
            continue
        assert stored[f"{module}.input_scale"] == (torch.float32, []), module
        if kind == "FP8":
            assert dtype == torch.float8_e4m3fn, module
            assert stored[f"{module}.weight_scale"] == (torch.float32, []), module
            continue
        assert kind == "NVFP4" and dtype == torch.uint8, module
        assert stored[f"{module}.weight_scale"] == (
            torch.float8_e4m3fn, [shape[0], shape[1] // 8],
        ), module  # fmt: skip
        assert stored[f"{module}.weight_scale_2"] == (torch.float32, []), module
    for module in modules:
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            base, _, short = module.rpartition(".")
            if short in group:
                kinds = {stored[f"{base}.{member}.weight"][0] for member in group}
                assert len(kinds) == 1, module
