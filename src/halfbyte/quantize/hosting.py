"""Whether a planned checkpoint will serve, where and how fast: weights a rank, KV tokens, GPUs by
name; and how long one of these GPUs would take to quantize it.

Pure arithmetic over the config and a few figures of our records (tests hold them to the records);
nothing is asked of any machine. Called by `halfbyte plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Literal

from halfbyte.config import ModelConfig, TextConfig
from halfbyte.engine.cache import bytes_per_token
from halfbyte.errors import UsageError
from halfbyte.modules import CacheFormat, decoder_linears
from halfbyte.quantize.rehearsal import layer_weights, text_flops
from halfbyte.recipe.plan import Plan, head_size, linear_size, plan_sizes

_MIB = 1 << 20
# What the driver and the libraries keep for themselves on each GPU.
_CONTEXT_BYTES = 700 * _MIB
_BLOCK = 16
# Tokens of one step (the engine's prefill chunk), and the share of a GPU that the server takes.
_BATCH_TOKENS, _UTILIZATION = 2048, 0.9
# The engine's share of free memory for the cache of a machine without a GPU.
_CPU_SHARE = 0.25
HERE = "this machine's processor"

Basis = Literal["measured", "computed"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that people serve on, as its maker states it.

    memory_bytes     the total that nvidia-smi states
    bytes_per_s      of its memory
    bf16_flops       of dense products a second, sums in f32
    """

    name: str
    memory_bytes: int
    has_nvfp4: bool
    bytes_per_s: float
    bf16_flops: float


# Source of the last two: NVIDIA's data sheets of the SXM modules, the L40S and the RTX PRO 6000.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 81920 * _MIB, has_nvfp4=False, bytes_per_s=2.039e12, bf16_flops=312e12),
        Gpu("l40s", 46068 * _MIB, has_nvfp4=False, bytes_per_s=0.864e12, bf16_flops=362e12),
        Gpu("h100", 81559 * _MIB, has_nvfp4=False, bytes_per_s=3.35e12, bf16_flops=989e12),
        Gpu("h200", 143771 * _MIB, has_nvfp4=False, bytes_per_s=4.8e12, bf16_flops=989e12),
        Gpu("rtx-pro-6000", 97887 * _MIB, has_nvfp4=True, bytes_per_s=1.792e12, bf16_flops=504e12),
        Gpu("b200", 183359 * _MIB, has_nvfp4=True, bytes_per_s=8.0e12, bf16_flops=2250e12),
    )
}

# benchmarks/records/engine-h200.json: a decode step of one user, all 88 layers of the 128B model,
# and the bytes of weights that such a step reads.
RECORDED_GPU, RECORDED_STEP_MS, RECORDED_STEP_BYTES = "h200", 21.569, 86.78e9
# Copying reached this share of the stated memory speed there (4.21 TB/s); the rest of that step is
# what layers take besides.
_REACHED = 0.877
_LAYER_S = (RECORDED_STEP_MS / 1e3 - RECORDED_STEP_BYTES / (_REACHED * 4.8e12)) / 88
# What twice the GPUs gain of twice the speed (tensor_parallel_gpu.json: 6.937 ms -> 4.27 ms).
SPLIT_GAIN = 6.937 / 4.27 / 2
# benchmarks/records/quantize_gpu.json, one H100: multiplications a second of running text through a
# full-width layer, weights encoded a second (bound by the host), and the disk that it assumes.
QUANTIZED_GPU, QUANTIZED_FLOPS, QUANTIZED_WEIGHTS = "h100", 1.92e14, 6.31e8
QUANTIZED_DISK_BYTES, QUANTIZED_START_S = 2e9, 2.8


# Widths that are tried when none is asked for: what one machine holds.
_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Hosting:
    """What GPUs of one type, `tp` of them sharing the model, can serve.

    weight_bytes        on each GPU; decoder, embedding and head split, everything else whole
    working_bytes       on each GPU: the driver's, activations and logits of one step
    kv_token_bytes      of one token on each GPU
    kv_tokens           that the cache holds; 0 if the weights do not fit
    full_requests       requests of the whole `context` that fit at once
    tokens_per_request  what each has if `requests` run at once
    problem             why it will not serve even one such request, or None
    why_not_fewer       what half as many GPUs lack; None if that was not looked at
    tokens_per_s        of one user with little context; None where nothing is known
    speed_basis         measured: a record of ours of this model on this GPU; computed: its bytes
                        over the GPU's memory speed, and what a layer takes besides in our record
    """

    gpu: str
    tp: int
    weight_bytes: int
    working_bytes: int
    usable_bytes: int
    kv_token_bytes: int
    kv_tokens: int
    context: int
    requests: int
    full_requests: int
    tokens_per_request: int
    has_native_nvfp4: bool
    problem: str | None
    why_not_fewer: str | None = None
    tokens_per_s: float | None = None
    speed_basis: Basis | None = None


