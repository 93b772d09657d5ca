"""What NVIDIA Model Optimizer's own methods lose on the same model, formats, rows and text.

Question: on SmolLM2-135M-Instruct, how far from bf16 are `max`, `mse`, AWQ and other algorithms of
Model Optimizer, with the formats of our mixed recipe, beside ours?

Method: the FP8 source of `quantize_quality` is built in transformers with its weights decoded;
Model Optimizer calibrates on the same rows with the formats of our plan, one algorithm after
another, and its simulation (weights, inputs, keys and values rounded: what we call `declared`)
scores the same windows as `quantize_quality` does. An algorithm that does not run on this machine
is recorded with its error's first line. Its rounding of NVFP4 blocks is CUDA code; without a GPU
the same definition in our own words stands in for it (`round_without_gpu`), while the choice of
scales stays its own. KL is from our bf16 model in transformers; the record of `quantize_quality`
holds ours, through the engine's own path, which agrees with it to the rounding of bf16. No clock is
read.

Needs: nvidia-modelopt and transformers beside halfbyte.

Run: PYTHONPATH=src python benchmarks/quantize_peers.py --work build/quality
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from modelopt_reference import build_model, quantizer_config
from torch import Tensor

from halfbyte import log
from halfbyte.bench import record
from halfbyte.calibrate.blend import load_blend
from halfbyte.calibrate.draw import draw
from halfbyte.calibrate.sources import DataAccess
from halfbyte.calibrate.tokens import as_rows
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.fidelity.models import full_divergence, interval_of_mean
from halfbyte.fidelity.windows import cut_texts, read_texts
from halfbyte.figures import Figure
from halfbyte.formats.minifloat import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3
from halfbyte.formats.nvfp4 import round_to_nvfp4
from halfbyte.quantize.fp8_source import make_fp8_source
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

RECORD = Path(__file__).parent / "records" / "quantize_peers.json"
HELD_OUT = Path(__file__).parents[1] / "src/halfbyte/fidelity/data/held_out.txt"
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "max": {"method": "max"},
    "mse": {"method": "mse", "fp8_scale_sweep": True},
    "awq_lite": {"method": "awq_lite", "alpha_step": 0.1},
    "awq_clip": {"method": "awq_clip"},
    "smoothquant": {"method": "smoothquant"},
    "local_hessian": {"method": "local_hessian", "fp8_scale_sweep": True},
    "svdquant": {"method": "svdquant", "lowrank": 32},
}


# These choose a scale for each block of a weight beforehand, which its configs call static.
STATIC_WEIGHTS = ("mse", "local_hessian")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text")
    parser.add_argument("--rows", type=int, help="use only so many calibration rows")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=RECORD)
    return parser.parse_args()


@torch.inference_mode()
def logprobs(model: Any, window: Sequence[int]) -> Tensor:
    logits_NV = model(torch.tensor([list(window)]), use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits_NV, dim=-1)


def round_without_gpu() -> None:
    """Give Model Optimizer roundings of NVFP4 blocks that run on a CPU.

    By its definition: a block's scale is its largest magnitude over 6, rounded to e4m3 in units of
    the tensor's largest over 6 * 448; values round to the nearest e2m1.
    """
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    def dynamic(x: Tensor, block_size: int, amax: Tensor, *bits: int) -> Tensor:
        assert block_size == 16 and bits == (4, 2, 8, 4), (block_size, bits)
        return round_to_nvfp4(x, amax.float().amax() / (6 * 448))

    def static(
        x: Tensor,
        amax: Tensor,
        global_amax: Tensor,
        quantize_block_scales: bool = True,
        fp8_max: float = 448.0,
        out_dtype: torch.dtype | None = None,
        pass_through_bwd: bool = False,
    ) -> Tensor:
        blocks = x.float().reshape(-1, 16)
        unit = global_amax.float() / (6 * fp8_max)
        scale = amax.float().reshape(-1, 1) / 6
        if quantize_block_scales:
            scale = decode_e4m3(encode_e4m3(scale / unit)) * unit
        quotient = (blocks / scale).masked_fill_(scale == 0, 0.0)
        rounded = decode_e2m1(encode_e2m1(quotient)) * scale
        return rounded.reshape(x.shape).to(out_dtype or x.dtype)

    tensor_quant.dynamic_block_quantize_op = dynamic
    tensor_quantizer.static_blockwise_fp4_fake_quant = static


def quantized(source: Checkpoint, rows: Sequence[Tensor], name: str) -> Any:
    """The source in transformers, calibrated and simulated by Model Optimizer."""
    import modelopt.torch.quantization as mtq

    plan = make_plan(load_recipe("medium-3.5"), source.config)
    config = {**quantizer_config(plan), "algorithm": dict(ALGORITHMS[name])}
    if name in STATIC_WEIGHTS:
        config["quant_cfg"] = [_with_static_weights(rule) for rule in config["quant_cfg"]]
    if not torch.cuda.is_available():
        round_without_gpu()

    def run_rows(model: Any) -> None:
        with torch.no_grad():
            for row in rows:
                model.model(row[None], use_cache=False)

    return mtq.quantize(build_model(source, torch.device("cpu")), config, run_rows)


def _with_static_weights(rule: dict[str, Any]) -> dict[str, Any]:
    sizes = rule.get("cfg", {}).get("block_sizes")
    if sizes is None or not rule["quantizer_name"].endswith("weight_quantizer"):
        return rule
    return {**rule, "cfg": {**rule["cfg"], "block_sizes": {**sizes, "type": "static"}}}


def main() -> None:
    args = parse()
    log.configure(level="warning")
    if not (args.work / "bf16").exists():
        import_gguf(packaged_file("smollm2"), args.work / "bf16")
    if not (args.work / "fp8").exists():
        make_fp8_source(args.work / "bf16", args.work / "fp8")
    source = Checkpoint.open(args.work / "fp8")
    blend = load_blend(load_recipe("medium-3.5").calibration.blend)
    data = draw(blend, args.work / "fp8", access=DataAccess(folder=None, allow_hub=False))
    rows = as_rows(data)[: args.rows]
    windows, _ = cut_texts(args.work / "bf16", read_texts(args.text), 512, args.tokens)
    base = build_model(Checkpoint.open(args.work / "bf16"), torch.device("cpu"))
    wanted = [logprobs(base, window) for window in windows]
    del base
    found: list[dict[str, Any]] = []
    for name in args.algorithms:
        found.append({"name": name, **judge(source, rows, name, windows, wanted)})
        print(found[-1], flush=True)
    record.write(
        args.out,
        name="quantize_peers",
        question="KL of Model Optimizer's own methods on the same model, formats, rows and text?",
        command="PYTHONPATH=src python benchmarks/quantize_peers.py " + " ".join(sys.argv[1:]),
        figures=[
            Figure("KL divergence from bf16", row["kl_mean"], "nats/token", "peer",
                   {"model": "SmolLM2-135M", "weights": f"Model Optimizer {row['name']}",
                    "arithmetic": "declared"})
            for row in found if "kl_mean" in row
        ],
        results={
            "text": args.text.name,
            "windows": len(windows),
            "calibration_tokens": sum(row.numel() for row in rows),
            "rows": found,
        },
    )  # fmt: skip


def judge(
    source: Checkpoint,
    rows: Sequence[Tensor],
    name: str,
    windows: Sequence[tuple[int, ...]],
    wanted: Sequence[Tensor],
) -> dict[str, Any]:
    """KL and perplexity of one algorithm, or why it does not run."""
    try:
        model = quantized(source, rows, name)
    except Exception as error:  # another library's, of any kind: that it fails is the finding
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    divergences, losses = [], []
    for window, base_NV in zip(windows, wanted, strict=True):
        ours_NV = logprobs(model, window)
        divergences.append(full_divergence(base_NV, ours_NV).kl.numpy())
        losses.append(-ours_NV.gather(1, torch.tensor(window[1:])[:, None]).double())
    kl = torch.cat([torch.from_numpy(part) for part in divergences])
    interval = interval_of_mean(divergences, range(len(windows)))
    return {
        "kl_mean": round(float(kl.mean()), 5),
        "kl_interval": None if interval is None else [round(v, 5) for v in interval],
        "perplexity": round(float(torch.cat(losses).mean().exp()), 3),
    }


if __name__ == "__main__":
    main()
