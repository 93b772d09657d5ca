"""Whether a planned checkpoint will serve, and where: weights a rank, KV tokens, GPUs by name.

Pure arithmetic over the config; nothing is asked of any machine. Called by `capacity`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.config import ModelConfig, TextConfig
from halfbyte.engine.cache import bytes_per_token
from halfbyte.errors import UsageError
from halfbyte.modules import decoder_linears
from halfbyte.recipe.plan import Plan, linear_size, plan_sizes

_MIB = 1 << 20
# What the driver and the libraries keep for themselves on each GPU.
_CONTEXT_BYTES = 700 * _MIB
_BLOCK = 16
# The engine's share of free memory for the cache of a machine without a GPU.
_CPU_SHARE = 0.25
HERE = "this machine's processor"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that people serve on. `memory_bytes` is the total that nvidia-smi states."""

    name: str
    memory_bytes: int
    has_nvfp4: bool


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 81920 * _MIB, has_nvfp4=False),
        Gpu("l40s", 46068 * _MIB, has_nvfp4=False),
        Gpu("h100", 81559 * _MIB, has_nvfp4=False),
        Gpu("h200", 143771 * _MIB, has_nvfp4=False),
        Gpu("rtx-pro-6000", 97887 * _MIB, has_nvfp4=True),
        Gpu("b200", 183359 * _MIB, has_nvfp4=True),
    )
}


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


def host(
    plan: Plan,
    config: ModelConfig,
    *,
    context: int,
    requests: int,
    gpus: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
) -> list[Hosting]:
    """Each GPU at each width. Without `widths`: the fewest GPUs that serve all the requests.

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
            tried = [next((x for x in tried if x.full_requests >= requests), tried[-1])]
        hosted += tried
    return hosted


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
    batch_tokens: int = 2048,
    utilization: float = 0.9,
) -> Hosting:
    """Work out what one GPU type at one width can serve.

    context       tokens of one request, prompt and answer
    requests      how many are to run at once
    batch_tokens  tokens of one step (the engine's prefill chunk)
    utilization   share of the GPU's memory that the server takes
    """
    text = config.text
    weights = _rank_weight_bytes(plan, config, tp)
    working = _CONTEXT_BYTES + _step_bytes(text, tp, batch_tokens, requests)
    # A rank keeps whole KV heads; with more ranks than heads they are kept several times.
    heads = -(-text.num_kv_heads // tp)
    token_bytes = kv_token_bytes(plan, text) * heads // text.num_kv_heads
    free = int(gpu.memory_bytes * utilization) - weights - working
    tokens = max(free // token_bytes // _BLOCK * _BLOCK, 0)
    problem = _split_problem(plan, config, tp)
    if problem is None and tokens == 0:
        problem = f"weights and working memory take {(weights + working) / 1e9:.1f} GB a GPU"
    elif problem is None and tokens < context:
        problem = f"one request of {context:,} tokens does not fit the cache"
    return Hosting(
        gpu=gpu.name,
        tp=tp,
        weight_bytes=weights,
        working_bytes=working,
        usable_bytes=int(gpu.memory_bytes * utilization),
        kv_token_bytes=token_bytes,
        kv_tokens=tokens,
        context=context,
        requests=requests,
        full_requests=0 if problem else tokens // context,
        tokens_per_request=min(tokens // requests, context),
        has_native_nvfp4=gpu.has_nvfp4,
        problem=problem,
    )


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
                f"{linear.name}: {linear.in_features} inputs over {tp} GPUs are no multiple of 16"
            )
    return None


def format_hosting(hosted: Sequence[Hosting]) -> str:
    """A table for people, and what its columns rest on."""
    first = hosted[0]
    header = ("GPUs", "weights", "KV/token", "KV tokens", "at once", "")
    rows = [header] + [
        (
            x.gpu if x.gpu == HERE else f"{x.tp} x {x.gpu}",
            f"{x.weight_bytes / 1e9:.1f} GB",
            f"{x.kv_token_bytes:,} B",
            f"{x.kv_tokens:,}",
            f"{min(x.full_requests, x.requests)} of {x.requests}",
            _verdict(x),
        )
        for x in hosted
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            [
                f"{row[0]:<{widths[0]}}",
                *(f"{row[column]:>{widths[column]}}" for column in range(1, 5)),
                row[5],
            ]
        ).rstrip()
        for row in rows
    ]
    title = f"serving {first.requests} requests of {first.context:,} tokens; figures are per GPU"
    return "\n".join([title, *lines])


def _verdict(x: Hosting) -> str:
    if x.problem is not None:
        return f"no: {x.problem}"
    native = "" if x.has_native_nvfp4 else "; NVFP4 weights decoded, no FP4 arithmetic"
    if x.full_requests >= x.requests:
        return f"yes{native}"
    return f"{x.requests} at once have {x.tokens_per_request:,} tokens each{native}"