@dataclass(frozen=True, slots=True)
class Quantizing:
    """How long one GPU of a type would take to quantize, computed from the record of an H100."""

    gpu: str
    seconds: float
    basis: Basis


def host(
    plan: Plan,
    config: ModelConfig,
    *,
    context: int,
    requests: int,
    gpus: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
) -> list[Hosting]:
    """What each GPU type serves at each width; without `widths`, the fewest GPUs that suffice.

    Raises UsageError for an unknown GPU and a context beyond the model's positions.
    """
    if context > config.text.max_positions:
        raise UsageError(
            f"--context {context}: the model has {config.text.max_positions} positions"
        )
    unknown = [name for name in gpus or () if name not in GPUS]
    if unknown:
        raise UsageError(f"--gpu {unknown[0]}: there are {', '.join(GPUS)}")
    hosted = []
    for name in gpus or GPUS:
        tried = [
            host_on(GPUS[name], tp, plan, config, context=context, requests=requests)
            for tp in widths or _WIDTHS
        ]
        if widths is None:
            enough = next((i for i, x in enumerate(tried) if x.full_requests >= requests), None)
            found = tried[-1] if enough is None else tried[enough]
            if enough:
                found = replace(found, why_not_fewer=_why_not(tried[enough - 1]))
            tried = [found]
        hosted += tried
    return hosted


def _why_not(fewer: Hosting) -> str:
    if fewer.problem is not None:
        return fewer.problem
    fit = f"{fewer.full_requests} of {fewer.requests} requests"
    return f"only {fit} of {fewer.context:,} tokens fit the cache"


def step_bytes(plan: Plan, config: ModelConfig) -> int:
    """Bytes of weights that a decode step reads: the decoder and the head."""
    linears = sum(
        linear_size(linear, plan.formats[linear.name]).num_bytes
        for linear in decoder_linears(config)
    )
    return linears + head_size(plan, config).num_bytes


def serving_speed(gpu: Gpu, tp: int, plan: Plan, config: ModelConfig) -> tuple[float, Basis]:
    """Tokens a second of one user with little context, and whether that was measured."""
    read = step_bytes(plan, config)
    is_recorded = gpu.name == RECORDED_GPU and tp == 1
    if is_recorded and abs(read / RECORDED_STEP_BYTES - 1) < 0.01:
        return 1e3 / RECORDED_STEP_MS, "measured"
    alone_s = read / (gpu.bytes_per_s * _REACHED) + _LAYER_S * config.text.num_layers
    return tp * SPLIT_GAIN ** log2(tp) / alone_s, "computed"


def quantizing_time(
    gpu: Gpu,
    config: ModelConfig,
    *,
    num_tokens: int,
    longest_row: int,
    moved_bytes: int,
    disk_bytes_per_s: float | None = None,
) -> Quantizing:
    """How long this GPU would take with scales by maxima; other methods take longer.

    num_tokens, longest_row  of the text; 0 for none
    moved_bytes              read and written in all, activations between layers included
    disk_bytes_per_s         of its machine's disk; None takes 2 GB/s
    """
    weights, layers = layer_weights(config), config.text.num_layers
    flops = text_flops(config.text, weights, num_tokens, longest_row)
    relative = gpu.bf16_flops / GPUS[QUANTIZED_GPU].bf16_flops
    worked = layers * (flops / (QUANTIZED_FLOPS * relative) + weights / QUANTIZED_WEIGHTS)
    moved = moved_bytes / (disk_bytes_per_s or QUANTIZED_DISK_BYTES)
    return Quantizing(gpu.name, QUANTIZED_START_S + max(worked, moved), "computed")


def kv_token_bytes(plan: Plan, text: TextConfig) -> int:
    """Bytes of K and V of one token in all layers, over all ranks together."""
    return bytes_per_token(text, plan.kv_cache)


