"""How the memory of a run is spent: what a layer needs, and what the rest of the budget buys.

The budget is a promise, so the estimate counts every large tensor that is alive at the worst
moment; a budget that cannot hold one layer is refused before work begins. `calibrate.budget` keeps
the promise while the work runs, should the estimate be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.calibrate.activations import MOST_PENDING
from halfbyte.calibrate.seeing import NO_PICTURES, PictureBytes
from halfbyte.config import ModelConfig, TextConfig
from halfbyte.errors import CapacityError
from halfbyte.files import format_gib
from halfbyte.formats.measure import GPU_CHUNK_VALUES
from halfbyte.machine import available_bytes
from halfbyte.modules import decoder_linears
from halfbyte.quantize.encode import HEAD_ROWS
from halfbyte.quantize.gptq import gptq_bytes, gptq_bytes_more
from halfbyte.recipe.plan import Plan, head_size

# The interpreter, torch and its threads, tokenizer, file buffers (measured: 0.6 GB) ...
_BASE_BYTES = 800 << 20
# ... and with a GPU its libraries and page-locked buffers of the driver.
_BASE_BYTES_WITH_GPU = 4 << 30
# What the driver and the libraries keep on a GPU, outside of torch's allocator.
GPU_CONTEXT_BYTES = 700 << 20
# What torch's allocator takes for what is asked of it: every stream keeps what it has freed. An
# H100 took 10.0 GiB for a layer at work and the next one, which add up to 8.4 GiB without this
# factor and without the group that encoding reads ahead (benchmarks/records/quantize_gpu.json).
_GPU_GAPS = 1.2
# Vectors of one chunk that encoding keeps on a GPU, in f32 and narrower.
_GPU_CHUNK_BYTES = 8 * 4 * GPU_CHUNK_VALUES


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run may hold besides the layer at work.

    peak_bytes             estimate of the most host memory that will be resident
    activations_in_memory  keep the rows between layers in memory rather than on disk
    prefetch               load the next layer while one computes
    gpu_peak_bytes         estimate of the most memory taken on the GPU; None without one
    """

    peak_bytes: int
    activations_in_memory: bool
    prefetch: bool
    gpu_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """What a method holds of a layer's inputs (`quantize.layer.wanted_sums`), in the worst layer.

    held_bytes      products of inputs, from running a layer until its first group is encoded
    encoding_bytes  the worst of what is left of them and what encoding takes beside, over groups
    """

    held_bytes: int = 0
    encoding_bytes: int = 0


def sums_of(widths: Sequence[int]) -> Sums:
    """Bytes that products of inputs take; widths are in the order in which groups are encoded."""
    held = [4 * width * width for width in widths]
    beside = [sum(held[i:]) + gptq_bytes(width) for i, width in enumerate(widths)]
    return Sums(sum(held), max(beside, default=0))


# Rows of the head that are encoded together take f32 copies and masks of this many bytes a weight.
_HEAD_PART_BYTES = 16


def head_bytes(plan: Plan, config: ModelConfig) -> int:
    """What encoding the head takes: its weights, codes, their parts, and the rows at work."""
    if "head" not in plan.formats:
        return 0
    text = config.text
    work = _HEAD_PART_BYTES * min(HEAD_ROWS, text.vocab_size) * text.width
    return _table_bytes(text) + 2 * head_size(plan, config).num_bytes + work


def layer_peak_bytes(
    text: TextConfig, longest_row_tokens: int, sums: Sums = Sums(), head_bytes: int = 0
) -> int:
    """The most memory that loading, running and encoding one layer, or the head, takes on a CPU.

    Loading the gate-up group is the worst moment: the decoded group, one member, its codes and the
    copy that the kernels lay out are alive beside the attention weights; counted as three groups.
    """
    sizes = _linear_bytes(text)
    gated = sizes["gate"] + sizes["up"]
    attention = sum(sizes[short] for short in "qkvo")
    loading = attention + 3 * gated
    running = sum(sizes.values()) + _row_bytes(text, longest_row_tokens) + sums.held_bytes
    # The layer is gone by then. A group is there as stored and decoded, one member in f32.
    encoding = 2 * gated + sums.encoding_bytes if sums.held_bytes else 0
    pending = _pending_bytes(text, longest_row_tokens)
    head = head_bytes and head_bytes + sums.encoding_bytes
    return max(loading, running, encoding, head, _table_bytes(text)) + pending


def gpu_layer_bytes(
    text: TextConfig, longest_row_tokens: int, sums: Sums = Sums(), head_bytes: int = 0
) -> tuple[int, int]:
    """Bytes on a GPU: of one layer at work, and of what prefetching another takes besides.

    At work is the larger of running rows through the layer and encoding its largest group with no
    layer loaded. Loading takes the layer, one decoded member and the group it is stacked into.
    """
    sizes = _linear_bytes(text)
    gated = sizes["gate"] + sizes["up"]
    layer = sum(sizes.values())
    loading = layer + gated
    running = layer + _row_bytes(text, longest_row_tokens) + sums.held_bytes
    # Stored, decoded, encoded, and the next group; bf16 sources are stored as wide as decoded.
    encoding = max(4 * max(gated, *sizes.values()), head_bytes) + _GPU_CHUNK_BYTES
    encoding += sums.encoding_bytes
    if not longest_row_tokens:
        return int(_GPU_GAPS * encoding), 0
    return int(_GPU_GAPS * max(loading, running, encoding)), int(_GPU_GAPS * loading)


