"""The decoder on one Hopper GPU: weights in streaming order, a decode step as a list of launches,
prefill through a library's products.

A decode step of a fixed number of sequences is 9 launches a layer, each allowed to start before
the one ahead of it has finished (its weights depend on nothing), captured into one CUDA graph that
also chooses the tokens and moves every sequence on. Attention products take activations rounded to
FP8 by the checkpoint's input scale; NVFP4 products decode weights exactly and take bf16 activations
(exact in fp16). Prepared as "nvfp4_fast" they run in FP8 instead, in decoding and prefill alike:
values rounded to e4m3, activations rounded by each token's largest value.

Shapes: T tokens (decode: one a sequence), D model width, F MLP width, V vocabulary, P pages,
Z slots in a page, K key/value heads, H head size.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.config import TextConfig
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda.driver import Argument, Kernel, Launch, LinearResult
from halfbyte.kernels.cuda.library import (
    PREFILL_COLUMNS,
    HeadShape,
    KernelLibrary,
    OutKind,
    StreamConfig,
    StreamPlan,
    attention_warps,
    choose_config,
    columns_for,
    plan_stream,
)
from halfbyte.kernels.cuda.ops import prefill_launch, stream_product, sum_slots
from halfbyte.kernels.repack import (
    K_BLOCK,
    TiledWeight,
    TileFormat,
    padded,
    pair_activations,
    tile_activations,
    untile_activations,
)

Mode = Literal["exact", "fast"]
# Prompts of more tokens multiply faster through the library, by some per cent at 8192 (measured).
DECODED_TOKENS = 2048
# Rows of a prefill that are normed at once.
_NORM_ROWS = 1024
ACTIVATION_KIND: dict[TileFormat, OutKind] = {
    "fp8": "e4m3",
    "nvfp4": "f16",
    "bf16": "bf16",
    "nvfp4_fast": "e4m3_paired",
}


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """A prepared weight and what its activations are divided by before they are rounded.

    input_scale   FP8: the checkpoint's. NVFP4: a power of two that keeps activations inside fp16,
                  1.0 for all but extreme calibrated maxima. bf16: 1.0
    """

    weight: TiledWeight
    input_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class CudaLayer:
    """One decoder layer on the device."""

    attention_norm_D: Tensor
    qkv: CudaLinear
    o: CudaLinear
    mlp_norm_D: Tensor
    gate_up: CudaLinear
    down: CudaLinear
    k_scale: float
    v_scale: float


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """A decoder's weights on the device, or a tensor-parallel rank's part; `head` is bf16.

    config   the rank's heads and MLP width; `vocab_size` is the whole model's
    vocab    the rows of the vocabulary in embedding and head; None = all
    fuse     a draft model's (`model.eagle`), which joins an embedding and a hidden state; embedding
             and head are then those of the model that it guesses for
    """

    config: TextConfig
    embedding_VD: Tensor
    layers: tuple[CudaLayer, ...]
    norm_D: Tensor
    head: CudaLinear
    vocab: range | None = None
    fuse: CudaLinear | None = None

    @property
    def mode(self) -> Mode:
        """How NVFP4 weights were prepared to multiply: "fast" is in FP8."""
        formats = {linear.weight.format for linear in self.linears}
        return "fast" if "nvfp4_fast" in formats else "exact"

    @property
    def num_logits(self) -> int:
        """Tokens whose logits the head gives."""
        return self.config.vocab_size if self.vocab is None else len(self.vocab)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, without those that a draft model borrows."""
        ends = [self.head] if self.fuse is None else [self.fuse]
        linears = [*ends, *(li for la in self.layers for li in layer_linears(la))]
        dense = [
            self.norm_D,
            *(n for la in self.layers for n in (la.attention_norm_D, la.mlp_norm_D)),
        ]
        if self.fuse is None:
            dense.append(self.embedding_VD)
        return sum(li.weight.num_bytes for li in linears) + sum(
            t.numel() * t.element_size() for t in dense
        )

    @property
    def linears(self) -> tuple[CudaLinear, ...]:
        """Every product of a step."""
        ends = (self.head,) if self.fuse is None else (self.fuse, self.head)
        return (*ends, *(li for la in self.layers for li in layer_linears(la)))

    @property
    def num_step_bytes(self) -> int:
        """Bytes that a decode step streams: every linear, not the embedding table."""
        return self.num_bytes - self.embedding_VD.numel() * 2


def layer_linears(layer: CudaLayer) -> tuple[CudaLinear, ...]:
    """The four products of a layer, in order."""
    return layer.qkv, layer.o, layer.gate_up, layer.down


class KvCache(NamedTuple):
    """Paged e4m3 keys and values of every layer: (P, Z, K, H) each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def page_slots(self) -> int:
        """Tokens a page holds."""
        return self.keys[0].shape[1]


def make_cache(
    config: TextConfig, num_pages: int, page_slots: int, device: torch.device
) -> KvCache:
    """An empty cache."""
    shape = (num_pages, page_slots, config.num_kv_heads, config.head_dim)

    def tensors() -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(config.num_layers)
        )

    return KvCache(tensors(), tensors())


class Rotary:
    """Cosines and sines of positions, in f32, computed in double precision once a frequency."""

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self._frequencies = (config.rope.theta**-half).to(torch.float32).to(device)

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        angles = positions_T.to(torch.float32)[:, None] * self._frequencies
        return angles.cos(), angles.sin(), None


RotaryFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


class Choice(NamedTuple):
    """How tokens are chosen: temperature 0 is greedy; seeds feed the noise of the others."""

    temperature_T: Tensor
    seeds_T: Tensor


class SharedBuffers:
    """Scratch memory of steps that never run at the same time; make the largest step first."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`count` elements under this name; what they hold is undefined."""
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            # Zeros: whatever reads more than was written must find numbers.
            held = torch.zeros(count, dtype=dtype, device=device)
            self._buffers[name] = held
        return held[:count]

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers taken last under each name."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values())


