"""How the memory of a run is spent: what a layer needs, and what the rest of the budget buys.

The budget is a promise, so the estimate counts every large tensor that is alive at the worst
moment; a budget that cannot hold one layer is refused before work begins.
"""

from dataclasses import dataclass
from pathlib import Path

from halfbyte.config import ModelConfig, TextConfig
from halfbyte.errors import CapacityError
from halfbyte.modules import decoder_linears

# The interpreter, torch and its threads, tokenizer, file buffers (measured: 0.6 GB).
_BASE_BYTES = 800 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run may hold besides the layer at work.

    peak_bytes             estimate of the most host memory that will be resident
    activations_in_memory  keep the rows between layers in memory rather than on disk
    prefetch               load the next layer while one computes
    """

    peak_bytes: int
    activations_in_memory: bool
    prefetch: bool


def available_bytes() -> int | None:
    """Memory that this machine could give now; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def layer_peak_bytes(text: TextConfig, longest_row_tokens: int) -> int:
    """The most memory that loading, running and encoding one decoder layer takes.

    Loading the gate-up group is the worst moment: the two decoded weights, their fused copy and
    the copy that the kernels lay out are alive beside the attention weights.
    """
    sizes = {
        linear.name.rpartition(".")[2]: 2 * linear.out_features * linear.in_features
        for linear in decoder_linears(ModelConfig(text, None))
        if linear.layer == 0
    }
    gated = sizes["gate"] + sizes["up"]
    attention = sum(sizes[short] for short in "qkvo")
    loading = attention + 3 * gated
    # Inputs, residual, q, k, v, the fused product, its f32 intermediate and the MLP's hidden state.
    row = longest_row_tokens * (8 * text.width + 12 * text.mlp_width)
    running = sum(sizes.values()) + row
    table = 2 * text.vocab_size * text.width
    return max(loading, running, table)


def plan_memory(
    text: TextConfig,
    *,
    longest_row_tokens: int,
    activation_bytes: int,
    budget_bytes: int | None,
) -> MemoryPlan:
    """Spend a budget: first the layer, then a prefetched one, then activations.

    Activations are written to disk in any case, so that a killed run can go on; keeping them in
    memory too saves reading them back, prefetching hides reading and decoding a whole layer.

    budget_bytes  None takes three quarters of what the machine has available
    Raises CapacityError if an explicit budget cannot hold one layer.
    """
    layer = layer_peak_bytes(text, longest_row_tokens)
    least = _BASE_BYTES + layer
    if budget_bytes is None:
        available = available_bytes()
        budget = least if available is None else max(least, available * 3 // 4)
    else:
        budget = budget_bytes
    if least > budget:
        raise CapacityError(
            f"--memory {budget / 2**30:.2f} GiB: one decoder layer takes {least / 2**30:.2f} GiB"
        )
    prefetch = least + layer <= budget
    peak = least + (layer if prefetch else 0)
    in_memory = peak + activation_bytes <= budget
    return MemoryPlan(peak + (activation_bytes if in_memory else 0), in_memory, prefetch)
