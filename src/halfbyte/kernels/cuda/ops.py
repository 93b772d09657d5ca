"""Ops of `kernels.dispatch` on a Hopper GPU, one call at a time, and the streaming product itself.

The engine's decode step does not come through here: it runs fused kernels from a graph
(`model.cuda`). These serve everything else with the same weights in memory.

Shapes: T tokens, O, I features.
"""

import ctypes

import torch
from torch import Tensor

from halfbyte.kernels.cuda.driver import Launch, LinearResult
from halfbyte.kernels.cuda.library import (
    NARROW_PREFILL_COLUMNS,
    PREFILL_COLUMNS,
    KernelLibrary,
    PrefillRoom,
    StreamConfig,
    StreamPlan,
    columns_for,
    make_prefill_room,
    plan_prefill,
    plan_stream,
    prefill_tiles,
)
from halfbyte.kernels.repack import (
    K_BLOCK,
    TiledWeight,
    pair_activations,
    tile_activations,
)


def stream_launch(
    library: KernelLibrary,
    weight: TiledWeight,
    activations: Tensor,
    partial: Tensor,
    num_tokens: int,
    *,
    out: Tensor | None = None,
    config: StreamConfig | None = None,
) -> tuple[Launch, StreamPlan]:
    """The launch of one streaming product on tiled activations, and how its work is dealt."""
    kernel, config = library.linear(weight.format, columns_for(num_tokens), config)
    plan = plan_stream(weight, config, library.num_multiprocessors)
    arguments = (
        weight.data,
        activations,
        weight.row_scale_O,
        out,
        partial,
        weight.out_features,
        weight.num_k_blocks,
        num_tokens,
    )
    launch = Launch(
        kernel,
        plan.grid,
        config.num_threads,
        arguments,
        cluster=config.cluster,
    )
    return launch, plan


def stream_product(
    library: KernelLibrary,
    weight: TiledWeight,
    x_TI: Tensor,
    *,
    config: StreamConfig | None = None,
) -> Tensor:
    """X @ w^T as f32 (T, O padded): activations already in the format's dtype, scales applied.

    x_TI   e4m3 ("fp8", "nvfp4_fast"), fp16 ("nvfp4") or bf16; T <= 128; its own scale is the
           caller's to apply
    """
    num_tokens = x_TI.shape[0]
    columns = weight.num_k_blocks * K_BLOCK[weight.format]
    x = torch.zeros(num_tokens, columns, dtype=x_TI.dtype, device=x_TI.device)
    x.view(torch.uint8)[:, : x_TI.shape[1] * x.element_size()] = x_TI.contiguous().view(torch.uint8)
    if weight.format == "nvfp4_fast":
        x = pair_activations(x)
    tiled = tile_activations(x, columns_for(num_tokens))
    _, used = library.linear(weight.format, columns_for(num_tokens), config)
    plan = plan_stream(weight, used, library.num_multiprocessors)
    partial = torch.empty(
        plan.num_slots, num_tokens, weight.out_features, device=x_TI.device
    ).fill_(float("nan"))
    launch, plan = stream_launch(library, weight, tiled, partial, num_tokens, config=config)
    launch.run(torch.cuda.current_stream().cuda_stream)
    return sum_slots(partial, plan)


def prefill_launches(
    library: KernelLibrary,
    weight: TiledWeight,
    activations: Tensor,
    row_scale_O: Tensor,
    out_TO: Tensor,
    room: PrefillRoom,
    *,
    overlaps: bool = False,
) -> list[Launch]:
    """The launches of one prefill product: bf16 (T, O padded), row scales applied.

    activations   as `tile_activations` makes them, tokens padded as `prefill_tiles` says
    """
    num_tokens = out_TO.shape[0]
    num_wide, num_narrow = prefill_tiles(num_tokens)
    parts = [(0, min(num_wide, num_tokens), PREFILL_COLUMNS)] if num_wide else []
    if num_narrow:
        parts.append((num_wide, num_tokens, NARROW_PREFILL_COLUMNS))
    launches = []
    for first, stop, columns in parts:
        kernel, config = library.prefill_linear(weight.format, columns)
        plan = plan_prefill(weight, stop - first, columns, library.num_multiprocessors)
        assert not plan.splits or plan.num_items * config.cluster * config.groups <= len(room[1])
        arguments = (
            weight.data,
            activations.view(-1)[first * 16 :],
            ctypes.c_int64((num_wide + num_narrow) * 16),
            row_scale_O,
            out_TO[first:stop],
            weight.out_features,
            weight.num_k_blocks,
            stop - first,
            int(plan.splits),
            *room,
        )
        launches.append(
            Launch(
                kernel,
                (plan.num_clusters * config.cluster, 1, 1),
                config.num_threads,
                arguments,
                cluster=config.cluster,
                overlaps=overlaps,
            )
        )
    return launches


def prefill_product(library: KernelLibrary, weight: TiledWeight, x_TI: Tensor) -> Tensor:
    """X @ w^T as bf16 (T, O padded) for any number of rows; activations as `stream_product`'s."""
    num_tokens = x_TI.shape[0]
    x = torch.zeros(num_tokens, weight.num_k_blocks * 128, dtype=x_TI.dtype, device=x_TI.device)
    x.view(torch.uint8)[:, : x_TI.shape[1] * x.element_size()] = x_TI.contiguous().view(torch.uint8)
    if weight.format == "nvfp4_fast":
        x = pair_activations(x)
    tiled = tile_activations(x, sum(prefill_tiles(num_tokens)))
    out_TO = torch.full(
        (num_tokens, weight.out_features), torch.nan, dtype=torch.bfloat16, device=x.device
    )
    room = make_prefill_room(library.num_multiprocessors, x.device)
    for launch in prefill_launches(library, weight, tiled, weight.row_scale_O, out_TO, room):
        launch.run(torch.cuda.current_stream().cuda_stream)
    return out_TO


def sum_slots(partial: Tensor, plan: StreamPlan) -> Tensor:
    """Add up the partial sums of every tile as `load_result` of primitives.cu does: (T, O)."""
    tile_rows = plan.config.tile_rows
    counts = plan.slot_counts
    slots_O = torch.tensor(counts, device=partial.device).repeat_interleave(tile_rows)
    total = partial[0].clone()
    for slot in range(1, max(counts)):
        # What a tile's last contributor left of the other slots is not its sum.
        total += torch.where(slots_O > slot, partial[slot], 0.0)
    return total


__all__ = [
    "LinearResult",
    "prefill_launches",
    "prefill_product",
    "stream_launch",
    "stream_product",
    "sum_slots",
]