@dataclass(frozen=True, slots=True)
class Serving:
    """What makes a step one of a serving engine: it ends with logits and chooses nothing.

    prepare     enqueued before everything else of a step; fills the step's inputs
    logits_TV   f32, where the logits go; as wide as the head's padded output
    all_reduce  adds up embeddings and o's and down's outputs over the ranks, in place; None on one
                device
    """

    prepare: Callable[["DecodeStep"], None]
    logits_TV: Tensor
    shared: SharedBuffers
    all_reduce: Callable[[Tensor], object] | None = None


class _Collective(NamedTuple):
    """A sum over ranks in the list of launches; it runs on torch's current stream."""

    function: Callable[[Tensor], object]
    tensor: Tensor

    def run(self, stream: int) -> None:
        del stream
        self.function(self.tensor)


class _Activation(NamedTuple):
    """Where a linear's input lies: 16-byte chunks, chunk-major (repack.tile_activations)."""

    data: Tensor
    kind: OutKind
    chunk_stride: int
    token_stride: int
    scale: float
    token_scale_T: Tensor | None = None

    def arguments(self) -> tuple[Argument, ...]:
        return (
            self.data,
            ctypes.c_int64(self.chunk_stride),
            ctypes.c_int64(self.token_stride),
            self.scale,
        )


def _heads(config: TextConfig) -> HeadShape:
    return HeadShape(config.head_dim, config.num_heads, config.num_kv_heads)


def _elementwise(library: KernelLibrary, config: TextConfig, norm_blocks: int) -> dict[str, Kernel]:
    return library.elementwise(config.width, config.mlp_width, norm_blocks, _heads(config))


def _kernel_scale(linear: CudaLinear) -> float:
    """e4m3 activations are divided by the scale, fp16 ones multiplied by its inverse."""
    return 1.0 / linear.input_scale if linear.weight.format == "nvfp4" else linear.input_scale


def norm_blocks(columns: int) -> int:
    """Blocks that share a token which is looked at as a whole: few tokens fill a device too."""
    return 8 if columns <= 32 else 2


def silu_blocks(columns: int) -> int:
    """Likewise of SiLU that rounds each token by its own largest value."""
    return 8 if columns <= 32 else 2


