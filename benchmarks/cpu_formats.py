"""What a step costs on a CPU by the formats of its linears, the output head included.

Question: does a decode step of one stream get shorter as its weights do, down to NVFP4 everywhere
and in the head, and what does rounding FP8 activations cost, by a stored scale or by token?

Method: the linears of four decoder layers and a head (width 2048, MLP 5632, 32 query and 8 KV heads
of 64, vocabulary 32,768), random weights, as `model.linear` prepares them; attention and norms are
left out. Every set of formats takes its turn (A B C ... A B C ...); the first turn is a warm-up.
The record holds every time and what others took of the processors meanwhile.

Cost model: weights are read once a step; at one row the time is bytes over what one core can read
and decode, at many rows it is products. Rounding is one pass over a row, of which there are few.

Reading the result: compare within a run. On a busy machine medians are long and still in order.

Last record: benchmarks/records/cpu_formats.json, of an idle machine.

Run: PYTHONPATH=src python benchmarks/cpu_formats.py --record benchmarks/records/cpu_formats.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from halfbyte.bench import record
from halfbyte.bench.idle import Watch
from halfbyte.figures import Against, Figure
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.formats.nvfp4 import encode_nvfp4, nvfp4_tensor_scale
from halfbyte.model.linear import Linear, StoredLinear, make_linear
from halfbyte.modules import Fp8Activations, Mode, WeightFormat

WIDTH, MLP, QUERY, KV, VOCABULARY, LAYERS = 2048, 5632, 2048, 512, 32768, 4


class Build(NamedTuple):
    """Formats of the linears, and how FP8 ones take their input."""

    attention: WeightFormat
    mlp: WeightFormat
    head: WeightFormat
    mode: Mode = "weight_only"
    fp8_activations: Fp8Activations = "static"


BUILDS = {
    "bf16": Build("bf16", "bf16", "bf16"),
    "attention FP8, MLP NVFP4, head bf16": Build("fp8", "nvfp4", "bf16"),
    "the same, head FP8": Build("fp8", "nvfp4", "fp8"),
    "the same, head NVFP4": Build("fp8", "nvfp4", "nvfp4"),
    "NVFP4 everywhere": Build("nvfp4", "nvfp4", "nvfp4"),
    "FP8 everywhere": Build("fp8", "fp8", "fp8"),
    "FP8 everywhere, activations static": Build("fp8", "fp8", "fp8", "fp8_declared"),
    "FP8 everywhere, activations per token": Build(
        "fp8", "fp8", "fp8", "fp8_declared", "per-token"
    ),
}


def stored(format_: WeightFormat, out: int, in_: int) -> StoredLinear:
    """A linear of random weights as a checkpoint would hold it."""
    w_OI = (torch.randn(out, in_) / in_**0.5).to(torch.bfloat16)
    if format_ == "bf16":
        return StoredLinear("a.linear", format_, w_OI)
    if format_ == "fp8":
        scale = fp8_scale(w_OI.abs().amax())
        return StoredLinear("a.linear", format_, encode_fp8(w_OI, scale), scale, None, 8.0 / 448.0)
    encoded = encode_nvfp4(w_OI, nvfp4_tensor_scale(w_OI.abs().amax()))
    return StoredLinear("a.linear", format_, *encoded, 1.0)


def made(build: Build) -> list[tuple[Linear, int]]:
    """The linears of a step in order, each with the width of its input."""
    shapes = [
        (build.attention, QUERY + 2 * KV, WIDTH),
        (build.attention, WIDTH, QUERY),
        (build.mlp, 2 * MLP, WIDTH),
        (build.mlp, WIDTH, MLP),
    ] * LAYERS
    shapes.append((build.head, VOCABULARY, WIDTH))
    return [
        (make_linear([stored(format_, out, in_)], build.mode, build.fp8_activations), in_)
        for format_, out, in_ in shapes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = {name: made(build) for name, build in BUILDS.items()}
    samples: dict[str, list[float]] = {}
    figures = []
    watch = Watch()
    for rows in arguments.rows:
        inputs = {in_: torch.randn(rows, in_).to(torch.bfloat16) for in_ in (WIDTH, MLP)}
        for turn in range(arguments.turns + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                for linear, in_ in step:
                    linear(inputs[in_])
                if turn:
                    samples.setdefault(f"{name}, rows {rows}", []).append(
                        (time.perf_counter() - start) * 1e3
                    )
        first = statistics.median(samples[f"bf16, rows {rows}"])
        for name, step in steps.items():
            median = statistics.median(samples[f"{name}, rows {rows}"])
            size = sum(linear.num_bytes for linear, _ in step)
            print(f"rows {rows:4} {name:40} {size / 1e6:7.1f} MB {median:9.2f} ms", flush=True)
            conditions = {"rows": rows, "formats": name, "MB": round(size / 1e6, 1)}
            against = () if name == "bf16" else (Against("bf16", first),)
            figures.append(Figure("linears of a step", median, "ms", "decode", conditions, against))
    others = watch.usage().foreign
    print(f"others took {others:.0%} of the processors")
    if arguments.record is not None:
        record.write(
            arguments.record,
            name=arguments.record.stem,
            question="What does a step cost on a CPU by the formats of its linears?",
            command=f"PYTHONPATH=src python benchmarks/cpu_formats.py --record {arguments.record}",
            figures=figures,
            results={"others": others},
            samples=samples,
        )


if __name__ == "__main__":
    main()
