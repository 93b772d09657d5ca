"""Each product of a decoder layer at each batch size, alone.

Question: what share of the device's copy rate does the streaming linear reach for each weight
    format, shape and number of tokens, and where does it stop being bound by memory?
Method: several different weights of one shape in turn (no cache holds them), captured into a graph,
    three warm-up replays, ten timed by events; activations and weights random as in `synthetic`.
Cost model: bytes = weight bytes (FP8 1, NVFP4 0.5625, bf16 2 a weight); FLOP = 2 T O I.
Reading the result: TB/s of weights against the copy rate of the same run. At 128 tokens NVFP4 is
    bound by the tensor cores (2 * 128 FLOP for 0.5625 byte).
Last record: benchmarks/records/kernels-h200.json
"""

import statistics
from typing import Any

import torch

from halfbyte.bench.gpu import time_graph_ms
from halfbyte.bench.synthetic import make_tables, random_weight
from halfbyte.kernels.cuda.library import (
    KernelLibrary,
    StreamConfig,
    columns_for,
    stage_bytes,
)
from halfbyte.kernels.cuda.ops import stream_launch
from halfbyte.kernels.repack import K_BLOCK, TiledWeight, TileFormat

TOKENS = (1, 4, 16, 64, 128)
SHAPES: tuple[tuple[str, TileFormat, int, int], ...] = (
    ("qkv", "fp8", 14336, 12288),
    ("o", "fp8", 12288, 12288),
    ("gate_up", "nvfp4", 57344, 12288),
    ("down", "nvfp4", 12288, 28672),
    ("gate_up", "nvfp4_fast", 57344, 12288),
    ("down", "nvfp4_fast", 12288, 28672),
    ("head", "bf16", 131072, 12288),
)
# Weights of a shape, read in turn, lest one stay in the cache.
_WEIGHTS = 4


def time_linear(
    library: KernelLibrary,
    weights: list[TiledWeight],
    num_tokens: int,
    config: StreamConfig | None,
) -> dict[str, Any]:
    """Milliseconds a product, over the weights in turn."""
    weight, device = weights[0], library.device
    columns = columns_for(num_tokens)
    x = torch.randn(weight.num_k_blocks * K_BLOCK[weight.format], columns, device=device)
    if weight.format in ("fp8", "nvfp4_fast"):
        activations = (x * 50.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        activations = x.to(torch.float16 if weight.format == "nvfp4" else torch.bfloat16)
    partial = torch.empty(8 * num_tokens * weight.out_features, device=device)
    out = torch.empty(num_tokens * weight.out_features, dtype=torch.bfloat16, device=device)
    launches = [
        stream_launch(
            library,
            each,
            activations,
            partial,
            num_tokens,
            out=out,
            config=config,
        )
        for each in weights
    ]
    assert launches[0][1].num_slots <= 8

    def work() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for launch, _ in launches:
            launch.run(stream)

    samples = [sample / len(weights) for sample in time_graph_ms(work)]
    median = statistics.median(samples)
    num_bytes = weight.data.numel()
    flop = 2.0 * num_tokens * weight.out_features * weight.in_features
    return {
        "tokens": num_tokens,
        "median_ms": median,
        "samples_ms": samples,
        "tb_per_s": num_bytes / median / 1e9,
        "tflop_per_s": flop / median / 1e9,
    }


def variants(format_: TileFormat, columns: int) -> list[StreamConfig]:
    """Block shapes worth a comparison: (groups, tiles, registers, promote, ring KiB)."""
    choices: tuple[tuple[int, int, int, int, int], ...]
    if format_ == "nvfp4_fast":
        choices = ((2, 1, 0, 16, 214), (2, 1, 0, 4, 214), (4, 1, 0, 16, 214))
        if columns == 128:
            choices = (
                (2, 1, 0, 16, 214),
                (2, 1, 0, 4, 214),
                (2, 1, 0, 0, 214),
                (2, 2, 232, 0, 214),
            )
    elif format_ != "nvfp4":
        choices = ((4, 1, 0, 1, 172), (4, 1, 0, 1, 104))
        if columns == 128:
            choices = ((2, 1, 0, 1, 214), (2, 1, 0, 1, 172))
    elif columns <= 16:
        choices = ((4, 1, 0, 1, 172), (4, 1, 0, 1, 104), (2, 2, 0, 1, 172), (2, 2, 0, 1, 104))
    elif columns <= 64:
        choices = ((4, 1, 0, 1, 172), (2, 2, 0, 1, 172))
    else:
        choices = ((2, 2, 232, 1, 214), (2, 2, 232, 1, 172))
    made = []
    for groups, tiles, registers, promote, ring in choices:
        stages = min(8, ring * 1024 // stage_bytes(format_, columns, groups * tiles))
        made.append(StreamConfig(groups, tiles, stages, registers, promote=promote))
    return list(dict.fromkeys(made))


def run_kernels(
    library: KernelLibrary, tokens: tuple[int, ...], *, compares: bool
) -> list[dict[str, Any]]:
    """A row for each shape, number of tokens and (with `compares`) block shape."""
    tables = make_tables(library.device)
    rows = []
    for name, format_, out, in_ in SHAPES:
        count = 1 if name == "head" else _WEIGHTS
        weights = [random_weight(library, tables, format_, out, in_, i) for i in range(count)]
        for num_tokens in tokens:
            configs: list[StreamConfig | None] = [None]
            if compares:
                configs = list(variants(format_, columns_for(num_tokens)))
            for config in configs:
                if config is not None and out % config.tile_rows:
                    continue
                row = time_linear(library, weights, num_tokens, config)
                used = config or library.linear(format_, columns_for(num_tokens))[1]
                shape = f"{used.groups}x{used.tiles} stages {used.stages}"
                if format_ in ("fp8", "nvfp4_fast"):
                    shape += f" promote {used.promote}"
                rows.append({"linear": name, "format": format_, "block": shape, **row})
        del weights
        torch.cuda.empty_cache()
    return rows


def format_rows(rows: list[dict[str, Any]], copy_tb_per_s: float) -> str:
    """Format the rows of `run_kernels` as a table."""
    lines = ["linear   format     tokens  block                      ms     TB/s  share   TFLOP/s"]
    for row in rows:
        lines.append(
            f"{row['linear']:8} {row['format']:10} {row['tokens']:6}  {row['block']:24} "
            f"{row['median_ms']:7.4f} {row['tb_per_s']:7.3f} "
            f"{row['tb_per_s'] / copy_tb_per_s:6.1%} "
            f"{row['tflop_per_s']:8.1f}"
        )
    return "\n".join(lines)
