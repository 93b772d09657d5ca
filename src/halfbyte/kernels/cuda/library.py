"""Compiled kernels of one device: which source with which definitions, made once, in parallel.

Holds no tensors of a model; `model.cuda` and `ops.py` ask it for kernels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda.compiler import compile_kernel, wgmma_source
from halfbyte.kernels.cuda.driver import Kernel, LinearResult, Module
from halfbyte.kernels.repack import (
    K_BLOCK,
    ROWS,
    UNIT_BYTES,
    TiledWeight,
    TileFormat,
)

# Columns (padded tokens) the streaming linear is compiled for.
COLUMNS = (8, 16, 32, 64, 128)
_FORMAT_NUMBER: dict[TileFormat, int] = {"fp8": 0, "nvfp4": 1, "bf16": 2, "nvfp4_fast": 3}
# Shared memory that a ring may take, so that the small kernel ahead still fits beside it. More than
# half of a multiprocessor's: were there room for two, the blocks of the next linear would settle in
# pairs where this one ends first, and the step would take a third longer (measured).
_RING_BYTES = 172 * 1024
_RING_BYTES_ALONE = 214 * 1024
_MAX_STAGES = 8

# How activations are written: "e4m3_token" lies as "e4m3" does, with a scale of each token.
OutKind = Literal["f16", "e4m3", "bf16", "e4m3_paired", "e4m3_token"]
# Those that decode attention writes; what depends on a whole token is written behind it.
_ATTENTION_KINDS: dict[OutKind, int] = {"f16": 0, "e4m3": 1, "bf16": 2}


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """Shape of a block of the streaming linear.

    groups               warpgroups that multiply
    tiles                64-row tiles each of them holds
    stages               K blocks in the shared-memory ring
    consumer_registers   a multiplying thread's registers; 0 leaves them as compiled
    cluster              blocks that share their activations, 1, 2 or 4
    promote              K blocks of e4m3 terms the tensor core adds before they are added in f32;
                         nvfp4_fast: 0 = all
    """

    groups: int
    tiles: int
    stages: int
    consumer_registers: int = 0
    cluster: int = 1
    promote: int = 1

    @property
    def tile_rows(self) -> int:
        """Output features a cluster works on at a time."""
        return self.groups * self.tiles * self.cluster * ROWS

    def __post_init__(self) -> None:
        assert self.tile_rows.bit_count() == 1, self  # kernels divide by it with a shift

    @property
    def num_threads(self) -> int:
        """Threads of a block, the copying ones included."""
        return self.groups * 128 + (128 if self.consumer_registers else 32)


def stage_bytes(format_: TileFormat, columns: int, row_tiles: int) -> int:
    """Shared memory of one K block: weights of `row_tiles` and activations of `columns` tokens."""
    activation = K_BLOCK[format_] * (1 if format_ in ("fp8", "nvfp4_fast") else 2) * columns
    return row_tiles * UNIT_BYTES[format_] + activation


def choose_config(format_: TileFormat, columns: int) -> StreamConfig:
    """The block shape that measured best; see benchmarks/notes-kernels.md."""
    promote = 1
    if format_ == "fp8" and columns == 128:
        # Two sets of sums a thread (see linear.cu): a smaller tile, or they would spill.
        groups, tiles, registers, ring = 2, 1, 0, _RING_BYTES_ALONE
        promote = 4
    elif format_ == "nvfp4_fast":
        groups, tiles, registers, ring = 4, 1, 0, _RING_BYTES
        promote = 16
        if columns == 128:
            groups, ring = 2, _RING_BYTES_ALONE
    elif format_ == "nvfp4" and columns in (8, 16, 64):
        groups, tiles, registers, ring = 2, 2, 0, _RING_BYTES
    elif columns < 128:
        groups, tiles, registers, ring = 4, 1, 0, _RING_BYTES
    else:
        groups, tiles, registers, ring = 2, 2, 232, _RING_BYTES_ALONE
    stages = min(_MAX_STAGES, ring // stage_bytes(format_, columns, groups * tiles))
    return StreamConfig(groups, tiles, stages, registers, promote=promote)


# Tokens of a tile of the prefill linear, and its block shapes by them: two blocks share their
# tokens. The narrow one takes what is left where that is little.
PREFILL_COLUMNS = 256
NARROW_PREFILL_COLUMNS = 128
PREFILL_CONFIGS: dict[tuple[TileFormat, int], StreamConfig] = {
    ("nvfp4", 128): StreamConfig(2, 1, 5, 232, cluster=2),
    ("nvfp4", 256): StreamConfig(2, 1, 3, 232, cluster=2),
    ("nvfp4_fast", 128): StreamConfig(2, 1, 8, 232, cluster=2),
    ("nvfp4_fast", 256): StreamConfig(2, 1, 5, 232, cluster=2),
    ("fp8", 128): StreamConfig(2, 1, 6, 232, cluster=2),
    ("fp8", 256): StreamConfig(2, 1, 4, 232, cluster=2),
}


def prefill_tiles(num_tokens: int) -> tuple[int, int]:
    """Tokens that go through wide tiles, and room for those that go through a narrow one (0: none).

    Their sum is how many tokens the activations are padded to.
    """
    rest = num_tokens % PREFILL_COLUMNS
    if 0 < rest <= NARROW_PREFILL_COLUMNS:
        return num_tokens - rest, NARROW_PREFILL_COLUMNS
    return -(-num_tokens // PREFILL_COLUMNS) * PREFILL_COLUMNS, 0


# NVFP4 items of a prefill linear are cut along K where whole ones would leave more of its last
# round idle; each cluster then has so many K blocks at least. Merging costs 30 us, more than
# products in FP8 would gain (measured).
_LEAST_SHARE = 0.93
_LEAST_STRETCH = 8


class PrefillPlan(NamedTuple):
    """How the items of one prefill product are dealt to the clusters of a grid (see prefill.cu)."""

    num_clusters: int
    num_items: int
    splits: bool


def plan_prefill(
    weight: TiledWeight, num_tokens: int, columns: int, num_blocks: int
) -> PrefillPlan:
    """Deal the items of `columns` tokens each to clusters of at most `num_blocks` blocks in all."""
    config = PREFILL_CONFIGS[weight.format, columns]
    num_items = weight.out_features // config.tile_rows * -(-num_tokens // columns)
    most = num_blocks // config.cluster
    rounds = -(-num_items // most)
    if weight.format == "nvfp4" and num_items / (rounds * most) < _LEAST_SHARE:
        num_clusters = min(most, num_items * weight.num_k_blocks // _LEAST_STRETCH)
        if num_clusters >= min(most, num_items + 1):
            return PrefillPlan(num_clusters, num_items, True)
    return PrefillPlan(min(most, num_items), num_items, False)


class PrefillRoom(NamedTuple):
    """Device memory in which clusters that share an item merge their sums.

    partial    f32, sums of each cluster's first and last item
    counters   int32, zero between kernels
    """

    partial: torch.Tensor
    counters: torch.Tensor


# Items of a product that may be cut: those of 2048 tokens and 131072 features.
_MOST_CUT_ITEMS = 8 * 512


def make_prefill_room(num_blocks: int, device: torch.device) -> PrefillRoom:
    """Room for every product of a device of so many multiprocessors: 35 MB for 132."""
    group_sums = ROWS * PREFILL_COLUMNS
    partial = torch.zeros(num_blocks * 2 * 2 * group_sums, device=device)
    return PrefillRoom(partial, torch.zeros(_MOST_CUT_ITEMS * 4, dtype=torch.int32, device=device))


def columns_for(num_tokens: int) -> int:
    """The narrowest compiled width that holds `num_tokens`; ValueError beyond the widest."""
    for columns in COLUMNS:
        if num_tokens <= columns:
            return columns
    raise ValueError(f"{num_tokens} tokens; the streaming linear takes {COLUMNS[-1]}")


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How the units of one weight are dealt to the clusters of a grid (see linear.cu)."""

    config: StreamConfig
    out_features: int
    k_blocks: int
    num_blocks: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks to launch along x, y and z."""
        return self.num_blocks * self.config.cluster, 1, 1

    @property
    def num_units(self) -> int:
        """Units of work in the weight: row tiles times K blocks."""
        return self.out_features // self.config.tile_rows * self.k_blocks

    def owner(self, unit: int) -> int:
        """Index of the cluster that works on `unit`."""
        return ((unit + 1) * self.num_blocks - 1) // self.num_units

    @property
    def num_slots(self) -> int:
        """Most clusters that share one tile: slots that partial sums need."""
        return max(self.slot_counts)

    @property
    def slot_counts(self) -> list[int]:
        """Number of clusters that share each row tile, a count per tile."""
        firsts = range(0, self.num_units, self.k_blocks)
        return [self.owner(u + self.k_blocks - 1) - self.owner(u) + 1 for u in firsts]

    def result(
        self,
        out: torch.Tensor | None,
        partial: torch.Tensor,
        slot_counts: torch.Tensor,
        num_tokens: int,
        token_scale_T: torch.Tensor | None = None,
    ) -> LinearResult:
        """What the kernel after the linear needs to read its result; it keeps no tensor alive."""
        return LinearResult(
            out=None if out is None else out.data_ptr(),
            partial=partial.data_ptr(),
            row_scale=None,
            token_scale=None if token_scale_T is None else token_scale_T.data_ptr(),
            slot_counts=slot_counts.data_ptr(),
            slot_stride=num_tokens * self.out_features,
            stride=self.out_features,
            tile_shift=self.config.tile_rows.bit_length() - 1,
        )


def plan_stream(weight: TiledWeight, config: StreamConfig, num_blocks: int) -> StreamPlan:
    """Deal `weight`'s units to clusters of at most `num_blocks` blocks in all."""
    plan = StreamPlan(config, weight.out_features, weight.num_k_blocks, 1)
    num_clusters = min(num_blocks // config.cluster, plan.num_units)
    return StreamPlan(config, weight.out_features, weight.num_k_blocks, num_clusters)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Attention heads as kernels are compiled for them."""

    head_dim: int
    num_heads: int
    num_kv_heads: int


_ELEMENTWISE = (
    "norm_f16",
    "norm_e4m3",
    "norm_bf16",
    "norm_e4m3_token",
    "add_norm_f16",
    "add_norm_e4m3",
    "add_norm_bf16",
    "add_norm_e4m3_token",
    "norm_e4m3_paired",
    "add_norm_e4m3_paired",
    "silu_mul_f16",
    "silu_mul_e4m3",
    "silu_mul_bf16",
    "silu_mul_e4m3_token",
    "silu_mul_e4m3_paired",
    "quantize_f16",
    "quantize_e4m3",
    "quantize_e4m3_token",
    "quantize_e4m3_paired",
    "rotate_and_store",
    "embed",
)
_ATTENTION_STAGES = 3  # as in attention.cu


def unavailable(device_type: str) -> str | None:
    """Why these kernels cannot run on a device of this type; None when they can."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}; written for 9.0 (Hopper)"
    return None


class KernelLibrary:
    """Kernels of one device, each compiled when first asked for."""

    def __init__(self, device: torch.device) -> None:
        reason = unavailable(device.type)
        if reason is not None:
            raise UnsupportedError(f"CUDA kernels: {reason}")
        self.device = device
        self.num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._made: dict[tuple[object, ...], dict[str, Kernel]] = {}

    def _make(
        self, key: tuple[object, ...], code: Callable[[], bytes], names: dict[str, int]
    ) -> dict[str, Kernel]:
        if key not in self._made:
            module = Module(code())
            self._made[key] = {
                name: module.kernel(name, shared_bytes=size) for name, size in names.items()
            }
        return self._made[key]

    def linear(
        self, format_: TileFormat, columns: int, config: StreamConfig | None = None
    ) -> tuple[Kernel, StreamConfig]:
        """The streaming linear for `columns` tokens, and the block shape it was compiled for."""
        config = config or choose_config(format_, columns)
        size = config.stages * stage_bytes(format_, columns, config.groups * config.tiles)
        kernels = self._make(
            ("linear", format_, columns, config),
            lambda: linear_code(format_, columns, config),
            {"stream_linear": size},
        )
        return kernels["stream_linear"], config

    def elementwise(
        self, width: int, mlp_width: int, norm_blocks: int, heads: HeadShape
    ) -> dict[str, Kernel]:
        """Kernels of elementwise.cu by name, for a model's widths and heads."""
        return self._make(
            ("elementwise", width, mlp_width, norm_blocks, heads),
            lambda: elementwise_code(width, mlp_width, norm_blocks, heads),
            dict.fromkeys(_ELEMENTWISE, 0),
        )

    def attention(
        self, heads: HeadShape, page_slots: int, out: OutKind, num_warps: int = 8
    ) -> Kernel:
        """Decode attention over pages of `page_slots`, writing `out`, `num_warps` a block."""
        group = heads.num_heads // heads.num_kv_heads
        merged = num_warps * group * (heads.head_dim + 2) * 4
        ring = num_warps * _ATTENTION_STAGES * 2 * 16 * heads.head_dim
        return self._make(
            ("attention", heads, page_slots, out, num_warps),
            lambda: attention_code(heads, page_slots, out, num_warps),
            {"decode_attention": max(merged, ring)},
        )["decode_attention"]

    def chunk_attention(self, heads: HeadShape, page_slots: int) -> dict[str, Kernel]:
        """Kernels of chunk_attention.cu by name, over pages of `page_slots`."""
        # 128 queries and three tiles of 128 keys and values, as fp16.
        size = 7 * 128 * heads.head_dim * 2
        return self._make(
            ("chunk attention", heads, page_slots),
            lambda: chunk_attention_code(heads, page_slots),
            {"lay_out_context": 0, "chunk_attention": size},
        )

    def count_largest(self) -> Kernel:
        """The kernel that counts activations whose code is the largest."""
        code = lambda: compile_kernel("saturation", {})
        return self._make(("saturation",), code, {"count_largest": 0})["count_largest"]

    def gather(self) -> Kernel:
        """The kernel that makes a linear's result one dense f32 matrix."""
        code = lambda: compile_kernel("gather", {})
        return self._make(("gather",), code, {"gather_f32": 0})["gather_f32"]

    def prefill_linear(self, format_: TileFormat, columns: int) -> tuple[Kernel, StreamConfig]:
        """The linear for many tokens (prefill.cu), `columns` a tile, and its block shape."""
        config = PREFILL_CONFIGS[format_, columns]
        size = config.stages * stage_bytes(format_, columns, config.groups * config.tiles)
        kernels = self._make(
            ("prefill", format_, columns),
            lambda: prefill_code(format_, columns),
            {"prefill_linear": size},
        )
        return kernels["prefill_linear"], config

    def layout(self) -> dict[str, Kernel]:
        """Kernels of layout.cu by name, which write weights in another order."""
        names = ("untile_8bit", "decode_nvfp4_bf16", "decode_nvfp4_e4m3", "fill_random")
        code = lambda: compile_kernel("layout", {})
        return self._make(("layout",), code, dict.fromkeys(names, 0))


def prefill_code(format_: TileFormat, columns: int) -> bytes:
    """Machine code of the prefill linear; fills the cache on disk."""
    defines = _block_defines(format_, columns, PREFILL_CONFIGS[format_, columns])
    return compile_kernel("prefill", defines, generated=wgmma_source(format_, columns))


def _block_defines(format_: TileFormat, columns: int, config: StreamConfig) -> dict[str, int]:
    return {
        "FORMAT": _FORMAT_NUMBER[format_],
        "N": columns,
        "GROUPS": config.groups,
        "TILES": config.tiles,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "PROMOTE": config.promote,
        "CONSUMER_REGISTERS": config.consumer_registers,
    }


def linear_code(format_: TileFormat, columns: int, config: StreamConfig) -> bytes:
    """Machine code of the streaming linear; fills the cache on disk."""
    defines = _block_defines(format_, columns, config)
    return compile_kernel("linear", defines, generated=wgmma_source(format_, columns))


def elementwise_code(width: int, mlp_width: int, norm_blocks: int, heads: HeadShape) -> bytes:
    """Machine code of elementwise.cu; fills the cache on disk."""
    defines = {
        "WIDTH": width,
        "MLP_WIDTH": mlp_width,
        "NORM_BLOCKS": norm_blocks,
        **_head_defines(heads),
    }
    return compile_kernel("elementwise", defines)


def attention_warps(num_pairs: int, num_multiprocessors: int) -> int:
    """Warps a block of decode attention, so that the pairs (sequence, kv head) fill the device."""
    for num_warps in (2, 4):
        if num_pairs * num_warps >= 14 * num_multiprocessors:
            return num_warps
    return 8


def attention_code(heads: HeadShape, page_slots: int, out: OutKind, num_warps: int) -> bytes:
    """Machine code of attention.cu; fills the cache on disk."""
    defines = {
        "PAGE_SLOTS": page_slots,
        "OUT_KIND": _ATTENTION_KINDS[out],
        "WARPS": num_warps,
        **_head_defines(heads),
    }
    return compile_kernel("attention", defines)


def chunk_attention_code(heads: HeadShape, page_slots: int) -> bytes:
    """Machine code of chunk_attention.cu; fills the cache on disk."""
    defines = {"PAGE_SLOTS": page_slots, **_head_defines(heads)}
    generated = wgmma_source("scores", 128) + wgmma_source("values", heads.head_dim)
    return compile_kernel("chunk_attention", defines, generated=generated)


def _head_defines(heads: HeadShape) -> dict[str, int]:
    return {
        "HEAD_SIZE": heads.head_dim,
        "NUM_HEADS": heads.num_heads,
        "NUM_KV_HEADS": heads.num_kv_heads,
    }


def compile_together(tasks: Sequence[Callable[[], bytes]]) -> None:
    """Run compilations in parallel, so that what follows finds them in the cache on disk."""
    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()
