"""The whole decoder on one GPU as it is served, in the shipped mixed format or another recipe's.

Question: how many milliseconds does a decode step take at each batch size and context, how many
    tokens a second does prefill reach, and what share of the floor is that?
Method: random weights of the geometry on the device (`synthetic`) under the engine's own runner,
    paged FP8 cache with random content. Decode: sequences as if so many tokens had been computed;
    each step is launched, tokens chosen greedily on the device, before those of the last one are
    read, as the engine does it; 5 warm-up steps, then `steps` steps timed from one reading to the
    next. Beside it the graph alone, replayed and timed by events. Prefill: one prompt from its
    start to its last token's logits, 1 warm-up, `repeats` runs timed by events.
Cost model: decode floor = max(bytes / copy rate, FLOP / product rate), bytes = all linears once
    plus the context's keys and values; prefill floor = FLOP of each linear / the rate of its
    format.
Reading the result: share of the floor, against ceilings measured in the same run. The product rate
    of NVFP4 layers is bf16's in "exact", FP8's in "fast" (weights prepared for that). Ceilings
    are those of short bursts; under seconds of products the board's power limit lowers them
    (benchmarks/notes-kernels.md): rows also give the floor at product rates after a second of
    products, the clock and power seen, and the share of the time that the tensor cores need at that
    clock. Records from before the served step was measured timed a graph that chose tokens itself.
Last record: benchmarks/records/engine-h200.json
"""

import gc
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from halfbyte.bench.gpu import (
    TENSOR_FLOP_PER_CYCLE,
    Board,
    Ceilings,
    measure_ceilings,
    time_ms,
    watch_board,
)
from halfbyte.bench.synthetic import (
    SHIPPED_RECIPE,
    formats_of,
    medium_geometry,
    random_weights,
)
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.graphs import size_for
from halfbyte.engine.hopper import HopperDevice
from halfbyte.engine.load import HopperPart, resolve_alone
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.runner import Runner
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda.library import KernelLibrary, columns_for, unavailable
from halfbyte.model.cuda.weights import CudaWeights, Products, layer_linears
from halfbyte.modules import WeightFormat


@dataclass(frozen=True, slots=True)
class Point:
    """A decode measurement: sequences, and the tokens each already has."""

    batch: int
    context: int


POINTS = (
    Point(1, 128),
    Point(4, 128),
    Point(16, 128),
    Point(64, 128),
    Point(128, 128),
    Point(1, 32768),
    Point(8, 8192),
)
PROMPTS = (512, 2048, 8192)
# What `--products` of the command measures.
PRODUCTS: dict[str, tuple[Products, ...]] = {
    "exact": ("exact",),
    "fast": ("fast",),
    "both": ("exact", "fast"),
}
_WARMUPS, _STEPS = 5, 30
# What the points need, and the longest prompt in one piece.
CONFIG = EngineConfig(
    device="cuda",
    max_model_len=32768 + 128,
    max_sequences=128,
    max_batch_tokens=max(PROMPTS),
    kv_cache_tokens=max(point.batch * (point.context + 128) for point in POINTS),
    mode="fp8_declared",
    kv_cache="fp8",
    gpu_memory_utilization=0.95,
)


class Served(NamedTuple):
    """The engine's runner over weights that lie on the GPU."""

    runner: Runner
    device: HopperDevice
    weights: CudaWeights


def load_served(
    library: KernelLibrary, weights: CudaWeights, config: EngineConfig = CONFIG
) -> Served:
    """Compile, size the cache and capture the graphs, as when an engine is loaded."""
    device, resolved = HopperPart(config, library, weights).build(resolve_alone(config))
    for pages in (pages for layer in device.cache.layers for pages in layer):
        codes = pages.view(torch.uint8)
        # Finite codes of both signs.
        codes.random_(0, 0x70)
        codes[1::2] |= 0x80
    return Served(Runner(device, resolved), device, weights)