def _linear_bytes(text: TextConfig) -> dict[str, int]:
    return {
        linear.name.rpartition(".")[2]: 2 * linear.out_features * linear.in_features
        for linear in decoder_linears(ModelConfig(text, None))
        if linear.layer == 0
    }


def _row_bytes(text: TextConfig, tokens: int) -> int:
    """Inputs, residual, norms in f32, q, k, v rotated in f32, the fused product, its f32
    intermediates and the MLP's hidden state.
    """
    attention = text.num_heads * text.head_dim
    return tokens * (16 * text.width + 12 * attention + 24 * text.mlp_width)


def _table_bytes(text: TextConfig) -> int:
    return 2 * text.vocab_size * text.width


def _pending_bytes(text: TextConfig, longest_row_tokens: int) -> int:
    """Rows that wait to be written."""
    return (MOST_PENDING + 2) * longest_row_tokens * text.width * 2


def plan_memory(
    text: TextConfig,
    *,
    longest_row_tokens: int,
    activation_bytes: int,
    budget_bytes: int | None,
    on_gpu: bool = False,
    gpu_budget_bytes: int | None = None,
    sums: Sums = Sums(),
    head_bytes: int = 0,
    pictures: PictureBytes = NO_PICTURES,
) -> MemoryPlan:
    """Spend a budget: first the layer, then a prefetched one, then activations.

    Activations are written to disk in any case, so that a killed run can go on; keeping them in
    memory too saves reading them back, prefetching hides reading and decoding a whole layer.

    longest_row_tokens  0 if no row is run
    budget_bytes        None takes three quarters of what the machine has available
    on_gpu              layers are on a GPU: the host holds tensors on their way only
    gpu_budget_bytes    None sets no limit
    sums                what the method holds of a layer's inputs
    head_bytes          what encoding the head takes; 0 if it is kept
    pictures            what the pictures of the rows take: their pixels all the time, the tower
                        before the decoder's layers
    Raises CapacityError if a budget cannot hold one layer.
    """
    layer = layer_peak_bytes(text, longest_row_tokens, sums, head_bytes)
    base = _BASE_BYTES
    if on_gpu:
        largest = max(_linear_bytes(text).values())
        layer = max(_table_bytes(text), 2 * largest) + 2 * _pending_bytes(text, longest_row_tokens)
        base = _BASE_BYTES_WITH_GPU
    # On a GPU the tower's tensors pass through the host one by one.
    layer = max(layer, pictures.tower)
    least = base + pictures.pixels + layer
    budget = budget_bytes
    if budget is None:
        budget = max(least, (available_bytes() or 0) * 3 // 4)
    if least > budget:
        raise CapacityError(
            f"--memory {format_gib(budget)}: one decoder layer takes {format_gib(least)}"
        )
    beside = layer if on_gpu else layer_peak_bytes(text, longest_row_tokens)
    prefetch = bool(longest_row_tokens) and least + beside <= budget
    gpu_peak = None
    if on_gpu:
        at_work, beside_gpu = gpu_layer_bytes(text, longest_row_tokens, sums, head_bytes)
        sizes = max(at_work, int(_GPU_GAPS * pictures.tower)), beside_gpu
        prefetch, gpu_peak = _plan_gpu(sizes, longest_row_tokens, prefetch, gpu_budget_bytes)
        if sums.encoding_bytes:
            largest = max(_linear_bytes(text).values()) // 2
            many_rows = gpu_peak + int(_GPU_GAPS * gptq_bytes_more(largest))
            if gpu_budget_bytes is None or many_rows <= gpu_budget_bytes:
                gpu_peak = many_rows
    peak = least + (beside if prefetch else 0)
    kept = activation_bytes + pictures.patches
    in_memory = peak + kept <= budget
    return MemoryPlan(peak + (kept if in_memory else 0), in_memory, prefetch, gpu_peak)


def _plan_gpu(
    sizes: tuple[int, int], longest_row_tokens: int, prefetch: bool, budget_bytes: int | None
) -> tuple[bool, int]:
    """Whether there is room to prefetch, and the peak; `sizes` as `gpu_layer_bytes` gives them."""
    at_work, beside = sizes
    least = GPU_CONTEXT_BYTES + at_work
    if budget_bytes is not None and least > budget_bytes:
        raise CapacityError(
            f"--gpu-memory {format_gib(budget_bytes)}: one decoder layer and a row of "
            f"{longest_row_tokens} tokens take {format_gib(least)}; shorter rows take less"
        )
    prefetch = prefetch and (budget_bytes is None or least + beside <= budget_bytes)
    return prefetch, least + (beside if prefetch else 0)


def limit_gpu(device: torch.device, budget_bytes: int) -> None:
    """Let this process allocate no more than the budget on a GPU.

    Beyond it torch's own OutOfMemoryError is raised, whatever room the card has.
    """
    # The limit wants an index, which "cuda" has not.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    share = min(1.0, max(0.0, (budget_bytes - GPU_CONTEXT_BYTES) / total))
    torch.cuda.set_per_process_memory_fraction(share, index)
