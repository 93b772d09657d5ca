"""NVIDIA Model Optimizer on a checkpoint of ours, timed by phase; no benchmark of its own.

The model is built in transformers from the decoded weights, calibrated by `mtq.quantize` with the
formats of our plan and exported by `export_hf_checkpoint`. Needs nvidia-modelopt and transformers.
"""

import gc
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.names import foreign_module, foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.modules import decoder_linears
from halfbyte.recipe.plan import Plan

_FP8 = {"num_bits": (4, 3), "axis": None}
_NVFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
}


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Seconds by phase and the most GPU memory held."""

    version: str
    loading_s: float
    calibrating_s: float
    exporting_s: float
    gpu_bytes: int | None


def quantizer_config(plan: Plan) -> dict[str, Any]:
    """The plan in Model Optimizer's terms: one rule a linear, FP8 keys and values, max."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, chosen in plan.formats.items():
        module = foreign_module(name, "hf-text")
        config = {"fp8": _FP8, "nvfp4": _NVFP4}[chosen]
        rules += [
            {"quantizer_name": f"*{module}.{role}_quantizer", "cfg": config}
            for role in ("weight", "input")
        ]
    if plan.kv_cache == "fp8":
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _FP8})
    return {"quant_cfg": rules, "algorithm": {"method": "max"}}


def build_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The decoder in transformers, bf16, weights decoded; text only."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    raw = hub_config(checkpoint.config)
    config = Ministral3Config(**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device(device):
        # Initialising 1e10 weights on a CPU takes minutes, and they are overwritten.
        kept = {n: getattr(torch.nn.init, n) for n in ("normal_", "uniform_", "kaiming_uniform_")}
        try:
            for name in kept:
                setattr(torch.nn.init, name, lambda tensor, *_args, **_more: tensor)
            model = Ministral3ForCausalLM._from_config(config, dtype=torch.bfloat16)
        finally:
            for name, function in kept.items():
                setattr(torch.nn.init, name, function)
    model = model.eval()
    weights = dict(model.named_parameters())
    linears = {linear.name for linear in decoder_linears(checkpoint.config)}
    with torch.no_grad():
        for name in checkpoint.names():
            linear, _, role = name.rpartition(".")
            if role != "weight":
                continue
            foreign = foreign_name(name, "hf-text", "none")
            stored = (
                checkpoint.decoded(linear, device=device)
                if linear in linears
                else checkpoint.tensor(name)
            )
            weights.pop(foreign).copy_(stored)
    assert not weights, f"never filled: {list(weights)[:3]}"
    return model


def run_modelopt(
    checkpoint: Checkpoint, plan: Plan, rows: Sequence[Tensor], device: torch.device, target: Path
) -> ReferenceRun:
    """Quantize and export; nothing of it stays in memory."""
    import modelopt
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    marks = [time.perf_counter()]

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(checkpoint, device)
    mark()

    def run_rows(model: Any) -> None:
        with torch.no_grad():
            for row in rows:
                # Without the head: it is not quantized, and at this depth it would dominate.
                model.model(row[None].to(device), use_cache=False)

    # Without data the rows are one token: the reference needs some call to build its statistics.
    model = mtq.quantize(model, quantizer_config(plan), run_rows)
    mark()
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=target)
    mark()
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    phases = [after - before for before, after in itertools.pairwise(marks)]
    return ReferenceRun(modelopt.__version__, *phases, peak)


def same_tensors(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many weights and weight scales of two exports have the same bytes, and of how many."""
    from safetensors import safe_open

    def listed(directory: Path) -> Mapping[str, Path]:
        index = directory / "model.safetensors.index.json"
        if index.exists():
            named = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in named.items()}
        with safe_open(directory / "model.safetensors", "pt") as file:
            return dict.fromkeys(file.keys(), directory / "model.safetensors")

    def read(path: Path, name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    first, second = listed(ours), listed(theirs)
    assert first.keys() == second.keys(), sorted(set(first) ^ set(second))[:4]
    wanted = [n for n in first if n.endswith(("weight", "weight_scale", "weight_scale_2"))]
    same = 0
    for name in wanted:
        a, b = read(first[name], name), read(second[name], name)
        same += (
            a.shape == b.shape
            and a.dtype == b.dtype
            and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        )
    return same, len(wanted)