def sequences_of(point: Point, vocab_size: int, num_pages: int) -> list[Sequence]:
    """Sequences of which all but the last token count as computed, pages in scattered order."""
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    pages_each = -(-(point.context + 128) // CONFIG.block_tokens)
    order = torch.randperm(num_pages)[: point.batch * pages_each].view(point.batch, -1).tolist()
    found = []
    for slot in range(point.batch):
        token_ids = torch.randint(0, vocab_size, (point.context + 1,)).tolist()
        request = GenerationRequest(str(slot), tuple(token_ids), params)
        sequence = Sequence(request, arrival=slot, seed=0, max_tokens=128)
        sequence.slot, sequence.blocks = slot, order[slot]
        sequence.num_computed = point.context
        found.append(sequence)
    return found


def step_ms(
    runner: Runner, sequences: list[Sequence], num_steps: int
) -> tuple[list[float], set[int]]:
    """Milliseconds of each step, from one reading of tokens to the next, and the tokens seen."""

    def launch() -> Any:
        works = [Work(one, len(one.token_ids) - 1, 1) for one in sequences]
        tokens = runner.launch(works)
        for row, one in enumerate(sequences):
            one.reserve(row)
        return tokens

    samples: list[float] = []
    seen: set[int] = set()
    flight = launch()
    last = time.perf_counter()
    for _ in range(num_steps):
        ahead = launch()
        token_ids = runner.wait(flight)
        now = time.perf_counter()
        samples.append((now - last) * 1e3)
        flight, last = ahead, now
        for one, token_id in zip(sequences, token_ids, strict=True):
            one.settle(token_id)
        seen.update(token_ids)
    for one, token_id in zip(sequences, runner.wait(flight), strict=True):
        one.settle(token_id)
    return samples, seen


def tensor_ms(weights: CudaWeights, num_tokens: int, sm_mhz: float, *, with_head: bool) -> float:
    """Milliseconds of the tensor cores alone at a clock, without waits and attention."""
    num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    linears = [li for la in weights.layers for li in layer_linears(la)]
    cycles = 0.0
    for linear in [*linears, weights.head] if with_head else linears:
        weight = linear.weight
        flop = 2.0 * num_tokens * weight.out_features * weight.in_features
        in_fp8 = weight.format in ("fp8", "nvfp4_fast")
        cycles += flop / (TENSOR_FLOP_PER_CYCLE * (2 if in_fp8 else 1) * num_sms)
    return cycles / sm_mhz / 1e3


def _board_facts(
    board: Board, weights: CudaWeights, num_tokens: int, median_ms: float, *, with_head: bool
) -> dict[str, float]:
    """What a row says of clock, power and the share of time that the tensor cores need at it."""
    facts = board.facts()
    if not facts:
        return {}
    busy_ms = tensor_ms(weights, num_tokens, facts["sm_mhz"], with_head=with_head)
    return {**facts, "tensor_share": busy_ms / median_ms}


def decode_floor_ms(weights: CudaWeights, point: Point, ceilings: Ceilings) -> float:
    """Milliseconds of a step's bytes at the copy rate, or of its products if that is longer."""
    config = weights.config
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    num_bytes = weights.num_step_bytes + point.batch * point.context * kv
    by_bytes = num_bytes / ceilings.copy_tb_per_s / 1e9
    rate = {
        "fp8": ceilings.fp8_tflop_per_s,
        "nvfp4": ceilings.bf16_tflop_per_s,
        "nvfp4_fast": ceilings.fp8_tflop_per_s,
        "bf16": ceilings.bf16_tflop_per_s,
    }
    by_flop = by_parts = 0.0
    for linear in [weights.head, *(li for la in weights.layers for li in layer_linears(la))]:
        weight = linear.weight
        flop = 2.0 * point.batch * weight.out_features * weight.in_features
        flop_ms = flop / rate[weight.format] / 1e9
        by_flop += flop_ms
        by_parts += max(flop_ms, weight.data.numel() / ceilings.copy_tb_per_s / 1e9)
    return max(by_bytes, by_flop, by_parts)


def run_decode(served: Served, point: Point, ceilings: Ceilings) -> dict[str, Any]:
    """Measure one row: milliseconds a served step, its share of the floor, the graph alone."""
    runner, device, weights = served
    sequences = sequences_of(point, weights.config.vocab_size, device.cache.num_pages)
    step_ms(runner, sequences, _WARMUPS)
    with watch_board(torch.device("cuda")) as board:
        samples, seen = step_ms(runner, sequences, _STEPS)
    assert all(0 <= token_id < weights.config.vocab_size for token_id in seen)
    size = size_for(point.batch, device.executor.sizes)
    assert size is not None
    graph_ms = time_ms(partial(device.executor.replay, size), warmups=_WARMUPS, repeats=_STEPS)
    median = statistics.median(samples)
    floor = decode_floor_ms(weights, point, ceilings)
    sustained_floor = decode_floor_ms(weights, point, ceilings.sustained())
    columns = columns_for(point.batch)  # what a product is padded to
    return {
        "kind": "decode",
        "batch": point.batch,
        "context": point.context,
        "mode": weights.mode,
        "median_ms": median,
        "graph_ms": statistics.median(graph_ms),
        "samples_ms": samples,
        "tokens_per_s": point.batch / median * 1e3,
        "tb_per_s": weights.num_step_bytes / median / 1e9,
        "floor_ms": floor,
        "share_of_floor": floor / median,
        "sustained_floor_ms": sustained_floor,
        "share_of_sustained_floor": sustained_floor / median,
        **_board_facts(board, weights, columns, median, with_head=True),
        "distinct_tokens": len(seen),
    }


def prefill_floor_ms(weights: CudaWeights, num_tokens: int, ceilings: Ceilings) -> float:
    """Milliseconds of a prompt's products at their rates, without attention and unpacking."""
    total = 0.0
    for layer in weights.layers:
        for linear in layer_linears(layer):
            weight = linear.weight
            in_fp8 = weight.format in ("fp8", "nvfp4_fast")
            rate = ceilings.fp8_fast_tflop_per_s if in_fp8 else ceilings.bf16_tflop_per_s
            total += 2.0 * num_tokens * weight.out_features * weight.in_features / rate / 1e9
    return total


def run_prefill(served: Served, num_tokens: int, ceilings: Ceilings) -> dict[str, Any]:
    """Measure one row: tokens a second of a prompt, from an empty cache to its last logits."""
    runner, device, weights = served
    (sequence,) = sequences_of(
        Point(1, num_tokens - 1), weights.config.vocab_size, device.cache.num_pages
    )
    works = [Work(sequence, 0, num_tokens)]
    with torch.inference_mode():
        with watch_board(torch.device("cuda")) as board:
            samples = time_ms(partial(runner.run, works), warmups=1, repeats=3)
        logits_RV = runner.run(works).logits_RV
    assert logits_RV.shape[0] == 1 and bool(torch.isfinite(logits_RV).all())
    median = statistics.median(samples)
    floor = prefill_floor_ms(weights, num_tokens, ceilings)
    sustained_floor = prefill_floor_ms(weights, num_tokens, ceilings.sustained())
    return {
        "kind": "prefill",
        "tokens": num_tokens,
        "mode": weights.mode,
        "fp8_sums": "tensor core",
        "median_ms": median,
        "samples_ms": samples,
        "tokens_per_s": num_tokens / median * 1e3,
        "floor_ms": floor,
        "share_of_floor": floor / median,
        "sustained_floor_ms": sustained_floor,
        "share_of_sustained_floor": sustained_floor / median,
        **_board_facts(board, weights, num_tokens, median, with_head=False),
    }


class Build(NamedTuple):
    """What is built: so many layers of the medium geometry, in which formats.

    recipe        of the library, or a file
    head          format of the output head, if not the recipe's
    is_per_token  activations of FP8 linears are rounded by each token's largest value
    """

    num_layers: int
    recipe: str = SHIPPED_RECIPE
    head: WeightFormat | None = None
    is_per_token: bool = False


def make_weights(
    library: KernelLibrary, build: Build | int, mode: Products = "exact"
) -> CudaWeights:
    """Random weights of the medium geometry; a number of layers means the shipped format."""
    if isinstance(build, int):
        build = Build(build)
    config = medium_geometry(build.num_layers)
    formats = formats_of(config, build.recipe, build.head)
    return random_weights(library, config, formats, is_per_token=build.is_per_token, mode=mode)


def format_row(row: dict[str, Any]) -> str:
    """Format one measurement as a line for a terminal."""
    if row["kind"] == "decode":
        return (
            f"decode  batch {row['batch']:4} context {row['context']:6} {row['mode']:5} "
            f"{row['median_ms']:8.3f} ms (graph {row['graph_ms']:8.3f}) "
            f"{row['tokens_per_s']:8.1f} tok/s {row['tb_per_s']:6.3f} TB/s "
            f"floor {row['floor_ms']:7.2f} ms share {row['share_of_floor']:6.1%}{_board(row)}"
        )
    return (
        f"prefill {row['tokens']:6} {row['mode']:5} {row['median_ms']:9.2f} ms "
        f"{row['tokens_per_s']:8.1f} tok/s floor {row['floor_ms']:8.2f} ms "
        f"share {row['share_of_floor']:6.1%}{_board(row)}"
    )


def _board(row: dict[str, Any]) -> str:
    if "sm_mhz" not in row:
        return ""
    return (
        f" ({row['share_of_sustained_floor']:.1%} of the sustained one); {row['sm_mhz']:.0f} MHz, "
        f"{row['power_w']:.0f} W, tensor cores {row['tensor_share']:.1%}"
    )


def run_start(
    build: Build, device: torch.device, mode: Products = "exact"
) -> tuple[dict[str, Any], KernelLibrary, Served]:
    """Seconds to a first token: weights, kernels, cache, graphs, one step."""
    start = time.perf_counter()
    library = KernelLibrary(device)
    weights = make_weights(library, build, mode)
    torch.cuda.synchronize()
    weights_s = time.perf_counter() - start
    served = load_served(library, weights)
    ready_s = time.perf_counter() - start
    num_pages = served.device.cache.num_pages
    step_ms(served.runner, sequences_of(Point(1, 128), weights.config.vocab_size, num_pages), 1)
    row = {
        "kind": "start",
        "weights_s": weights_s,
        "ready_s": ready_s,
        "first_token_s": time.perf_counter() - start,
        "weights_bytes": weights.num_bytes,
        "allocated_bytes": torch.cuda.memory_allocated(),
        **served.device.facts(),
    }
    return row, library, served


def run_engine(
    build: Build, modes: tuple[Products, ...] = ("exact", "fast")
) -> tuple[Ceilings, list[dict[str, Any]]]:
    """Every row of the table, printed as it comes."""
    device = torch.device("cuda")
    reason = unavailable(device.type)
    if reason is not None:
        raise UnsupportedError(f"bench engine measures the CUDA kernels: {reason}")
    torch.manual_seed(0)
    torch.zeros(1, device=device)
    ceilings = measure_ceilings(device)
    print(ceilings, flush=True)
    torch.cuda.empty_cache()
    start, library, served = run_start(build, device, modes[0])
    rows = [start]
    print(start, flush=True)
    rows += _run_mode(served, ceilings)
    for mode in modes[1:]:
        # Both do not fit at once; what holds them goes in cycles, which building one collects.
        del served
        gc.collect()
        torch.cuda.empty_cache()
        served = load_served(library, make_weights(library, build, mode))
        rows += _run_mode(served, ceilings)
    return ceilings, rows


def _run_mode(served: Served, ceilings: Ceilings) -> list[dict[str, Any]]:
    rows = []
    for point in POINTS:
        rows.append(run_decode(served, point, ceilings))
        print(format_row(rows[-1]), flush=True)
    for num_tokens in PROMPTS:
        rows.append(run_prefill(served, num_tokens, ceilings))
        print(format_row(rows[-1]), flush=True)
    return rows
