"""Timing on one GPU: events, graph replays, the ceilings of the device, rows for the record.

A share of a ceiling means something only against ceilings measured on the same device in the same
run, so every record carries both.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from halfbyte.figures import Against, Figure

# What tells one row from another, in the order of its label.
LABEL_KEYS = ("kind", "linear", "format", "block", "batch", "context", "tokens", "mode")
# Mistral Medium 3.5's decoder; fewer are built where memory is short.
WHOLE_MODEL_LAYERS = 88


def time_ms(work: Callable[[], object], *, warmups: int = 3, repeats: int = 10) -> list[float]:
    """Milliseconds of each of `repeats` runs of `work` on the current stream, by events."""
    for _ in range(warmups):
        work()
    events = [
        tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def time_graph_ms(work: Callable[[], object]) -> list[float]:
    """Milliseconds of one `work`, captured into a graph and replayed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    return time_ms(graph.replay)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest rates that this device reached in this run.

    copy_tb_per_s       a large copy, bytes read plus bytes written
    read_tb_per_s       a large reduction, bytes read
    bf16_tflop_per_s    an 8192^3 product of random values through torch
    fp8_tflop_per_s     the same in e4m3 with f32 sums promoted (`_scaled_mm`)
    fp8_fast_tflop_per_s  the same with the tensor core's own sums
    bf16_sustained_tflop_per_s, fp8_sustained_tflop_per_s   the bf16 product and the last one after
        a second of nothing else, which is when the board has come down to its power limit
    """

    copy_tb_per_s: float
    read_tb_per_s: float
    bf16_tflop_per_s: float
    fp8_tflop_per_s: float
    fp8_fast_tflop_per_s: float
    bf16_sustained_tflop_per_s: float
    fp8_sustained_tflop_per_s: float

    def sustained(self) -> "Ceilings":
        """The same with product rates that the power limit leaves."""
        return replace(
            self,
            bf16_tflop_per_s=self.bf16_sustained_tflop_per_s,
            fp8_tflop_per_s=min(self.fp8_tflop_per_s, self.fp8_sustained_tflop_per_s),
            fp8_fast_tflop_per_s=self.fp8_sustained_tflop_per_s,
        )


# FLOP of one multiprocessor's tensor cores in a cycle, dense, in 16 bits and in FP8 (NVIDIA H100
# whitepaper: 989 and 1979 TFLOP/s at 132 x 1.83 GHz).
TENSOR_FLOP_PER_CYCLE = 4096
_SUSTAINED_S = 1.2


@dataclass(slots=True)
class Board:
    """What the board said of itself while something ran: clock of the multiprocessors, power."""

    sm_mhz: list[int] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    limit_w: float | None = None

    def facts(self) -> dict[str, float]:
        """Medians, for a row of a record; empty where the board was not asked."""
        if not self.sm_mhz:
            return {}
        facts = {
            "sm_mhz": float(statistics.median(self.sm_mhz)),
            "power_w": float(statistics.median(self.power_w)),
        }
        return facts if self.limit_w is None else {**facts, "power_limit_w": self.limit_w}


@contextmanager
def watch_board(device: torch.device) -> Iterator[Board]:
    """Ask the driver's management library every 20 ms; nothing is seen where there is none."""
    seen, stop = Board(), threading.Event()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield seen
        return
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    found = library.nvmlInit_v2() == 0
    found = found and library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) == 0
    value = ctypes.c_uint()

    def ask(name: str, *extra: int) -> int | None:
        status = getattr(library, name)(handle, *extra, ctypes.byref(value))
        return value.value if status == 0 else None

    def watch() -> None:
        while not stop.wait(0.02):
            mhz, milliwatts = ask("nvmlDeviceGetClockInfo", 1), ask("nvmlDeviceGetPowerUsage")
            if mhz is not None and milliwatts is not None:
                seen.sm_mhz.append(mhz)
                seen.power_w.append(milliwatts / 1000)

    if found and (limit := ask("nvmlDeviceGetEnforcedPowerLimit")) is not None:
        seen.limit_w = limit / 1000
    thread = threading.Thread(target=watch, name="board", daemon=True)
    if found:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        if found:
            thread.join()


