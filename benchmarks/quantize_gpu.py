"""Quantizing full-width layers on one GPU: seconds a layer, and the whole 128B model from that.

Question: how long does a layer of Mistral Medium 3.5 take, calibrated with 128 x 2048 tokens, and
what does that make of 88 layers on a disk of 2 GB/s? How long does Model Optimizer take for the
same layers, in the same run?

Method: a synthetic FP8 source at full width with a small vocabulary is written; `quantize` runs on
it as anyone would run it: streaming, prefetching, every activation and tensor made durable, errors
measured. Seconds a layer are wall times between finished layers, the first layer left out (nothing
was prefetched for it). Then Model Optimizer, if installed, calibrates and exports the same decoded
layers with the same tokens, all of them in GPU memory at once; reading and decoding are not counted
against it. Both exports are compared: weights and their scales must have the same bytes.

Cost model: a layer has 1.38e9 weights, so 262,144 tokens take 725 TFLOP in the linears and 26 in
attention: 1.2 s at 600 TFLOP/s. Beside that the run writes 6.4 GB of activations (so that a killed
run can go on), reads 1.4 GB and writes 0.9 to 1.4 GB.

Reading the result: at 2 GB/s the activations alone take 3.2 s a layer, so the disk bounds the run,
not the GPU. The projection counts, for each layer, the longer of calibrating as measured and of
moving its bytes at 2 GB/s; encoding and syncing as measured; and reading the layer once more and
writing its output at 2 GB/s, as if nothing overlapped; then the tensors outside the layers.
Give --work a RAM disk to leave the machine's own disk out.

Last records: benchmarks/records/quantize_gpu.json, benchmarks/records/quantize_gpu_methods.json.

Run: PYTHONPATH=src python benchmarks/quantize_gpu.py
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from modelopt_reference import run_modelopt, same_tensors
from wide_model import Widths, mixed_recipe, text_config, write_source, write_tokens

from halfbyte import log
from halfbyte.bench import record
from halfbyte.calibrate.tokens import read_token_rows
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.figures import Against, Figure
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import QuantizeResult, quantize
from halfbyte.quantize.scales import METHODS as SCALES_OF
from halfbyte.recipe.plan import make_plan

RECORD = Path(__file__).parent / "records" / "quantize_gpu.json"
DISK_BYTES_PER_S = 2e9
MODEL_LAYERS = 88
# Embedding, head, vision tower and projector of the real model, bf16, read and written once.
OUTSIDE_BYTES = 2 * 11.8e9
NVFP4_LAYERS = 83  # of the 88; the other five are FP8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu-memory", type=float, help="GiB that the run must stay within")
    parser.add_argument("--memory", type=float, help="GiB of host memory, likewise")
    parser.add_argument("--work", type=Path, help="a large empty folder; a RAM disk if it fits")
    parser.add_argument("--no-modelopt", action="store_true")
    parser.add_argument(
        "--methods", nargs="*", choices=sorted(SCALES_OF), default=[], help="measured after max"
    )
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--out", type=Path, default=RECORD)
    return parser.parse_args()


def work_folder(wanted: Path | None, needed_bytes: float) -> Path:
    """Where everything is written: a RAM disk if it has room for it, or the current folder."""
    shared = Path("/dev/shm")
    if wanted is None:
        has_room = shared.is_dir() and shutil.disk_usage(shared).free > needed_bytes
        wanted = shared if has_room else Path.cwd()
    wanted.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="halfbyte-bench-", dir=wanted))


def write_speed(folder: Path, num_bytes: int = 1 << 30) -> float:
    """Bytes a second that the folder's disk takes durably."""
    piece = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8).numpy().tobytes()
    started = time.perf_counter()
    with (folder / "speed").open("wb") as file:
        for _ in range(num_bytes // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "speed").unlink()
    return num_bytes / seconds


def project(layers: list[dict[str, Any]], kinds: list[str], per_layer: dict[str, float]) -> float:
    """Seconds for the whole model on a disk of 2 GB/s, by kind of layer."""

    def layer_s(kind: str) -> float:
        chosen = [x["seconds"] for x, k in zip(layers, kinds, strict=True) if k == kind][-1]
        moved = per_layer["activation_bytes"] + per_layer["source_bytes"]
        calibrating = max(chosen["calibrating"], moved / DISK_BYTES_PER_S)
        again = per_layer["source_bytes"] + per_layer[f"{kind}_bytes"]
        return calibrating + chosen["encoding"] + chosen["syncing"] + again / DISK_BYTES_PER_S

    nvfp4 = NVFP4_LAYERS * layer_s("nvfp4")
    return nvfp4 + (MODEL_LAYERS - NVFP4_LAYERS) * layer_s("fp8") + OUTSIDE_BYTES / DISK_BYTES_PER_S


def main() -> None:
    args = parse()
    log.configure(level="info")
    widths = Widths(256, 512, 8, 2, 32) if args.small else Widths()
    assert args.layers >= 3, "the first layer is warm-up; one of each kind must follow or be it"
    text = text_config(widths, layers=args.layers, vocab_size=args.vocab)
    activation_bytes = args.rows * args.tokens * widths.width * 2
    linear_bytes = 2 * widths.num_heads * widths.head_dim * widths.width
    linear_bytes += 2 * widths.num_kv_heads * widths.head_dim * widths.width
    linear_bytes += 3 * widths.width * widths.mlp_width
    needed = 3 * args.layers * linear_bytes + 2 * activation_bytes + 8e9
    folder = work_folder(args.work, needed)
    try:
        measure(args, text, folder, activation_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(args: argparse.Namespace, text: Any, folder: Path, activation_bytes: int) -> None:
    device = torch.device(args.device)
    print(f"working in {folder}", flush=True)
    started = time.perf_counter()
    source = write_source(folder / "source", text)
    tokens = write_tokens(
        folder / "tokens.safetensors", rows=args.rows, tokens=args.tokens, vocab_size=args.vocab
    )
    print(f"source written in {time.perf_counter() - started:.1f} s", flush=True)
    disk = write_speed(folder)
    recipe = mixed_recipe(layers=args.layers)
    config = QuantizeConfig(
        source,
        folder / "ours",
        recipe,
        profile="cuda" if device.type == "cuda" else "ieee",
        calibration_tokens=tokens,
        device=args.device,
        memory_bytes=None if args.memory is None else int(args.memory * 2**30),
        gpu_memory_bytes=None if args.gpu_memory is None else int(args.gpu_memory * 2**30),
    )
    result, walls = timed(config)
    layers = result.record["layers"]
    checkpoint = Checkpoint.open(source)
    plan = make_plan(recipe, checkpoint.config)
    kinds = [plan.formats[f"decoder.{n}.mlp.gate"] for n in range(args.layers)]
    ours = Checkpoint.open(folder / "ours")
    per_layer = {
        "activation_bytes": float(activation_bytes),
        "source_bytes": float(layer_bytes(checkpoint, 0)),
        "fp8_bytes": float(layer_bytes(ours, kinds.index("fp8"))),
        "nvfp4_bytes": float(layer_bytes(ours, kinds.index("nvfp4"))),
    }
    layer_s = statistics.median(walls)
    projected = project(layers, kinds, per_layer)
    results: dict[str, Any] = {
        "layers": args.layers,
        "calibration": f"{args.rows} x {args.tokens} tokens",
        "layer_s": round(layer_s, 2),
        "calibrating_s": [layer["seconds"]["calibrating"] for layer in layers],
        "encoding_s": [layer["seconds"]["encoding"] for layer in layers],
        "syncing_s": [layer["seconds"]["syncing"] for layer in layers],
        **memory_of(result),
        "work_folder_gb_per_s": round(disk / 1e9, 2),
        "bytes_per_layer": per_layer,
        "model_minutes_at_2_gb_per_s": round(projected / 60, 1),
        "model_minutes_as_measured": round(MODEL_LAYERS * layer_s / 60, 1),
        "whole_run_s": round(result.seconds, 1),
    }
    samples: dict[str, list[float]] = {"layer_s": walls}
    has_modelopt = importlib.util.find_spec("modelopt") is not None
    if has_modelopt and not args.no_modelopt:
        results["modelopt"] = compare(checkpoint, plan, tokens, device, folder, layer_s)
    results["methods"] = {}
    for name in args.methods:
        scales = replace(SCALES_OF[name], cache=recipe.scales.cache)
        target = folder / name
        there = replace(config, output=target, recipe=replace(recipe, scales=scales))
        theirs, samples[f"{name}_layer_s"] = timed(there)
        shutil.rmtree(target)
        mine_s = statistics.median(samples[f"{name}_layer_s"])
        results["methods"][name] = {
            "layer_s": round(mine_s, 2),
            "times_max": round(mine_s / layer_s, 2),
            "model_minutes_as_measured": round(MODEL_LAYERS * mine_s / 60, 1),
            **memory_of(theirs),
        }
        print(f"{name}: {results['methods'][name]}", flush=True)
    show(results)
    record.write(
        args.out,
        name=args.out.stem,
        question="One full-width layer, 128 x 2048 tokens, on one GPU: how long, and 88 of them?",
        command="PYTHONPATH=src python benchmarks/quantize_gpu.py " + " ".join(sys.argv[1:]),
        figures=gpu_figures(results),
        results=results,
        samples=samples,
    )
    print(f"record: {args.out}")


def timed(config: QuantizeConfig) -> tuple[QuantizeResult, list[float]]:
    """A run, and the seconds between finished layers: of every layer but the first."""
    if torch.cuda.is_available():  # memory of a run before it would count as this one's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks: list[float] = []
    result = quantize(config, lambda _done, _all: marks.append(time.perf_counter()))
    return result, [b - a for a, b in itertools.pairwise(marks)]


def memory_of(result: QuantizeResult) -> dict[str, float]:
    """GiB that a run took at most, and that were planned."""
    peaks = [layer["peak_memory_bytes"] for layer in result.record["layers"]]
    planned = result.record["planned_memory_bytes"]
    return {
        "gpu_memory_gib": round(max(peak.get("gpu", 0) for peak in peaks) / 2**30, 2),
        "gpu_memory_planned_gib": round(planned.get("gpu", 0) / 2**30, 2),
        "host_memory_gib": round(max(peak["host"] for peak in peaks) / 2**30, 2),
        "host_memory_planned_gib": round(planned["host"] / 2**30, 2),
    }


def layer_bytes(checkpoint: Checkpoint, layer: int) -> int:
    prefix = f"decoder.{layer}."
    return sum(checkpoint.num_bytes(n) for n in checkpoint.names() if n.startswith(prefix))


def compare(
    checkpoint: Checkpoint,
    plan: Any,
    tokens: Path,
    device: torch.device,
    folder: Path,
    layer_s: float,
) -> dict[str, Any]:
    num_layers = checkpoint.config.text.num_layers
    rows = read_token_rows(tokens)
    run = run_modelopt(checkpoint, plan, rows, device, folder / "theirs")
    same, of = same_tensors(folder / "ours", folder / "theirs")
    theirs_s = (run.calibrating_s + run.exporting_s) / num_layers
    return {
        **{k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(run).items()},
        "layer_s": round(theirs_s, 2),
        "times_slower": round(theirs_s / layer_s, 2),
        "same_weight_tensors": same,
        "weight_tensors": of,
    }


def show(results: dict[str, Any]) -> None:
    rows = [
        ("seconds a layer", results["layer_s"]),
        ("calibrating", results["calibrating_s"]),
        ("encoding", results["encoding_s"]),
        ("syncing", results["syncing_s"]),
        ("GPU memory, GiB", f"{results['gpu_memory_gib']} of {results['gpu_memory_planned_gib']}"),
        ("host memory, GiB", results["host_memory_gib"]),
        ("work folder, GB/s", results["work_folder_gb_per_s"]),
        ("88 layers, minutes", results["model_minutes_at_2_gb_per_s"]),
    ]
    if "modelopt" in results:
        theirs = results["modelopt"]
        rows += [
            ("Model Optimizer, s a layer", theirs["layer_s"]),
            ("... times ours", theirs["times_slower"]),
            ("... GPU GiB", round((theirs["gpu_bytes"] or 0) / 2**30, 2)),
            ("same bytes", f"{theirs['same_weight_tensors']} of {theirs['weight_tensors']}"),
        ]
    for name, value in rows:
        print(f"{name:<28} {value}")


def gpu_figures(results: dict[str, Any]) -> list[Figure]:
    conditions = {"width": "full", "calibration": results["calibration"]}
    theirs = results.get("modelopt")
    against: tuple[Against, ...] = ()
    if theirs is not None:
        name = f"Model Optimizer {theirs['version']} with all layers in GPU memory"
        against = (Against(name, theirs["layer_s"]),)
    planned = (Against("planned", results["gpu_memory_planned_gib"]),)
    projected = {**conditions, "layers": MODEL_LAYERS, "disk": "2 GB/s", "how": "projected"}
    by_method = [
        Figure("quantizing a layer on a GPU", row["layer_s"], "s", "quantize",
               {**conditions, "method": name}, (Against("max", results["layer_s"]),))
        for name, row in results["methods"].items()
    ]  # fmt: skip
    return [
        Figure("quantizing a layer on a GPU", results["layer_s"], "s", "quantize", conditions,
               against),
        Figure("GPU memory while quantizing", results["gpu_memory_gib"], "GiB", "quantize",
               conditions, planned),
        Figure("quantizing the model on a GPU", results["model_minutes_at_2_gb_per_s"], "min",
               "quantize", projected),
        *by_method,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
