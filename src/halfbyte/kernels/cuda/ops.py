"""Ops of `kernels.dispatch` on a Hopper GPU, one call at a time, and the streaming product itself.

The engine's decode step does not come through here: it runs fused kernels from a graph
(`model.cuda_decoder`). These serve everything else with the same weights in memory.

Shapes: T tokens, O, I features.
"""

import torch
from torch import Tensor

from halfbyte.kernels.cuda.driver import Launch, LinearResult
from halfbyte.kernels.cuda.library import (
    KernelLibrary,
    StreamConfig,
    StreamPlan,
    columns_for,
    plan_stream,
)
from halfbyte.kernels.repack import K_BLOCK, TiledWeight, tile_activations

_ACTIVATION_DTYPE = {
    "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.float16,
    "bf16": torch.bfloat16,
}


def stream_launch(
    library: KernelLibrary,
    weight: TiledWeight,
    activations: Tensor,
    row_scale_O: Tensor,
    partial: Tensor,
    num_tokens: int,
    *,
    out: Tensor | None = None,
    config: StreamConfig | None = None,
    overlaps: bool = True,
) -> tuple[Launch, StreamPlan]:
    """The launch of one streaming product on tiled activations, and how its work is dealt."""
    kernel, config = library.linear(weight.format, columns_for(num_tokens), config)
    plan = plan_stream(weight, config, library.num_multiprocessors)
    arguments = (
        weight.data,
        activations,
        row_scale_O,
        out,
        partial,
        weight.out_features,
        weight.num_k_blocks,
        num_tokens,
    )
    grid = (plan.num_blocks, 1, 1)
    return Launch(kernel, grid, config.num_threads, arguments, overlaps=overlaps), plan


def stream_product(
    library: KernelLibrary,
    weight: TiledWeight,
    x_TI: Tensor,
    *,
    config: StreamConfig | None = None,
) -> Tensor:
    """X @ w^T as f32 (T, O padded): activations already in the format's dtype, scales applied.

    x_TI    e4m3 (FP8), fp16 (NVFP4) or bf16; T <= 128; its own scale is the caller's to apply
    """
    num_tokens = x_TI.shape[0]
    columns = weight.num_k_blocks * K_BLOCK[weight.format]
    x = torch.zeros(num_tokens, columns, dtype=x_TI.dtype, device=x_TI.device)
    x.view(torch.uint8)[:, : x_TI.shape[1] * x.element_size()] = x_TI.contiguous().view(torch.uint8)
    tiled = tile_activations(x, columns_for(num_tokens))
    _, used = library.linear(weight.format, columns_for(num_tokens), config)
    plan = plan_stream(weight, used, library.num_multiprocessors)
    partial = torch.empty(
        plan.num_slots, num_tokens, weight.out_features, device=x_TI.device
    ).fill_(float("nan"))
    launch, plan = stream_launch(
        library, weight, tiled, weight.row_scale_O, partial, num_tokens, config=config
    )
    launch.run(torch.cuda.current_stream().cuda_stream)
    return sum_slots(partial, plan)


def sum_slots(partial: Tensor, plan: StreamPlan) -> Tensor:
    """Add up the partial sums of every tile as `load_result` of primitives.cu does: (T, O)."""
    tile_rows = plan.config.tile_rows
    total = torch.empty_like(partial[0])
    for tile in range(plan.out_features // tile_rows):
        first = tile * plan.k_blocks
        slots = plan.owner(first + plan.k_blocks - 1) - plan.owner(first) + 1
        columns = slice(tile * tile_rows, (tile + 1) * tile_rows)
        total[:, columns] = partial[:slots, :, columns].sum(0)
    return total


__all__ = ["LinearResult", "stream_launch", "stream_product", "sum_slots"]
