"""The whole decoder on one GPU: decode steps and prefill, in the shipped mixed format.

Question: how many milliseconds does a decode step take at each batch size and context, how many
    tokens a second does prefill reach, and what share of the floor is that?
Method: random weights of the geometry on the device (`synthetic`), paged FP8 cache with random
    content. Decode: one captured graph a batch size, which also chooses the tokens and moves the
    sequences on; 5 warm-up steps, then `steps` steps each timed by events. Prefill: eager, one
    sequence from its start, 1 warm-up, `repeats` runs timed by events.
Cost model: decode floor = max(bytes / copy rate, FLOP / product rate), bytes = all linears once
    plus the context's keys and values; prefill floor = FLOP of each linear / the rate of its
    format.
Reading the result: share of the floor, against ceilings measured in the same run. The product rate
    of NVFP4 layers is bf16's in "exact", FP8's in "fast" (weights prepared for that). Ceilings
    are those of short bursts; under seconds of products the board's power limit lowers them
    (benchmarks/notes-kernels.md): rows also give the floor at product rates after a second of
    products, the clock and power seen, and the share of the time that the tensor cores need at that
    clock.
Last record: benchmarks/records/engine-h200.json
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from halfbyte.bench.gpu import (
    TENSOR_FLOP_PER_CYCLE,
    Board,
    Ceilings,
    measure_ceilings,
    time_ms,
    watch_board,
)
from halfbyte.bench.synthetic import medium_geometry, mixed_formats, random_weights
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda.library import (
    COLUMNS,
    PREFILL_CONFIGS,
    HeadShape,
    KernelLibrary,
    attention_code,
    choose_config,
    columns_for,
    compile_together,
    elementwise_code,
    linear_code,
    prefill_code,
    unavailable,
)
from halfbyte.kernels.repack import TileFormat
from halfbyte.model.cuda_decoder import (
    CudaWeights,
    DecodeStep,
    KvCache,
    Mode,
    Prefill,
    Rotary,
    layer_linears,
    make_cache,
)

PAGE_SLOTS = 16
_FORMATS: tuple[TileFormat, ...] = ("fp8", "nvfp4", "nvfp4_fast", "bf16")


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


def compile_all(num_layers: int) -> None:
    """Compile every kernel the runs need, in parallel; the cache on disk keeps them."""
    config = medium_geometry(num_layers)
    heads = HeadShape(config.head_dim, config.num_heads, config.num_kv_heads)
    tasks = [
        partial(linear_code, format_, columns, choose_config(format_, columns))
        for format_ in _FORMATS
        for columns in COLUMNS
    ]
    tasks += [partial(prefill_code, format_) for format_ in PREFILL_CONFIGS]
    tasks += [
        partial(elementwise_code, config.width, config.mlp_width, blocks, heads)
        for blocks in (1, 2, 8)
    ]
    tasks += [partial(attention_code, heads, PAGE_SLOTS, "e4m3", warps) for warps in (2, 4, 8)]
    compile_together(tasks)


def _fill_state(step: DecodeStep, cache: KvCache, point: Point) -> None:
    """Pages in scattered order, contexts of `point.context` tokens already stored."""
    pages_each = step.block_table_TP.shape[1]
    order = torch.randperm(point.batch * pages_each, device=step.block_table_TP.device)
    step.block_table_TP.copy_(order.view(point.batch, pages_each).int())
    step.positions_T.fill_(point.context)
    step.context_lengths_T.fill_(point.context + 1)
    page = step.block_table_TP[:, point.context // PAGE_SLOTS].long()
    step.slots_T.copy_(page * PAGE_SLOTS + point.context % PAGE_SLOTS)
    step.token_ids_T.random_(0, 1000)


def tensor_ms(weights: CudaWeights, num_tokens: int, sm_mhz: float, *, with_head: bool) -> float:
    """Time of the tensor cores alone at a clock, if nothing ever waited; attention not counted."""
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
    """Time of the bytes at the copy rate, or of the products at their rates if that is longer."""
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
    for linear in [
        weights.head,
        *(li for la in weights.layers for li in (la.qkv, la.o, la.gate_up, la.down)),
    ]:
        weight = linear.weight
        flop = 2.0 * point.batch * weight.out_features * weight.in_features
        flop_ms = flop / rate[weight.format] / 1e9
        by_flop += flop_ms
        by_parts += max(flop_ms, weight.data.numel() / ceilings.copy_tb_per_s / 1e9)
    return max(by_bytes, by_flop, by_parts)


def run_decode(
    library: KernelLibrary,
    weights: CudaWeights,
    point: Point,
    ceilings: Ceilings,
    *,
    steps: int = 30,
    overlaps: bool = True,
) -> dict[str, Any]:
    """One row: milliseconds a step, its share of the floor, and what the graph cost."""
    device, config = library.device, weights.config
    max_context = point.context + steps + 64
    pages = point.batch * -(-max_context // PAGE_SLOTS)
    cache = make_cache(config, pages, PAGE_SLOTS, device)
    for tensor in (*cache.keys, *cache.values):
        tensor.random_(
            0, 0x70
        )  # finite codes of either half; the sign bit comes with the next line
        tensor.bitwise_xor_(torch.randint(0, 2, (1,), dtype=torch.uint8, device=device) << 7)
    before = torch.cuda.memory_allocated()
    step = DecodeStep(
        library,
        weights,
        cache,
        point.batch,
        rotary=Rotary(config, device),
        max_context_tokens=max_context,
        overlaps=overlaps,
    )
    _fill_state(step, cache, point)
    start = time.perf_counter()
    step.capture()
    torch.cuda.synchronize()
    capture_s = time.perf_counter() - start
    with watch_board(device) as board:
        samples = time_ms(step.replay, warmups=5, repeats=steps)
    median = statistics.median(samples)
    floor = decode_floor_ms(weights, point, ceilings)
    sustained_floor = decode_floor_ms(weights, point, ceilings.sustained())
    columns = columns_for(point.batch)  # what a product is padded to
    chosen = step.history[: int(step.step_count)]
    assert bool(((chosen >= 0) & (chosen < config.vocab_size)).all())
    assert bool(torch.isfinite(step.residual_TD.float()).all())
    return {
        "kind": "decode",
        "batch": point.batch,
        "context": point.context,
        "mode": weights.mode,
        "median_ms": median,
        "samples_ms": samples,
        "tokens_per_s": point.batch / median * 1e3,
        "tb_per_s": weights.num_step_bytes / median / 1e9,
        "floor_ms": floor,
        "share_of_floor": floor / median,
        "sustained_floor_ms": sustained_floor,
        "share_of_sustained_floor": sustained_floor / median,
        **_board_facts(board, weights, columns, median, with_head=True),
        "launches": step.num_launches,
        "capture_s": capture_s,
        "buffers_bytes": torch.cuda.memory_allocated() - before,
        "distinct_tokens": int(torch.unique(chosen).numel()),
    }


def prefill_floor_ms(weights: CudaWeights, num_tokens: int, ceilings: Ceilings) -> float:
    """Products at their rates; attention and the unpacking not counted."""
    total = 0.0
    for layer in weights.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            weight = linear.weight
            in_fp8 = weight.format in ("fp8", "nvfp4_fast")
            rate = ceilings.fp8_fast_tflop_per_s if in_fp8 else ceilings.bf16_tflop_per_s
            total += 2.0 * num_tokens * weight.out_features * weight.in_features / rate / 1e9
    return total


def run_prefill(
    library: KernelLibrary,
    weights: CudaWeights,
    num_tokens: int,
    ceilings: Ceilings,
    *,
    repeats: int = 3,
    fast_accumulation: bool = True,
) -> dict[str, Any]:
    """One row: tokens a second of one prompt from an empty cache to its last token's logits."""
    device, config = library.device, weights.config
    cache = make_cache(config, -(-num_tokens // PAGE_SLOTS), PAGE_SLOTS, device)
    prefill = Prefill(
        library,
        weights,
        cache,
        num_tokens,
        rotary=Rotary(config, device),
        fast_accumulation=fast_accumulation,
    )
    token_ids = torch.randint(0, config.vocab_size, (num_tokens,), device=device)
    slots = torch.arange(num_tokens, device=device)
    with torch.inference_mode():
        with watch_board(device) as board:
            samples = time_ms(lambda: prefill.run(token_ids, slots), warmups=1, repeats=repeats)
        logits = prefill.run(token_ids, slots)
    assert bool(torch.isfinite(logits).all())
    median = statistics.median(samples)
    floor = prefill_floor_ms(weights, num_tokens, ceilings)
    sustained_floor = prefill_floor_ms(weights, num_tokens, ceilings.sustained())
    return {
        "kind": "prefill",
        "tokens": num_tokens,
        "mode": weights.mode,
        "fp8_sums": "tensor core" if fast_accumulation else "promoted to f32",
        "median_ms": median,
        "samples_ms": samples,
        "tokens_per_s": num_tokens / median * 1e3,
        "floor_ms": floor,
        "share_of_floor": floor / median,
        "sustained_floor_ms": sustained_floor,
        "share_of_sustained_floor": sustained_floor / median,
        **_board_facts(board, weights, num_tokens, median, with_head=False),
    }


def make_weights(library: KernelLibrary, num_layers: int, mode: Mode = "exact") -> CudaWeights:
    """Random weights of the medium geometry in its mixed format."""
    config = medium_geometry(num_layers)
    return random_weights(library, config, mixed_formats(num_layers), mode=mode)


def format_row(row: dict[str, Any]) -> str:
    """One line for a person."""
    if row["kind"] == "decode":
        return (
            f"decode  batch {row['batch']:4} context {row['context']:6} {row['mode']:5} "
            f"{row['median_ms']:8.3f} ms "
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
    num_layers: int, device: torch.device
) -> tuple[dict[str, Any], KernelLibrary, CudaWeights]:
    """Seconds to a first token: kernels, weights, cache, graph, one step."""
    start = time.perf_counter()
    compile_all(num_layers)
    compiled_s = time.perf_counter() - start
    library = KernelLibrary(device)
    weights = make_weights(library, num_layers)
    torch.cuda.synchronize()
    weights_s = time.perf_counter() - start
    cache = make_cache(weights.config, 64, PAGE_SLOTS, device)
    rotary = Rotary(weights.config, device)
    step = DecodeStep(library, weights, cache, 1, rotary=rotary, max_context_tokens=512)
    _fill_state(step, cache, Point(1, 128))
    step.capture()
    step.replay()
    torch.cuda.synchronize()
    row = {
        "kind": "start",
        "kernels_s": compiled_s,
        "weights_s": weights_s,
        "first_token_s": time.perf_counter() - start,
        "weights_bytes": weights.num_bytes,
        "allocated_bytes": torch.cuda.memory_allocated(),
    }
    return row, library, weights


def run_engine(num_layers: int) -> tuple[Ceilings, list[dict[str, Any]]]:
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
    start, library, weights = run_start(num_layers, device)
    rows = [start]
    print(start, flush=True)
    rows += _run_mode(library, weights, ceilings)
    # Both do not fit at once.
    del weights
    torch.cuda.empty_cache()
    rows += _run_mode(library, make_weights(library, num_layers, "fast"), ceilings)
    return ceilings, rows


def _run_mode(
    library: KernelLibrary, weights: CudaWeights, ceilings: Ceilings
) -> list[dict[str, Any]]:
    rows = []
    for point in POINTS:
        rows.append(run_decode(library, weights, point, ceilings))
        print(format_row(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    for num_tokens in PROMPTS:
        rows.append(run_prefill(library, weights, num_tokens, ceilings))
        print(format_row(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    return rows
