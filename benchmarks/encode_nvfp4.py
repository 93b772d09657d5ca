"""Encoding bf16 weights to NVFP4 on a CPU: halfbyte against NVIDIA Model Optimizer.

Question: how many nanoseconds a weight does each need, on the same tensor in the same run?

Method: one weight of the shape of Mistral Medium's gate projection, a quarter of its rows, random
bf16. Both compute the tensor scale, the block scales and packed codes from it. One warm-up each,
then the two take turns (A B A B ...); every round is timed; the bytes of both are compared and must
be equal. The record says what others took of the processors meanwhile; a run in which that is more
than 5 % writes none.

Cost model: a weight is 2 bytes read and 0.5625 written; at 20 GB/s that is 0.13 ns. Ours makes
about twenty passes over vectors that stay in cache, so it is bound by the processor, not by memory.

Reading the result: below 3 ns a weight a full-width layer of 1.1e9 NVFP4 weights takes under 4 s.
The ratio moves with the number of cores less than the times do.

Last record: benchmarks/records/encode_nvfp4.json.

Run, in an environment with torch 2.13.0, nvidia-modelopt 0.47.0, requests and nvidia-ml-py:
    PYTHONPATH=src python benchmarks/encode_nvfp4.py --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

from halfbyte.bench import record
from halfbyte.bench.idle import Watch, wait_until_quiet
from halfbyte.figures import Against, Figure
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.nvfp4 import EncodedNVFP4, encode_nvfp4, nvfp4_tensor_scale

ROWS, COLUMNS = 28672 // 4, 12288
RECORD = Path(__file__).parent / "records" / "encode_nvfp4.json"


def ours(weight: torch.Tensor) -> EncodedNVFP4:
    return encode_nvfp4(weight, nvfp4_tensor_scale(largest_magnitude(weight)))


def theirs(weight: torch.Tensor) -> EncodedNVFP4:
    quantized, block_scale, tensor_scale = NVFP4QTensor.quantize(weight, 16)
    return EncodedNVFP4(quantized._quantized_data, block_scale, tensor_scale)


def same_bytes(a: EncodedNVFP4, b: EncodedNVFP4) -> bool:
    return (
        torch.equal(a.codes_OI2, b.codes_OI2)
        and torch.equal(a.scale_OB.view(torch.uint8), b.scale_OB.view(torch.uint8))
        and float(a.tensor_scale) == float(b.tensor_scale)
    )


def seconds(encode: Callable[[torch.Tensor], EncodedNVFP4], weight: torch.Tensor) -> float:
    started = time.perf_counter()
    encode(weight)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).mul_(0.02).bfloat16()
    assert same_bytes(ours(weight), theirs(weight)), "the two encode to different bytes"
    samples: dict[str, list[float]] = {"halfbyte_ns": [], "modelopt_ns": []}
    wait_until_quiet(120)
    watch = Watch()
    for _ in range(args.rounds):
        samples["halfbyte_ns"].append(seconds(ours, weight) / weight.numel() * 1e9)
        samples["modelopt_ns"].append(seconds(theirs, weight) / weight.numel() * 1e9)
    usage = watch.usage()
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    ratio = medians["modelopt_ns"] / medians["halfbyte_ns"]
    results = {
        "halfbyte_ns_per_weight": medians["halfbyte_ns"],
        "modelopt_ns_per_weight": medians["modelopt_ns"],
        "times_faster": round(ratio, 1),
        "same_bytes": True,
        "weights": weight.numel(),
        "threads": args.threads,
        "others_share": round(usage.foreign + usage.steal, 3),
    }
    print(
        f"halfbyte {medians['halfbyte_ns']} ns a weight, Model Optimizer "
        f"{medians['modelopt_ns']} ns: {ratio:.1f} times faster, same bytes"
    )
    if not usage.is_quiet:
        raise SystemExit(f"no record: others took {usage.foreign + usage.steal:.0%} of the machine")
    record.write(
        args.out,
        name="encode_nvfp4",
        question="bf16 to NVFP4 on a CPU: how much faster than Model Optimizer, same bytes?",
        command=f"PYTHONPATH=src python benchmarks/encode_nvfp4.py --threads {args.threads}",
        figures=encode_figures(results),
        results=results,
        samples=samples,
    )


def encode_figures(results: dict[str, Any]) -> list[Figure]:
    ours = results["halfbyte_ns_per_weight"]
    against = (Against("Model Optimizer", results["modelopt_ns_per_weight"]),)
    return [Figure("bf16 to NVFP4 on a CPU", ours, "ns/weight", "quantize", {}, against)]


if __name__ == "__main__":
    main()
