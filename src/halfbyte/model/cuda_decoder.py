"""The decoder on one Hopper GPU: weights in streaming order, a decode step as a list of launches,
prefill through a library's products.

A decode step of a fixed number of sequences is 9 launches a layer, each allowed to start before
the one ahead of it has finished (its weights depend on nothing), captured into one CUDA graph that
also chooses the tokens and moves every sequence on. Attention products take activations rounded to
FP8 by the checkpoint's input scale; NVFP4 products decode weights exactly and take bf16 activations
(exact in fp16), unless prefill runs in mode "fast".

Shapes: T tokens (decode: one a sequence), D model width, F MLP width, V vocabulary, P pages,
Z slots in a page, K key/value heads, H head size.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.config import TextConfig
from halfbyte.kernels.cuda.driver import Argument, Kernel, Launch, LinearResult
from halfbyte.kernels.cuda.library import (
    HeadShape,
    KernelLibrary,
    OutKind,
    StreamConfig,
    StreamPlan,
    attention_warps,
    columns_for,
    plan_stream,
)
from halfbyte.kernels.cuda.ops import stream_product, sum_slots
from halfbyte.kernels.repack import K_BLOCK, TiledWeight, TileFormat

PrefillMode = Literal["exact", "fast"]
ACTIVATION_KIND: dict[TileFormat, OutKind] = {"fp8": "e4m3", "nvfp4": "f16", "bf16": "bf16"}
# NVFP4 values as e4m3 in prefill mode "fast": code * block scale / 8 is at most 336.
_FAST_GAIN = 2.0**8 / 8


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
    """A decoder's weights on the device; `head` is bf16."""

    config: TextConfig
    embedding_VD: Tensor
    layers: tuple[CudaLayer, ...]
    norm_D: Tensor
    head: CudaLinear

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        linears = [self.head, *(li for la in self.layers for li in _linears(la))]
        norms = [
            self.norm_D,
            *(n for la in self.layers for n in (la.attention_norm_D, la.mlp_norm_D)),
        ]
        return sum(li.weight.num_bytes for li in linears) + sum(
            t.numel() * t.element_size() for t in (self.embedding_VD, *norms)
        )

    @property
    def num_step_bytes(self) -> int:
        """Bytes that a decode step streams: every linear, not the embedding table."""
        return self.num_bytes - self.embedding_VD.numel() * 2


def _linears(layer: CudaLayer) -> tuple[CudaLinear, ...]:
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


class _Activation(NamedTuple):
    """Where a linear's input lies: 16-byte chunks, chunk-major (repack.tile_activations)."""

    data: Tensor
    kind: OutKind
    chunk_stride: int
    token_stride: int
    scale: float

    def arguments(self) -> tuple[Argument, ...]:
        return (
            self.data,
            ctypes.c_int64(self.chunk_stride),
            ctypes.c_int64(self.token_stride),
            self.scale,
        )


def _heads(config: TextConfig) -> HeadShape:
    return HeadShape(config.head_dim, config.num_heads, config.num_kv_heads)


