"""Timing on one GPU: events, graph replays, the ceilings of the device, and the record's frame.

A share of a ceiling means something only against ceilings measured on the same device in the same
run, so every record carries both.
"""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def time_ms(work: Callable[[], object], *, warmups: int = 3, repeats: int = 10) -> list[float]:
    """Milliseconds of each of `repeats` runs of `work` on the current stream, by events."""
    for _ in range(warmups):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def time_graph_ms(
    work: Callable[[], object], *, inner: int = 1, warmups: int = 3, repeats: int = 10
) -> list[float]:
    """Milliseconds of one `work`, captured `inner` times into a graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(inner):
                work()
    torch.cuda.current_stream().wait_stream(stream)
    samples = time_ms(graph.replay, warmups=warmups, repeats=repeats)
    return [sample / inner for sample in samples]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device did in this run.

    copy_tb_per_s       a large copy, bytes read plus bytes written
    read_tb_per_s       a large reduction, bytes read
    bf16_tflop_per_s    an 8192^3 product of random values through torch
    fp8_tflop_per_s     the same in e4m3 with f32 sums promoted (`_scaled_mm`)
    fp8_fast_tflop_per_s  the same with the tensor core's own sums
    """

    copy_tb_per_s: float
    read_tb_per_s: float
    bf16_tflop_per_s: float
    fp8_tflop_per_s: float
    fp8_fast_tflop_per_s: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy and product rates; a few gigabytes and a second."""
    num_bytes = 1 << 32
    source = torch.randint(0, 255, (num_bytes // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(time_ms(lambda: target.copy_(source)))
    wide = source.view(torch.float32)
    read = statistics.median(time_ms(lambda: torch.amax(wide)))
    del source, target, wide
    side = 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    bf16 = statistics.median(time_ms(lambda: a @ b.t(), repeats=20))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def product(fast: bool) -> Callable[[], object]:
        return lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    fp8 = statistics.median(time_ms(product(False), repeats=20))
    fast = statistics.median(time_ms(product(True), repeats=20))
    flop = 2.0 * side**3
    return Ceilings(
        2 * num_bytes / copy / 1e9,
        num_bytes / read / 1e9,
        flop / bf16 / 1e9,
        flop / fp8 / 1e9,
        flop / fast / 1e9,
    )


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def make_record(
    name: str, ceilings: Ceilings, config: Mapping[str, Any], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON of one run: what ran, on what, every sample."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["halfbyte", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain", "--untracked-files=no") != "",
        "device": {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        },
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "ceilings": asdict(ceilings),
        "config": dict(config),
        "results": results,
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