def joined_input(fuse: CudaLinear, embedded_TD: Tensor, hidden_TD: Tensor) -> Tensor:
    """What a draft model's first product reads, rounded as its format wants: (T, 2 D)."""
    x_TI = torch.cat((embedded_TD, hidden_TD), dim=-1)
    if fuse.weight.format == "bf16":
        return x_TI
    return (x_TI.float() / fuse.input_scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


class DecodeStep:
    """One decode step for a fixed number of sequences: static buffers, launches, a graph.

    Fill `token_ids_T`, `positions_T`, `context_lengths_T` (positions + 1), `slots_T` and
    `block_table_TP`, then `run` or `replay`; each leaves the next step's values in them and the
    chosen tokens in `history` (row `step_count`). Two steps in one process share nothing but
    weights, cache and compiled kernels.
    """

    def __init__(
        self,
        library: KernelLibrary,
        weights: CudaWeights,
        cache: KvCache,
        num_tokens: int,
        *,
        rotary: RotaryFunction,
        max_context_tokens: int,
        max_steps: int = 4096,
        choice: Choice | None = None,
        configs: dict[TileFormat, StreamConfig] | None = None,
        overlaps: bool = True,
        serving: Serving | None = None,
    ) -> None:
        self._library = library
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._choice = choice
        self._serving = serving
        self._shared = SharedBuffers() if serving is None else serving.shared
        self._overlaps = overlaps
        self._configs = configs or {}
        self.num_tokens = num_tokens
        self._columns = columns_for(num_tokens)
        device, config = library.device, weights.config
        max_pages = -(-max_context_tokens // cache.page_slots)

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids_T = integers(num_tokens)
        self.positions_T = integers(num_tokens)
        self.context_lengths_T = integers(num_tokens, dtype=torch.int32)
        self.slots_T = integers(num_tokens)
        self.block_table_TP = integers(num_tokens, max_pages, dtype=torch.int32)
        self.history = integers(max_steps if serving is None else 0, num_tokens)
        self.step_count = integers(1, dtype=torch.int32)
        self._best_T = integers(num_tokens)
        self.residual_TD = torch.zeros(
            num_tokens, config.width, dtype=torch.bfloat16, device=device
        )
        half = config.head_dim // 2
        self._cosines = torch.zeros(num_tokens, half, device=device)
        self._sines = torch.zeros(num_tokens, half, device=device)
        self._query_scale_T = torch.ones(num_tokens, device=device)
        self._queries = torch.zeros(
            num_tokens, config.num_heads * config.head_dim, dtype=torch.bfloat16, device=device
        )
        self._make_buffers()
        self._slot_counts: list[Tensor] = []  # alive as long as the launches that read them
        self._launches: list[Launch | _Collective] = []
        self._build()
        self._graph: torch.cuda.CUDAGraph | None = None

    def _make_buffers(self) -> None:
        device, config = self._library.device, self._weights.config
        plans = [self._plan(linear) for linear in self._weights.linears]
        num_out = self.num_tokens * max(p.out_features for p in plans)
        self._out = self._shared.take("out", num_out, torch.bfloat16, device)
        num_partial = self.num_tokens * max(p.num_slots * p.out_features for p in plans)
        self._partial = self._shared.take("partial", num_partial, torch.float32, device)
        pairs = self.num_tokens * config.num_kv_heads
        self._num_splits = min(32, max(1, -(-2 * self._library.num_multiprocessors // pairs)))
        group = config.num_heads // config.num_kv_heads
        num_workspace = pairs * self._num_splits * group * (config.head_dim + 2)
        self._workspace = self._shared.take("attention", num_workspace, torch.float32, device)
        self._counters = torch.zeros(pairs, dtype=torch.int32, device=device)
        self._activations: dict[tuple[str, int], Tensor] = {}
        self._token_scales = torch.ones(2, self.num_tokens, device=device)

    def _kernel(self, linear: CudaLinear) -> tuple[Kernel, StreamPlan]:
        format_ = linear.weight.format
        config = self._configs.get(format_) or choose_config(format_, self._columns)
        kernel, _ = self._library.linear(format_, self._columns, config)
        return kernel, plan_stream(linear.weight, config, self._library.num_multiprocessors)

    def _plan(self, linear: CudaLinear) -> StreamPlan:
        return self._kernel(linear)[1]

    def _activation(self, name: str, linear: CudaLinear) -> _Activation:
        """The input buffer of `linear`; linears of the same place and size share one."""
        weight = linear.weight
        kind = ACTIVATION_KIND[weight.format]
        element = 1 if kind.startswith("e4m3") else 2
        num_bytes = weight.num_k_blocks * K_BLOCK[weight.format] * element * self._columns
        key = (name + kind, num_bytes)
        if key not in self._activations:
            data = torch.zeros(num_bytes, dtype=torch.uint8, device=self._library.device)
            self._activations[key] = data
        token_scale_T = self._token_scales[int(name == "down")] if kind == "e4m3_paired" else None
        return _Activation(
            self._activations[key],
            kind,
            self._columns * 16,
            16,
            _kernel_scale(linear),
            token_scale_T,
        )

    def _add(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        num_threads: int,
        arguments: Sequence[Argument],
        *,
        cluster: int = 1,
    ) -> None:
        launch = Launch(
            kernel, grid, num_threads, arguments, cluster=cluster, overlaps=self._overlaps
        )
        self._launches.append(launch)

    def _add_linear(
        self, linear: CudaLinear, x: _Activation, *, rounds: bool = True
    ) -> LinearResult:
        weight = linear.weight
        kernel, plan = self._kernel(linear)
        is_fast = x.token_scale_T is not None
        row_scale = weight.row_scale_O * (1.0 if is_fast else linear.input_scale)
        out = self._out if rounds else None
        arguments = (
            weight.data,
            x.data,
            row_scale,
            out,
            self._partial,
            weight.out_features,
            weight.num_k_blocks,
            self.num_tokens,
        )
        cluster, num_threads = plan.config.cluster, plan.config.num_threads
        self._add(kernel, plan.grid, num_threads, arguments, cluster=cluster)
        slot_counts = torch.tensor(plan.slot_counts, dtype=torch.uint8, device=self._library.device)
        self._slot_counts.append(slot_counts)
        return plan.result(out, self._partial, slot_counts, self.num_tokens, x.token_scale_T)

    def _gathered(self, linear: CudaLinear, result: LinearResult, dense_TO: Tensor) -> None:
        """Launch that makes `result` dense in `dense_TO`."""
        features = linear.weight.out_features
        slices = min(64, -(-features // (8 * 256)))
        arguments = (result, features, dense_TO, ctypes.c_int64(dense_TO.stride(0)))
        self._add(self._library.gather(), (slices, self.num_tokens, 1), 256, arguments)

    def _reduced(self, linear: CudaLinear, result: LinearResult) -> LinearResult:
        """`result` added up over the ranks: where tensor parallelism meets, after o and down."""
        serving = self._serving
        if serving is None or serving.all_reduce is None:
            return result
        features = linear.weight.out_features
        dense = self._shared.take(
            "reduced", self.num_tokens * features, torch.float32, self._library.device
        ).view(self.num_tokens, features)
        self._gathered(linear, result, dense)
        self._launches.append(_Collective(serving.all_reduce, dense))
        return LinearResult(partial=dense.data_ptr(), stride=features)

    def _add_norm(self, result: LinearResult | None, weight_D: Tensor, x: _Activation) -> None:
        config = self._weights.config
        blocks = norm_blocks(self._columns)
        kernels = _elementwise(self._library, config, blocks)
        name = f"{'norm' if result is None else 'add_norm'}_{x.kind}"
        arguments = (
            LinearResult() if result is None else result,
            self.residual_TD,
            weight_D,
            float(config.norm_eps),
            *x.arguments(),
            x.token_scale_T,
        )
        self._add(kernels[name], (blocks, self.num_tokens, 1), 256, arguments, cluster=blocks)

    def _add_attention(
        self, index: int, layer: CudaLayer, qkv: LinearResult, x: _Activation
    ) -> None:
        config, heads = self._weights.config, _heads(self._weights.config)
        kernels = _elementwise(self._library, config, 8)
        heads_per_block = 256 // (config.head_dim // 16)
        all_heads = config.num_heads + 2 * config.num_kv_heads
        keys, values = self._cache.keys[index], self._cache.values[index]
        arguments: tuple[Argument, ...] = (
            qkv,
            self._cosines,
            self._sines,
            self._query_scale_T,
            self._queries,
            keys,
            values,
            self.slots_T,
            layer.k_scale,
            layer.v_scale,
            None,
            None,
        )
        grid = (self.num_tokens, -(-all_heads // heads_per_block), 1)
        self._add(kernels["rotate_and_store"], grid, 256, arguments)
        num_warps = attention_warps(
            self.num_tokens * config.num_kv_heads, self._library.num_multiprocessors
        )
        attention = self._library.attention(heads, self._cache.page_slots, x.kind, num_warps)
        arguments = (
            self._queries,
            keys,
            values,
            self.block_table_TP,
            self.block_table_TP.shape[1],
            self.context_lengths_T,
            layer.k_scale * math.log2(math.e) / math.sqrt(config.head_dim),
            layer.v_scale,
            self._workspace,
            self._counters,
            *x.arguments(),
        )
        grid = (self._num_splits, config.num_kv_heads, self.num_tokens)
        self._add(attention, grid, num_warps * 32, arguments)

    def _add_silu(self, gate_up: LinearResult, x: _Activation) -> None:
        config = self._weights.config
        kernels = _elementwise(self._library, config, 8)
        if x.token_scale_T is not None:
            per_token = (gate_up, config.mlp_width, *x.arguments(), x.token_scale_T)
            blocks = silu_blocks(self._columns)
            kernel = _elementwise(self._library, config, blocks)["silu_mul_e4m3_paired"]
            self._add(kernel, (blocks, self.num_tokens, 1), 512, per_token, cluster=blocks)
            return
        grid = (-(-config.mlp_width // (8 * 256)), self.num_tokens, 1)
        arguments = (gate_up, config.mlp_width, *x.arguments(), self.num_tokens)
        self._add(kernels[f"silu_mul_{x.kind}"], grid, 256, arguments)

    def _build(self) -> None:
        weights, config = self._weights, self._weights.config
        kernels = _elementwise(self._library, config, 8)
        result: LinearResult | None = None
        if weights.fuse is None:
            embed = (weights.embedding_VD, self.token_ids_T, self.residual_TD)
            self._add(kernels["embed"], (self.num_tokens, 1, 1), 256, embed)
            if self._serving is not None and self._serving.all_reduce is not None:
                self._launches.append(_Collective(self._serving.all_reduce, self.residual_TD))
        else:
            self._joined = self._activation("fuse", weights.fuse)
            result = self._add_linear(weights.fuse, self._joined)
        for index, layer in enumerate(weights.layers):
            x = self._activation("qkv", layer.qkv)
            self._add_norm(result, layer.attention_norm_D, x)
            qkv = self._add_linear(layer.qkv, x)
            x = self._activation("o", layer.o)
            self._add_attention(index, layer, qkv, x)
            result = self._reduced(layer.o, self._add_linear(layer.o, x))
            x = self._activation("gate_up", layer.gate_up)
            self._add_norm(result, layer.mlp_norm_D, x)
            gate_up = self._add_linear(layer.gate_up, x)
            x = self._activation("down", layer.down)
            self._add_silu(gate_up, x)
            result = self._reduced(layer.down, self._add_linear(layer.down, x))
        x = self._head_input = self._activation("head", weights.head)
        self._add_norm(result, weights.norm_D, x)
        self.logits = self._add_linear(weights.head, x, rounds=False)
        if self._serving is None:
            self._add_choice(kernels)
        else:
            self._gathered(weights.head, self.logits, self._serving.logits_TV)

    def _add_choice(self, kernels: dict[str, Kernel]) -> None:
        config, choice = self._weights.config, self._choice
        slices = min(64, max(1, 2048 // self.num_tokens))
        arguments: tuple[Argument, ...] = (
            self.logits,
            config.vocab_size,
            None if choice is None else choice.temperature_T,
            None if choice is None else choice.seeds_T,
            self.positions_T,
            self._best_T,
        )
        self._add(kernels["choose_token"], (slices, self.num_tokens, 1), 256, arguments)
        arguments = (
            self._best_T,
            self.token_ids_T,
            self.positions_T,
            self.context_lengths_T,
            self.slots_T,
            self.block_table_TP,
            self.block_table_TP.shape[1],
            self._cache.page_slots,
            self.history,
            ctypes.c_int64(self.num_tokens),
            self.step_count,
            self.num_tokens,
        )
        self._add(kernels["advance"], (1, 1, 1), 128, arguments)

    @property
    def num_launches(self) -> int:
        """Kernels a step launches, the rotary angles' few aside."""
        return len(self._launches)

    def read_logits(self) -> Tensor:
        """Logits (T, V) f32 of the last step, on the device; for callers that choose otherwise."""
        plan = self._plan(self._weights.head)
        used = plan.num_slots * self.num_tokens * plan.out_features
        partial = self._partial[:used].view(plan.num_slots, self.num_tokens, plan.out_features)
        return sum_slots(partial, plan)[:, : self._weights.config.vocab_size]

    def read_hidden(self) -> Tensor:
        """What the head read in the last step, behind the final norm: bf16 (T, D), a copy."""
        return untile_activations(
            self._head_input.data,
            self._columns,
            self.num_tokens,
            self._weights.config.width,
            torch.bfloat16,
        )

    def join(self, hidden_TD: Tensor) -> None:
        """Enqueue what a draft model starts from: its tokens' embeddings beside `hidden_TD`."""
        fuse = self._weights.fuse
        assert fuse is not None
        x_TI = joined_input(fuse, self._weights.embedding_VD[self.token_ids_T], hidden_TD)
        tiled = tile_activations(x_TI, self._columns).view(-1)
        self._joined.data[: tiled.numel()].copy_(tiled)
        self.residual_TD.zero_()

    def run(self) -> None:
        """Enqueue one step on the current stream, without a graph."""
        if self._serving is not None:
            self._serving.prepare(self)
        cosines, sines, query_scale = self._rotary(self.positions_T)
        self._cosines.copy_(cosines)
        self._sines.copy_(sines)
        if query_scale is not None:
            self._query_scale_T.copy_(query_scale)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in self._launches:
            launch.run(stream)

    def capture(self, pool: Any = None) -> None:
        """Record a step as a graph; the state the step moves on is left as it was.

        pool    torch's graph memory pool, shared by graphs that never run at the same time
        """
        moved = (
            self.token_ids_T,
            self.positions_T,
            self.context_lengths_T,
            self.slots_T,
            self.step_count,
        )
        before = [tensor.clone() for tensor in moved]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(moved, before, strict=True):
            tensor.copy_(value)
        self._graph = graph

    def replay(self) -> None:
        """Enqueue one step through the graph."""
        assert self._graph is not None, "capture first"
        self._graph.replay()


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence among a prefill's rows.

    start       tokens of the sequence that are stored already
    pages_P     int64, the sequence's pages as far as this chunk reaches; unused if start is 0
    """

    first_row: int
    num_rows: int
    start: int
    pages_P: Tensor


class Singles(NamedTuple):
    """The leading rows of a prefill that are one token each of a sequence.

    block_table_SP, context_lengths_S  int32, as for a decode step
    """

    block_table_SP: Tensor
    context_lengths_S: Tensor


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """A ragged batch: first single tokens of sequences, then chunks of prompts.

    image_rows_I   rows whose embedding is replaced by `image_vectors_ID`, which rank 0 alone has
    hidden_TD      what a draft model reads beside the embeddings
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    chunks: tuple[Chunk, ...]
    singles: Singles | None = None
    image_rows_I: Tensor | None = None
    image_vectors_ID: Tensor | None = None
    hidden_TD: Tensor | None = None


def attend_to_end(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of C tokens over all of them: (T, N, H)."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    num_queries, num_keys = q_TNH.shape[0], k_CKH.shape[0]
    is_whole = num_queries == num_keys
    q, k, v = (t.transpose(0, 1)[None] for t in (q_TNH, k_CKH, v_CKH))
    mask: Any = None if is_whole else causal_lower_right(num_queries, num_keys)
    with sdpa_kernel(order, set_priority=True):
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_whole, scale=scale, enable_gqa=True
        )
    return out[0].transpose(0, 1)


class Prefill:
    """Many tokens at once through every layer.

    NVFP4 layers multiply in fp16, where every value is exact, or in FP8 (`CudaWeights.mode`), as a
    decode step does. Keys and values are read as stored. NVFP4 is decoded in registers (prefill.cu)
    or, "nvfp4_fast" in batches of more than DECODED_TOKENS, read a layer at a time from a scratch
    buffer through the library; `decoded_formats` names those that registers always take, and no
    others. FP8 and bf16 go through the library.
    """

    def __init__(
        self,
        library: KernelLibrary,
        weights: CudaWeights,
        cache: KvCache,
        max_tokens: int,
        *,
        rotary: RotaryFunction,
        fast_accumulation: bool = False,
        all_reduce: Callable[[Tensor], object] | None = None,
        decoded_formats: frozenset[TileFormat] | None = None,
        shared: SharedBuffers | None = None,
    ) -> None:
        """`shared` holds the scratch buffer; none needs to outlive a forward."""
        self._library = library
        self._decoded_formats = decoded_formats
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._num_tokens = max_tokens  # of the batch at work
        self._fast_accumulation = fast_accumulation
        self._all_reduce = all_reduce
        config, device = weights.config, library.device
        self._kernels = _elementwise(library, config, 1)
        self._layout = library.layout()
        self._one = torch.ones((), device=device)
        self._epsilon = config.norm_eps
        self._workspace = torch.zeros(0, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)
        element = {"fp8": 1, "nvfp4": 2, "nvfp4_fast": 1, "bf16": 2}
        products = [linear for linear in weights.linears if linear is not weights.head]
        sizes = [
            li.weight.data.shape[0]
            * 64
            * li.weight.num_k_blocks
            * K_BLOCK[li.weight.format]
            * element[li.weight.format]
            for li in products
            if not self._is_decoded(li)
        ]
        self._scratch = (shared or SharedBuffers()).take(
            "decoded", max(sizes, default=0), torch.uint8, device
        )
        self._token_scale_T = torch.ones(max_tokens, device=device)
        # Row scales with the activations' scale folded in, made once: a product a forward is slow.
        self._row_scales = {id(linear): self._row_scale(linear) for linear in products}

    def _row_scale(self, linear: CudaLinear) -> Tensor:
        kind = self._kind(linear)
        if kind in ("e4m3_token", "e4m3_paired"):
            return linear.weight.row_scale_O
        return linear.weight.row_scale_O * (1.0 if kind == "bf16" else linear.input_scale)

    def _is_decoded(self, linear: CudaLinear) -> bool:
        """Whether its weights are decoded inside the product."""
        format_ = linear.weight.format
        if self._decoded_formats is not None:
            return format_ in self._decoded_formats
        few = self._num_tokens <= DECODED_TOKENS
        return format_ == "nvfp4" or (format_ == "nvfp4_fast" and few)

    def _launch(
        self, kernel: Kernel, grid: tuple[int, int, int], num_threads: int, *arguments: Argument
    ) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        Launch(kernel, grid, num_threads, arguments, overlaps=False).run(stream)

    def _decoded(self, linear: CudaLinear) -> Tensor:
        """The weight as the library wants it, in the scratch buffer: (O, I) e4m3 or bf16."""
        weight = linear.weight
        row_tiles, k_blocks = weight.data.shape[:2]
        gain: tuple[Argument, ...] = ()
        name, row_bytes = "untile_8bit", k_blocks * 128
        is_bf16 = weight.format in ("nvfp4", "bf16")
        if weight.format == "nvfp4":
            name, row_bytes, gain = "decode_nvfp4_bf16", k_blocks * 256, (1.0,)
        elif weight.format == "nvfp4_fast":
            name = "decode_nvfp4_e4m3"
        arguments = (weight.data, self._scratch, k_blocks, ctypes.c_int64(row_bytes), *gain)
        self._launch(self._layout[name], (k_blocks, row_tiles, 1), 128, *arguments)
        rows = self._scratch[: row_tiles * 64 * row_bytes].view(row_tiles * 64, row_bytes)
        return rows.view(torch.bfloat16 if is_bf16 else torch.float8_e4m3fn)

    def _kind(self, linear: CudaLinear) -> str:
        """Suffix of the kernel that writes this linear's input."""
        format_ = linear.weight.format
        if not self._is_decoded(linear):
            plain: dict[TileFormat, str] = {"nvfp4": "bf16", "nvfp4_fast": "e4m3_token"}
            return plain.get(format_, ACTIVATION_KIND[format_])
        return ACTIVATION_KIND[format_]

    def _input(self, linear: CudaLinear, num_tokens: int) -> Tensor:
        """Room for a linear's input: (T, I), or in 16-byte chunks (I / chunk, T padded, 16)."""
        weight = linear.weight
        columns = weight.num_k_blocks * K_BLOCK[weight.format]
        if self._is_decoded(linear):
            per_chunk = 8 if weight.format == "nvfp4" else 16
            shape = (columns // per_chunk, padded(num_tokens, PREFILL_COLUMNS), 16)
            chunks = torch.empty(shape, dtype=torch.uint8, device=self._library.device)
            # Features may be permuted within 64; what is written comes later.
            chunks[weight.in_features // 64 * (64 // per_chunk) :] = 0
            return chunks
        dtype = torch.bfloat16 if self._kind(linear) == "bf16" else torch.float8_e4m3fn
        x_TI = torch.empty(num_tokens, columns, dtype=dtype, device=self._library.device)
        if columns > weight.in_features:  # their weights are zero, but 0 * NaN is NaN
            x_TI.view(torch.uint8)[:, weight.in_features * x_TI.element_size() :] = 0
        return x_TI

    def _decoded_product(
        self, linear: CudaLinear, x_chunks: Tensor, num_tokens: int
    ) -> LinearResult:
        device, features = self._library.device, linear.weight.out_features
        y_TO = torch.empty(num_tokens, features, dtype=torch.bfloat16, device=device)
        launch = prefill_launch(
            self._library,
            linear.weight,
            x_chunks,
            self._row_scales[id(linear)],
            y_TO,
        )
        launch.run(torch.cuda.current_stream().cuda_stream)
        self._last = y_TO
        is_fast = linear.weight.format == "nvfp4_fast"
        return LinearResult(
            out=y_TO.data_ptr(),
            token_scale=self._token_scale_T.data_ptr() if is_fast else None,
            stride=features,
        )

    def _product(self, linear: CudaLinear, x_TI: Tensor, num_tokens: int) -> LinearResult:
        """Product in bf16 and the scales that the kernel after it applies."""
        if self._is_decoded(linear):
            return self._decoded_product(linear, x_TI, num_tokens)
        w_OI = self._decoded(linear)
        if x_TI.dtype == torch.bfloat16:
            y_TO = torch.mm(x_TI, w_OI.t())
        else:
            y_TO = torch._scaled_mm(
                x_TI,
                w_OI.t(),
                scale_a=self._one,
                scale_b=self._one,
                out_dtype=torch.bfloat16,
                use_fast_accum=self._fast_accumulation,
            )
        self._last = y_TO  # alive until the kernel that reads it is enqueued
        per_token = self._kind(linear) == "e4m3_token"
        return LinearResult(
            out=y_TO.data_ptr(),
            row_scale=self._row_scales[id(linear)].data_ptr(),
            token_scale=self._token_scale_T.data_ptr() if per_token else None,
            stride=y_TO.shape[1],
        )

    def _strides(self, x_TI: Tensor, linear: CudaLinear) -> tuple[Argument, ...]:
        if self._is_decoded(linear):
            chunk_stride = ctypes.c_int64(x_TI.shape[1] * 16)
            return x_TI, chunk_stride, ctypes.c_int64(16), _kernel_scale(linear)
        row_bytes = x_TI.shape[1] * x_TI.element_size()
        is_nvfp4 = linear.weight.format in ("nvfp4", "nvfp4_fast")
        scale = 1.0 if is_nvfp4 else linear.input_scale
        return x_TI, ctypes.c_int64(16), ctypes.c_int64(row_bytes), scale

    def _norm(
        self, result: LinearResult | None, residual_TD: Tensor, weight_D: Tensor, linear: CudaLinear
    ) -> Tensor:
        num_tokens = residual_TD.shape[0]
        x_TI = self._input(linear, num_tokens)
        name = f"{'norm' if result is None else 'add_norm'}_{self._kind(linear)}"
        self._launch(
            self._kernels[name],
            (1, num_tokens, 1),
            512,
            LinearResult() if result is None else result,
            residual_TD,
            weight_D,
            float(self._weights.config.norm_eps),
            *self._strides(x_TI, linear),
            self._token_scale_T,
        )
        return x_TI

    def _attend(
        self, index: int, layer: CudaLayer, qkv: LinearResult, batch: PrefillBatch
    ) -> Tensor:
        config, device = self._weights.config, self._library.device
        num_tokens = batch.token_ids_T.shape[0]
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        q = torch.empty(num_tokens, heads, size, dtype=torch.bfloat16, device=device)
        k = torch.empty(num_tokens, kv_heads, size, dtype=torch.bfloat16, device=device)
        v = torch.empty_like(k)
        cosines, sines, query_scale = self._angles
        self._launch(
            self._kernels["rotate_and_store"],
            (num_tokens, -(-(heads + 2 * kv_heads) // (256 // (size // 16))), 1),
            256,
            qkv,
            cosines,
            sines,
            query_scale,
            q,
            self._cache.keys[index],
            self._cache.values[index],
            batch.slots_T,
            layer.k_scale,
            layer.v_scale,
            k,
            v,
        )
        out = torch.empty_like(q) if batch.singles is not None or len(batch.chunks) > 1 else None
        if batch.singles is not None and out is not None:
            self._attend_singles(index, layer, q, out, batch.singles)
        for chunk in batch.chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            keys, values = k[rows], v[rows]
            if chunk.start > 0:
                stored = chunk.start + chunk.num_rows
                keys = self._stored(self._cache.keys[index], chunk.pages_P, stored)
                values = self._stored(self._cache.values[index], chunk.pages_P, stored)
            attended = attend_to_end(q[rows], keys, values, layer.k_scale / math.sqrt(size))
            if out is None:
                out = attended
            else:
                out[rows] = attended
        assert out is not None
        return self._attention_output(layer, out.reshape(num_tokens, heads * size))

    def _stored(self, cache_PZKH: Tensor, pages_P: Tensor, num_tokens: int) -> Tensor:
        """The first tokens of a sequence as its pages hold them, in bf16 (exact): (C, K, H)."""
        codes = cache_PZKH[pages_P].flatten(0, 1)[:num_tokens]
        return codes.view(torch.float8_e4m3fn).to(torch.bfloat16)

    def _attend_singles(
        self, index: int, layer: CudaLayer, q: Tensor, out: Tensor, singles: Singles
    ) -> None:
        config, library = self._weights.config, self._library
        size, kv_heads = config.head_dim, config.num_kv_heads
        num_sequences = singles.context_lengths_S.shape[0]
        pairs = num_sequences * kv_heads
        num_splits = min(32, max(1, -(-2 * library.num_multiprocessors // pairs)))
        group = config.num_heads // kv_heads
        num_workspace = pairs * num_splits * group * (size + 2)
        if self._workspace.numel() < num_workspace or self._counters.numel() < pairs:
            self._workspace = torch.zeros(num_workspace, device=library.device)
            self._counters = torch.zeros(pairs, dtype=torch.int32, device=library.device)
        num_warps = attention_warps(pairs, library.num_multiprocessors)
        heads = _heads(config)
        self._launch(
            library.attention(heads, self._cache.page_slots, "bf16", num_warps),
            (num_splits, kv_heads, num_sequences),
            num_warps * 32,
            q,
            self._cache.keys[index],
            self._cache.values[index],
            singles.block_table_SP,
            singles.block_table_SP.stride(0),
            singles.context_lengths_S,
            layer.k_scale * math.log2(math.e) / math.sqrt(size),
            1.0,  # v_scale comes with what the other rows' attention gives
            self._workspace,
            self._counters,
            out,
            ctypes.c_int64(16),
            ctypes.c_int64(config.num_heads * size * 2),
            1.0,
        )

    def _attention_output(self, layer: CudaLayer, out_TO: Tensor) -> Tensor:
        """Attention's output times v_scale, as the output product reads it."""
        num_tokens, width = out_TO.shape
        x_TI = self._input(layer.o, num_tokens)
        if self._is_decoded(layer.o):
            return self._tiled(out_TO.float() * layer.v_scale, layer.o, x_TI)
        if self._kind(layer.o) == "bf16":
            x_TI[:, :width] = out_TO * layer.v_scale
            return x_TI
        if layer.o.weight.format != "fp8":
            raise UnsupportedError("prefill in mode fast needs o projections in FP8 or bf16")
        grid = (-(-width // (8 * 256)), num_tokens, 1)
        strides = self._strides(x_TI, layer.o)
        self._launch(
            self._kernels["quantize_e4m3"], grid, 256, out_TO, width, layer.v_scale, *strides
        )
        return x_TI

    def _tiled(self, x_TI: Tensor, linear: CudaLinear, room: Tensor) -> Tensor:
        """Attention's output for an NVFP4 product; no shipped format has one, so not fused."""
        num_tokens, width = x_TI.shape
        if linear.weight.format == "nvfp4":
            x = (x_TI / linear.input_scale).to(torch.float16)
        else:
            scale_T = x_TI.abs().amax(-1).clamp(min=1e-12) / 448.0
            self._token_scale_T[:num_tokens] = scale_T
            whole = torch.zeros(num_tokens, padded(width, 64), device=x_TI.device)
            whole[:, :width] = x_TI / scale_T[:, None]
            x = pair_activations(whole.to(torch.float8_e4m3fn))
        if width * x.element_size() % 128:  # whole K blocks
            room.zero_()
        tiled = tile_activations(x, room.shape[1])
        room[: tiled.shape[0]] = tiled
        return room

    def _silu(self, gate_up: LinearResult, linear: CudaLinear, num_tokens: int) -> Tensor:
        width = self._weights.config.mlp_width
        x_TI = self._input(linear, num_tokens)
        strides = self._strides(x_TI, linear)
        kind = self._kind(linear)
        if kind in ("e4m3_token", "e4m3_paired"):
            arguments = (gate_up, width, *strides, self._token_scale_T)
            self._launch(self._kernels[f"silu_mul_{kind}"], (1, num_tokens, 1), 512, *arguments)
        else:
            grid = (-(-width // 256), -(-num_tokens // 8), 1)
            by_rows = (gate_up, width, *strides, num_tokens)
            self._launch(self._kernels[f"silu_mul_{kind}"], grid, 256, *by_rows)
        return x_TI

    def run(self, token_ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """Logits (V,) f32 of the last token of one sequence, from its start.

        Keys and values of all tokens go to `slots_T`.
        """
        num_tokens, device = token_ids_T.shape[0], self._library.device
        positions_T = torch.arange(num_tokens, device=device)
        chunk = Chunk(0, num_tokens, 0, positions_T[:0])
        x_TD = self.forward(PrefillBatch(token_ids_T, positions_T, slots_T, (chunk,)))
        x_1D = self.normed(x_TD[-1:])
        logits_1V = stream_product(self._library, self._weights.head.weight, x_1D)
        return logits_1V[0, : self._weights.config.vocab_size]

    def forward(self, batch: PrefillBatch) -> Tensor:
        """The residual stream after the last layer, (T, D) bf16; keys and values are stored."""
        weights = self._weights
        self._angles = self._rotary(batch.positions_T)
        residual_TD = weights.embedding_VD[batch.token_ids_T]
        if batch.image_rows_I is not None:
            if batch.image_vectors_ID is not None:
                residual_TD[batch.image_rows_I] = batch.image_vectors_ID.to(torch.bfloat16)
            else:
                residual_TD[batch.image_rows_I] = 0
        if self._all_reduce is not None:
            self._all_reduce(residual_TD)
        num_tokens = self._num_tokens = residual_TD.shape[0]
        result: LinearResult | None = None
        if weights.fuse is not None:
            assert batch.hidden_TD is not None
            joined_TI = joined_input(weights.fuse, residual_TD, batch.hidden_TD)
            x = self._input(weights.fuse, num_tokens)
            x[:, : joined_TI.shape[1]] = joined_TI
            result = self._product(weights.fuse, x, num_tokens)
            residual_TD.zero_()
        for index, layer in enumerate(weights.layers):
            x = self._norm(result, residual_TD, layer.attention_norm_D, layer.qkv)
            qkv = self._product(layer.qkv, x, num_tokens)
            x = self._attend(index, layer, qkv, batch)
            result = self._reduced(layer.o, self._product(layer.o, x, num_tokens))
            x = self._norm(result, residual_TD, layer.mlp_norm_D, layer.gate_up)
            gate_up = self._product(layer.gate_up, x, num_tokens)
            x = self._silu(gate_up, layer.down, num_tokens)
            result = self._reduced(layer.down, self._product(layer.down, x, num_tokens))
        assert result is not None
        return residual_TD + self._scaled(weights.layers[-1].down, result)

    def _scaled(self, linear: CudaLinear, result: LinearResult) -> Tensor:
        """The last product with its scales applied, rounded to bf16: (T, D)."""
        width = self._weights.config.width
        y_TD = self._last[:, :width].float()
        if result.row_scale is not None:
            y_TD = y_TD * self._row_scales[id(linear)][:width]
        if result.token_scale is not None:
            y_TD = y_TD * self._token_scale_T[: y_TD.shape[0], None]
        return y_TD.to(torch.bfloat16)

    def _reduced(self, linear: CudaLinear, result: LinearResult) -> LinearResult:
        """The last product added up over the ranks, scales applied; as it is on one device."""
        if self._all_reduce is None:
            return result
        y_TO = self._scaled(linear, result)
        self._all_reduce(y_TO)
        self._last = y_TO
        return LinearResult(out=y_TO.data_ptr(), stride=y_TO.shape[1])

    def normed(self, residual_RD: Tensor) -> Tensor:
        """Rows of `forward`'s result as the head reads them, bf16."""
        normed_RD = torch.empty_like(residual_RD)
        # In parts: all of a long prefill's rows in f32, several times over, are gigabytes.
        for part_RD, out_RD in zip(
            torch.split(residual_RD, _NORM_ROWS), torch.split(normed_RD, _NORM_ROWS), strict=True
        ):
            x_RD = part_RD.float()
            x_RD = x_RD * torch.rsqrt(x_RD.square().mean(-1, keepdim=True) + self._epsilon)
            out_RD.copy_(x_RD * self._weights.norm_D.float())
        return normed_RD