def _kernel_scale(linear: CudaLinear) -> float:
    """e4m3 activations are divided by the scale, fp16 ones multiplied by its inverse."""
    return 1.0 / linear.input_scale if linear.weight.format == "nvfp4" else linear.input_scale


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
    ) -> None:
        self._library = library
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._choice = choice
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
        self.history = integers(max_steps, num_tokens)
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
        self._launches: list[Launch] = []
        self._build()
        self._graph: torch.cuda.CUDAGraph | None = None

    def _all_linears(self) -> list[CudaLinear]:
        return [self._weights.head, *(li for la in self._weights.layers for li in _linears(la))]

    def _make_buffers(self) -> None:
        device, config = self._library.device, self._weights.config
        plans = [self._plan(linear) for linear in self._all_linears()]
        self._out = torch.zeros(
            self.num_tokens * max(p.out_features for p in plans),
            dtype=torch.bfloat16,
            device=device,
        )
        self._partial = torch.zeros(
            self.num_tokens * max(p.num_slots * p.out_features for p in plans), device=device
        )
        pairs = self.num_tokens * config.num_kv_heads
        self._num_splits = min(32, max(1, -(-2 * self._library.num_multiprocessors // pairs)))
        group = config.num_heads // config.num_kv_heads
        self._workspace = torch.zeros(
            pairs * self._num_splits * group * (config.head_dim + 2), device=device
        )
        self._counters = torch.zeros(pairs, dtype=torch.int32, device=device)
        self._activations: dict[tuple[str, int], Tensor] = {}

    def _plan(self, linear: CudaLinear) -> StreamPlan:
        format_ = linear.weight.format
        _, config = self._library.linear(format_, self._columns, self._configs.get(format_))
        return plan_stream(linear.weight, config, self._library.num_multiprocessors)

    def _activation(self, name: str, linear: CudaLinear) -> _Activation:
        """The input buffer of `linear`; linears of the same place and size share one."""
        weight = linear.weight
        element = 1 if weight.format == "fp8" else 2
        num_bytes = weight.num_k_blocks * K_BLOCK[weight.format] * element * self._columns
        key = (name + weight.format, num_bytes)
        if key not in self._activations:
            data = torch.zeros(num_bytes, dtype=torch.uint8, device=self._library.device)
            self._activations[key] = data
        kind = ACTIVATION_KIND[weight.format]
        return _Activation(
            self._activations[key], kind, self._columns * 16, 16, _kernel_scale(linear)
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
        kernel, config = self._library.linear(
            weight.format, self._columns, self._configs.get(weight.format)
        )
        plan = self._plan(linear)
        row_scale = weight.row_scale_O * linear.input_scale
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
        self._add(kernel, (plan.num_blocks, 1, 1), config.num_threads, arguments)
        return plan.result(out, self._partial, self.num_tokens)

    def _add_norm(self, result: LinearResult | None, weight_D: Tensor, x: _Activation) -> None:
        config = self._weights.config
        blocks = 8 if self._columns <= 32 else 2
        kernels = self._library.elementwise(config.width, blocks, _heads(config))
        name = f"{'norm' if result is None else 'add_norm'}_{x.kind}"
        arguments = (
            LinearResult() if result is None else result,
            self.residual_TD,
            weight_D,
            float(config.norm_eps),
            *x.arguments(),
            None,
        )
        self._add(kernels[name], (blocks, self.num_tokens, 1), 256, arguments, cluster=blocks)

    def _add_attention(
        self, index: int, layer: CudaLayer, qkv: LinearResult, x: _Activation
    ) -> None:
        config, heads = self._weights.config, _heads(self._weights.config)
        kernels = self._library.elementwise(config.width, 8, heads)
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
        kernels = self._library.elementwise(config.width, 8, _heads(config))
        grid = (-(-config.mlp_width // (8 * 256)), self.num_tokens, 1)
        arguments = (gate_up, config.mlp_width, *x.arguments())
        self._add(kernels[f"silu_mul_{x.kind}"], grid, 256, arguments)

    def _build(self) -> None:
        weights, config = self._weights, self._weights.config
        kernels = self._library.elementwise(config.width, 8, _heads(config))
        embed = (weights.embedding_VD, self.token_ids_T, self.residual_TD)
        self._add(kernels["embed"], (self.num_tokens, 1, 1), 256, embed)
        result: LinearResult | None = None
        for index, layer in enumerate(weights.layers):
            x = self._activation("qkv", layer.qkv)
            self._add_norm(result, layer.attention_norm_D, x)
            qkv = self._add_linear(layer.qkv, x)
            x = self._activation("o", layer.o)
            self._add_attention(index, layer, qkv, x)
            result = self._add_linear(layer.o, x)
            x = self._activation("gate_up", layer.gate_up)
            self._add_norm(result, layer.mlp_norm_D, x)
            gate_up = self._add_linear(layer.gate_up, x)
            x = self._activation("down", layer.down)
            self._add_silu(gate_up, x)
            result = self._add_linear(layer.down, x)
        x = self._activation("head", weights.head)
        self._add_norm(result, weights.norm_D, x)
        self.logits = self._add_linear(weights.head, x, rounds=False)
        self._add_choice(kernels)

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

    def run(self) -> None:
        """Enqueue one step on the current stream, without a graph."""
        cosines, sines, query_scale = self._rotary(self.positions_T)
        self._cosines.copy_(cosines)
        self._sines.copy_(sines)
        if query_scale is not None:
            self._query_scale_T.copy_(query_scale)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in self._launches:
            launch.run(stream)

    def capture(self) -> None:
        """Record a step as a graph; the state the step moves on is left as it was."""
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
            with torch.cuda.graph(graph, stream=stream):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(moved, before, strict=True):
            tensor.copy_(value)
        self._graph = graph

    def replay(self) -> None:
        """Enqueue one step through the graph."""
        assert self._graph is not None, "capture first"
        self._graph.replay()


class Prefill:
    """Prompt tokens of one sequence, from its start, through decoded layers and library products.

    "exact" multiplies NVFP4 layers in bf16 (every value is exact there), "fast" in FP8: values
    rounded to e4m3, activations rounded by each token's largest value. FP8 layers are the same in
    both. Keys and values are read as stored. One layer is decoded at a time into a scratch buffer.
    """

    def __init__(
        self,
        library: KernelLibrary,
        weights: CudaWeights,
        cache: KvCache,
        max_tokens: int,
        *,
        rotary: RotaryFunction,
        mode: PrefillMode = "exact",
        fast_accumulation: bool = False,
    ) -> None:
        self._library = library
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._mode = mode
        self._fast_accumulation = fast_accumulation
        config, device = weights.config, library.device
        self._kernels = library.elementwise(config.width, 1, _heads(config))
        self._layout = library.layout()
        self._one = torch.ones((), device=device)
        element = 2 if mode == "exact" else 1
        sizes = [
            la.weight.data.shape[0]
            * 64
            * la.weight.num_k_blocks
            * K_BLOCK[la.weight.format]
            * (element if la.weight.format == "nvfp4" else 1)
            for layer in weights.layers
            for la in _linears(layer)
        ]
        self._scratch = torch.empty(max(sizes), dtype=torch.uint8, device=device)
        self._token_scale_T = torch.ones(max_tokens, device=device)
        # Row scales with the activations' scale folded in, made once: a product a forward is slow.
        self._row_scales = {
            id(li): self._row_scale(li) for layer in weights.layers for li in _linears(layer)
        }

    def _row_scale(self, linear: CudaLinear) -> Tensor:
        if linear.weight.format == "nvfp4":
            gain = 1.0 if self._mode == "exact" else 1.0 / _FAST_GAIN
            return linear.weight.row_scale_O * gain
        return linear.weight.row_scale_O * linear.input_scale

    def _launch(
        self, kernel: Kernel, grid: tuple[int, int, int], num_threads: int, *arguments: Argument
    ) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        Launch(kernel, grid, num_threads, arguments, overlaps=False).run(stream)

    def _decoded(self, linear: CudaLinear) -> Tensor:
        """The weight as the library wants it, in the scratch buffer: (O, I) e4m3 or bf16."""
        weight = linear.weight
        row_tiles, k_blocks = weight.data.shape[:2]
        if weight.format == "nvfp4":
            exact = self._mode == "exact"
            name = "decode_nvfp4_bf16" if exact else "decode_nvfp4_e4m3"
            row_bytes = k_blocks * 128 * (2 if exact else 1)
            gain: tuple[Argument, ...] = (1.0 if exact else _FAST_GAIN,)
        else:
            name, row_bytes, gain = "untile_8bit", k_blocks * 128, ()
            exact = False
        arguments = (weight.data, self._scratch, k_blocks, ctypes.c_int64(row_bytes), *gain)
        self._launch(self._layout[name], (k_blocks, row_tiles, 1), 128, *arguments)
        rows = self._scratch[: row_tiles * 64 * row_bytes].view(row_tiles * 64, row_bytes)
        return rows.view(torch.bfloat16 if exact else torch.float8_e4m3fn)

    def _kind(self, linear: CudaLinear) -> str:
        """Suffix of the kernel that writes this linear's input."""
        if linear.weight.format == "nvfp4":
            return "bf16" if self._mode == "exact" else "e4m3_token"
        return ACTIVATION_KIND[linear.weight.format]

    def _input(self, linear: CudaLinear, num_tokens: int) -> Tensor:
        columns = linear.weight.num_k_blocks * K_BLOCK[linear.weight.format]
        dtype = torch.bfloat16 if self._kind(linear) == "bf16" else torch.float8_e4m3fn
        return torch.empty(num_tokens, columns, dtype=dtype, device=self._library.device)

    def _product(self, linear: CudaLinear, x_TI: Tensor) -> LinearResult:
        """Raw product in bf16 and the scales that the kernel after it applies."""
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
        row_bytes = x_TI.shape[1] * x_TI.element_size()
        scale = 1.0 if linear.weight.format == "nvfp4" else linear.input_scale
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
        self, index: int, layer: CudaLayer, qkv: LinearResult, num_tokens: int, slots_T: Tensor
    ) -> Tensor:
        config, device = self._weights.config, self._library.device
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
            slots_T,
            layer.k_scale,
            layer.v_scale,
            k,
            v,
        )
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            out = scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                scale=layer.k_scale / math.sqrt(size),
                enable_gqa=True,
            )
        out_TO = out[0].transpose(0, 1).reshape(num_tokens, heads * size)
        x_TI = self._input(layer.o, num_tokens)
        if layer.o.weight.format != "fp8":
            return (out_TO * layer.v_scale).to(x_TI.dtype)
        width = heads * size
        grid = (-(-width // (8 * 256)), num_tokens, 1)
        strides = self._strides(x_TI, layer.o)
        self._launch(
            self._kernels["quantize_e4m3"], grid, 256, out_TO, width, layer.v_scale, *strides
        )
        return x_TI

    def _silu(self, gate_up: LinearResult, linear: CudaLinear, num_tokens: int) -> Tensor:
        width = self._weights.config.mlp_width
        x_TI = self._input(linear, num_tokens)
        strides = self._strides(x_TI, linear)
        kind = self._kind(linear)
        if kind == "e4m3_token":
            arguments = (gate_up, width, *strides[:3], self._token_scale_T)
            self._launch(self._kernels["silu_mul_e4m3_token"], (num_tokens, 1, 1), 512, *arguments)
        else:
            grid = (-(-width // (8 * 256)), num_tokens, 1)
            self._launch(self._kernels[f"silu_mul_{kind}"], grid, 256, gate_up, width, *strides)
        return x_TI

    def run(self, token_ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """Logits (V,) f32 of the last token; keys and values of all tokens go to `slots_T`."""
        weights, config = self._weights, self._weights.config
        num_tokens = token_ids_T.shape[0]
        device = self._library.device
        self._angles = self._rotary(torch.arange(num_tokens, device=device))
        residual_TD = weights.embedding_VD[token_ids_T]
        result: LinearResult | None = None
        for index, layer in enumerate(weights.layers):
            x = self._norm(result, residual_TD, layer.attention_norm_D, layer.qkv)
            qkv = self._product(layer.qkv, x)
            x = self._attend(index, layer, qkv, num_tokens, slots_T)
            result = self._product(layer.o, x)
            x = self._norm(result, residual_TD, layer.mlp_norm_D, layer.gate_up)
            gate_up = self._product(layer.gate_up, x)
            x = self._silu(gate_up, layer.down, num_tokens)
            result = self._product(layer.down, x)
        assert result is not None
        return self._last_logits(result, residual_TD[-1:], config)

    def _last_logits(self, result: LinearResult, residual_1D: Tensor, config: TextConfig) -> Tensor:
        """The head on one row, by the streaming product."""
        del result
        y_1O = self._last[-1:, : config.width].float()
        row_scale = self._row_scales[id(self._weights.layers[-1].down)][: config.width]
        delta = y_1O * row_scale
        if self._kind(self._weights.layers[-1].down) == "e4m3_token":
            delta = delta * self._token_scale_T[self._last.shape[0] - 1]
        x = (residual_1D + delta.to(torch.bfloat16)).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
        x = (x * self._weights.norm_D.float()).to(torch.bfloat16)
        return stream_product(self._library, self._weights.head.weight, x)[0, : config.vocab_size]