def host_on(
    gpu: Gpu,
    tp: int,
    plan: Plan,
    config: ModelConfig,
    *,
    context: int,
    requests: int,
) -> Hosting:
    """Work out what one GPU type at one width can serve.

    context   tokens of one request, prompt and answer
    requests  how many are to run at once
    """
    text = config.text
    weights = _rank_weight_bytes(plan, config, tp)
    working = _CONTEXT_BYTES + _step_bytes(text, tp, _BATCH_TOKENS, requests)
    # A rank keeps whole KV heads; with more ranks than heads they are kept several times.
    heads = -(-text.num_kv_heads // tp)
    token_bytes = kv_token_bytes(plan, text) * heads // text.num_kv_heads
    free = int(gpu.memory_bytes * _UTILIZATION) - weights - working
    tokens = max(free // token_bytes // _BLOCK * _BLOCK, 0)
    problem = _split_problem(plan, config, tp)
    speed, basis = serving_speed(gpu, tp, plan, config)
    if problem is None and tokens == 0:
        problem = f"weights and working memory take {(weights + working) / 1e9:.1f} GB a GPU"
    elif problem is None and tokens < context:
        problem = f"one request of {context:,} tokens does not fit the cache"
    return Hosting(
        gpu=gpu.name,
        tp=tp,
        weight_bytes=weights,
        working_bytes=working,
        usable_bytes=int(gpu.memory_bytes * _UTILIZATION),
        kv_token_bytes=token_bytes,
        kv_tokens=tokens,
        context=context,
        requests=requests,
        full_requests=0 if problem else tokens // context,
        tokens_per_request=min(tokens // requests, context),
        has_native_nvfp4=gpu.has_nvfp4,
        problem=problem,
        tokens_per_s=speed,
        speed_basis=basis,
    )


def room_for_weights(gpu: Gpu, config: ModelConfig, kv_cache: CacheFormat, *, context: int) -> int:
    """Bytes of weights that leave room on one GPU for a single request of `context` tokens.

    With the shares and working memory of `host_on`; may be negative.
    """
    tokens = -(-context // _BLOCK) * _BLOCK
    cache = tokens * bytes_per_token(config.text, kv_cache)
    working = _CONTEXT_BYTES + _step_bytes(config.text, 1, _BATCH_TOKENS, 1)
    return int(gpu.memory_bytes * _UTILIZATION) - working - cache


def host_here(
    available_bytes: int, plan: Plan, config: ModelConfig, *, context: int, requests: int
) -> Hosting:
    """What this machine's processor can serve; the engine takes a quarter of what weights leave."""
    weights = sum(size.num_bytes for size in plan_sizes(plan, config).values())
    token_bytes = kv_token_bytes(plan, config.text)
    tokens = max(int((available_bytes - weights) * _CPU_SHARE) // token_bytes, 0)
    tokens = tokens // _BLOCK * _BLOCK
    problem = None
    if tokens < context:
        problem = f"{available_bytes / 1e9:.1f} GB of memory are available"
    return Hosting(
        gpu=HERE,
        tp=1,
        weight_bytes=weights,
        working_bytes=0,
        usable_bytes=available_bytes,
        kv_token_bytes=token_bytes,
        kv_tokens=tokens,
        context=context,
        requests=requests,
        full_requests=tokens // context,
        tokens_per_request=min(tokens // requests, context),
        has_native_nvfp4=False,
        problem=problem,
    )


def _rank_weight_bytes(plan: Plan, config: ModelConfig, tp: int) -> int:
    text = config.text
    sizes = plan_sizes(plan, config)
    split = sum(sizes[kind].num_bytes for kind in ("bf16", "fp8", "nvfp4"))
    split += sizes["embedding, head"].num_bytes
    whole = sizes["norms"].num_bytes + sizes["kv scales"].num_bytes + sizes["vision"].num_bytes
    # Keys' and values' projections are kept several times where there are more ranks than heads.
    copies = max(1, tp // text.num_kv_heads)
    repeated = sum(
        linear_size(linear, plan.formats[linear.name]).num_bytes
        for linear in decoder_linears(config)
        if linear.name.endswith((".k", ".v"))
    )
    return (split + (copies - 1) * repeated) // tp + whole


def _step_bytes(text: TextConfig, tp: int, batch_tokens: int, requests: int) -> int:
    """Activations of one step and its logits, as the widest point of a layer has them.

    Residual, its normed copy, gate, up and their product in bf16, and f32 sums of one product;
    logits in f32 for each running request.
    """
    widest = 2 * text.width * 2 + 3 * text.mlp_width // tp * 2 + 2 * text.mlp_width // tp * 4
    return batch_tokens * widest + 2 * requests * text.vocab_size * 4


def _split_problem(plan: Plan, config: ModelConfig, tp: int) -> str | None:
    """Why the model cannot be split `tp` ways."""
    text = config.text
    if text.num_heads % tp:
        return f"{text.num_heads} query heads do not split over {tp} GPUs"
    if text.num_kv_heads % tp and tp % text.num_kv_heads:
        return f"{text.num_kv_heads} KV heads do not split over {tp} GPUs"
    if text.mlp_width % tp:
        return f"an MLP of {text.mlp_width} does not split over {tp} GPUs"
    for linear in decoder_linears(config):
        # o and down are split along their inputs, which must stay whole NVFP4 blocks.
        is_split = linear.name.endswith((".o", ".down"))
        if is_split and plan.formats[linear.name] == "nvfp4" and linear.in_features // tp % _BLOCK:
            return (
                f"{linear.name}: {linear.in_features} inputs over {tp} GPUs are not a "
                "multiple of 16"
            )
    return None