def sustained_ms(work: Callable[[], object]) -> float:
    """Milliseconds of one `work` after a second of nothing else."""
    end = time.monotonic() + _SUSTAINED_S
    samples = time_ms(work, repeats=10)
    while time.monotonic() < end:
        samples = time_ms(work, warmups=0, repeats=20)
    return statistics.median(samples)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy and product rates; a few gigabytes and four seconds."""
    num_bytes = 1 << 32
    source = torch.randint(0, 255, (num_bytes // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(time_ms(lambda: target.copy_(source)))
    wide = source.view(torch.float32)
    read = statistics.median(time_ms(lambda: torch.amax(wide)))
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
    bf16_sustained = sustained_ms(lambda: a @ b.t())
    fp8_sustained = sustained_ms(product(True))
    flop = 2.0 * side**3
    return Ceilings(
        2 * num_bytes / copy / 1e9,
        num_bytes / read / 1e9,
        flop / bf16 / 1e9,
        flop / fp8 / 1e9,
        flop / fast / 1e9,
        flop / bf16_sustained / 1e9,
        flop / fp8_sustained / 1e9,
    )


def results_and_samples(
    ceilings: Ceilings, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Rows of a GPU benchmark as `record.write` takes them: figures here, every sample there."""
    samples, kept = {}, []
    for row in rows:
        label = " ".join(str(row[key]) for key in LABEL_KEYS if key in row)
        if "samples_ms" in row:
            samples[f"{label}, ms"] = list(row["samples_ms"])
        kept.append({"label": label, **{k: v for k, v in row.items() if k != "samples_ms"}})
    return {"ceilings": asdict(ceilings), "config": dict(config), "rows": kept}, samples


def kernel_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of `bench kernels`: at which rate each product reads its weights.

    Of several block shapes the fastest counts.
    """
    copy_rate = results["ceilings"]["copy_tb_per_s"]
    best: dict[tuple[str, str, int], float] = {}
    for row in results["rows"]:
        key = row["linear"], row["format"], row["tokens"]
        best[key] = max(best.get(key, 0.0), row["tb_per_s"])
    return [
        Figure(
            "weights read by a linear", rate, "TB/s", "kernels",
            {"linear": linear, "weights": format_, "tokens": tokens},
            (Against("copy rate", copy_rate),),
        )
        for (linear, format_, tokens), rate in best.items()
    ]  # fmt: skip


_WEIGHTS = ("recipe", "head", "FP8 activations")


def engine_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of `bench engine`: each decode step and prompt against its floor.

    Where the tensor cores bound a row, how busy they were is a figure, too, with the clock that
    the board's power left.
    """
    config = results["config"]
    rows = [row for row in results["rows"] if "share_of_floor" in row]
    # What is said of the weights only where they are not those of the shipped format.
    weights = {key: config[key] for key in _WEIGHTS if key in config}
    return [fig for row in rows for fig in _row_figures(row, config["layers"], weights)]


def _row_figures(row: Mapping[str, Any], layers: int, weights: Mapping[str, str]) -> list[Figure]:
    # README shows the whole model: one stream's step, and the longest prompt.
    is_whole = layers == WHOLE_MODEL_LAYERS and row["mode"] == "exact" and not weights
    conditions: dict[str, str | int | float] = {"layers": layers, "products": row["mode"]}
    conditions |= weights
    if row["kind"] == "decode":
        conditions |= {"batch": row["batch"], "context": row["context"]}
        is_headline = is_whole and (row["batch"], row["context"]) == (1, 128)
        against = [Against("floor", row["floor_ms"])]
        if "graph_ms" in row:
            against.append(Against("the graph alone", row["graph_ms"]))
        figure = Figure("decode step", row["median_ms"], "ms", "decode", conditions, tuple(against),
                        is_headline)  # fmt: skip
    else:
        conditions |= {"prompt tokens": row["tokens"]}
        floor = Against("floor", row["tokens"] / row["floor_ms"] * 1000)
        figure = Figure("prefill", row["tokens_per_s"], "tokens/s", "prefill", conditions, (floor,),
                        is_whole and row["tokens"] == 8192)  # fmt: skip
    if row.get("tensor_share", 0.0) <= 0.5:
        return [figure]
    clock = {"clock": f"{row['sm_mhz']:.0f} MHz", "power": f"{row['power_w']:.0f} W"}
    name = f"tensor cores busy in {figure.name}"
    share = 100 * row["tensor_share"]
    return [figure, Figure(name, share, "%", figure.topic, {**conditions, **clock})]
