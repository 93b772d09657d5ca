"""Data-free FP8 to mixed NVFP4/FP8 on a CPU: against Model Optimizer, and against the disk alone.

Question: how many nanoseconds a weight does `quantize` take, start to finish, how many Model
Optimizer for quantizing and exporting the same tensors, and how many does moving the bytes take?

Method: a synthetic FP8 source of four layers. A round is: read every byte of the source, write and
sync as many as the output has (from memory, no work in between); `quantize` without data, without
measuring errors, durable, with a hash of every tensor; and, once in every --reference rounds, Model
Optimizer (`mtq.quantize` on a single token, then `export_hf_checkpoint`) on a model that is in
memory already, decoded: reading and decoding are not counted against it. Both outputs must agree in
every weight and scale. The system's cache holds the source in all three. One warm-up of ours.
The record says what others took of the processors meanwhile; beyond 5 % none is written.

Cost model: a weight is 1 byte read, and 0.56 (NVFP4) or 1 (FP8) written and hashed. Three quarters
of the weights go from code to code by a table, 16 at a time in some thirty instructions. SHA-256
without special instructions is 0.4 GB/s a core.

Reading the result: `share_of_disk` is the time of moving the bytes over the time of `quantize`;
above 0.7 the disk is the bound, below it the processor is, as the record says.

Last record: benchmarks/records/quantize_speed.json.

Run, in an environment with torch 2.13.0, transformers and nvidia-modelopt 0.47.0:
    PYTHONPATH=src python benchmarks/quantize_speed.py --threads 2
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from modelopt_reference import run_modelopt, same_tensors
from wide_model import Widths, mixed_recipe, text_config, write_source

from halfbyte.bench import record
from halfbyte.bench.idle import Watch, wait_until_quiet
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.figures import Against, Figure
from halfbyte.modules import decoder_linears
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.plan import make_plan

RECORD = Path(__file__).parent / "records" / "quantize_speed.json"
PIECE = 16 << 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", type=int, default=2, help="Model Optimizer every so often")
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--even-if-busy", action="store_true", help="to try the script")
    return parser.parse_args()


def move_bytes(source: Path, target: Path, num_bytes: int) -> float:
    """Seconds to read the source's shards and write `num_bytes` durably, in large pieces."""
    content = bytearray(PIECE)
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(content):
                pass
    with target.open("wb", buffering=0) as file:
        left = num_bytes
        while left:
            left -= file.write(memoryview(content)[: min(PIECE, left)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="speed-", dir=args.work))
    try:
        measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(args: argparse.Namespace, folder: Path) -> None:
    widths = Widths(256, 512, 8, 2, 32) if args.small else Widths(4096, 14336, 32, 8, 128)
    source = write_source(folder / "source", text_config(widths, layers=4, vocab_size=1024))
    recipe = mixed_recipe(layers=4, activations="none")
    checkpoint = Checkpoint.open(source)
    plan = make_plan(recipe, checkpoint.config)
    weights = sum(x.out_features * x.in_features for x in decoder_linears(checkpoint.config))
    ours, theirs = folder / "ours", folder / "theirs"

    def run_ours() -> tuple[float, int]:
        shutil.rmtree(ours, ignore_errors=True)
        config = QuantizeConfig(source, ours, recipe, with_errors=False)
        started = time.perf_counter()
        result = quantize(config)
        return time.perf_counter() - started, result.num_bytes

    _, num_bytes = run_ours()
    rows = [torch.ones(1, dtype=torch.int64)]
    samples: dict[str, list[float]] = {"halfbyte_ns": [], "modelopt_ns": [], "disk_ns": []}
    wait_until_quiet(120)
    watch = Watch()
    for number in range(args.rounds):
        disk_s = move_bytes(source, folder / "moved", num_bytes)
        samples["disk_ns"].append(disk_s / weights * 1e9)
        samples["halfbyte_ns"].append(run_ours()[0] / weights * 1e9)
        if number % args.reference == 0:
            shutil.rmtree(theirs, ignore_errors=True)
            run = run_modelopt(checkpoint, plan, rows, torch.device("cpu"), theirs)
            seconds = run.calibrating_s + run.exporting_s
            samples["modelopt_ns"].append(seconds / weights * 1e9)
    usage = watch.usage()
    same, of = same_tensors(ours, theirs)
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    share = medians["disk_ns"] / medians["halfbyte_ns"]
    bound = "disk" if share >= 0.7 else "processor"
    results: dict[str, Any] = {
        "halfbyte_ns_per_weight": medians["halfbyte_ns"],
        "modelopt_ns_per_weight": medians["modelopt_ns"],
        "disk_ns_per_weight": medians["disk_ns"],
        "times_faster": round(medians["modelopt_ns"] / medians["halfbyte_ns"], 1),
        "share_of_disk": round(share, 3),
        "bound": bound,
        "same_tensors": f"{same} of {of}",
        "weights": weights,
        "threads": args.threads,
        "others_share": round(usage.foreign + usage.steal, 3),
    }
    for name, value in results.items():
        print(f"{name:<24} {value}")
    if same != of:
        raise SystemExit("the two exports differ")
    if not usage.is_quiet and not args.even_if_busy:
        raise SystemExit(f"no record: others took {usage.foreign + usage.steal:.0%} of the machine")
    record.write(
        args.out,
        name="quantize_speed",
        question="Data-free FP8 to mixed on a CPU: against Model Optimizer, and the disk alone?",
        command="PYTHONPATH=src python benchmarks/quantize_speed.py " + " ".join(sys.argv[1:]),
        figures=speed_figures(results),
        results=results,
        samples=samples,
    )


def speed_figures(results: dict[str, Any]) -> list[Figure]:
    """The whole run, from the open source to the renamed output."""
    theirs = Against("Model Optimizer's quantize and export", results["modelopt_ns_per_weight"])
    disk = Against("moving the bytes alone", results["disk_ns_per_weight"])
    return [
        Figure("FP8 to mixed, data-free, on a CPU", results["halfbyte_ns_per_weight"], "ns/weight",
               "quantize", {"bound by": results["bound"]}, (theirs, disk), is_headline=True),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
