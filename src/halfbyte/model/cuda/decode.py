"""A decode step of a fixed number of rows: a list of launches, captured into one CUDA graph.

9 launches a layer, each allowed to start before the one ahead of it has finished (its weights
depend on nothing). A step ends with the logits of all rows; what becomes of them is the caller's
business (`engine.hopper`).

Shapes: T rows (one a sequence, or tokens of one: each has a context length of its own), D model
width, V vocabulary, P pages of a sequence.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.cuda.driver import Argument, Kernel, Launch, LinearResult
from halfbyte.kernels.cuda.library import (
    StreamPlan,
    attention_warps,
    choose_config,
    columns_for,
    plan_stream,
)
from halfbyte.kernels.repack import K_BLOCK, tile_activations, untile_activations
from halfbyte.model.cuda.launches import (
    Activation,
    Collective,
    CudaModel,
    attention_kind,
    attention_splits,
    count_grid,
    elementwise_kernels,
    heads_of,
    joined_input,
    kernel_scale,
)
from halfbyte.model.cuda.weights import (
    PER_TOKEN_KINDS,
    CudaLayer,
    CudaLinear,
)


def norm_blocks(columns: int) -> int:
    """Number of blocks that share a token in norms: few tokens fill a device too."""
    return 8 if columns <= 32 else 2


def silu_blocks(columns: int) -> int:
    """Number of blocks that share a token in SiLU kernels with a scale per token."""
    return 8 if columns <= 32 else 2


class DecodeStep:
    """One decode step of a fixed number of rows: static buffers, launches, a graph.

    `prepare` fills `token_ids_T`, `positions_T`, `context_lengths_T` (positions + 1), `slots_T` and
    `block_table_TP`; `run` or `replay` then leaves logits in `logits_TV`. Steps share nothing but
    weights, cache, compiled kernels and what is in `shared`.
    """

    def __init__(
        self,
        model: CudaModel,
        num_tokens: int,
        *,
        max_context_tokens: int,
        prepare: Callable[["DecodeStep"], None],
        logits_TV: Tensor,
        overlaps: bool = True,
    ) -> None:
        """Lay out the launches of a step; nothing is captured yet.

        prepare     enqueued before everything else of a step; fills the step's inputs
        logits_TV   f32, where the logits go; as wide as the head's padded output
        overlaps    each launch may start before the one ahead of it has ended
        """
        self._library, self._weights, self._cache = model.library, model.weights, model.cache
        self._rotary, self._shared, self._all_reduce = model.rotary, model.shared, model.all_reduce
        self._prepare = prepare
        self._logits_TV = logits_TV
        self._overlaps = overlaps
        self._saturation = model.saturation
        self.num_tokens = num_tokens
        self._columns = columns_for(num_tokens)
        device, config = model.library.device, model.weights.config
        max_pages = -(-max_context_tokens // model.cache.page_slots)

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids_T = integers(num_tokens)
        self.positions_T = integers(num_tokens)
        self.context_lengths_T = integers(num_tokens, dtype=torch.int32)
        self.slots_T = integers(num_tokens)
        self.is_image_T = integers(num_tokens, dtype=torch.uint8)  # read for counting alone
        self.block_table_TP = integers(num_tokens, max_pages, dtype=torch.int32)
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
        self._launches: list[Launch | Collective] = []
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
        self._num_splits = attention_splits(pairs, self._library.num_multiprocessors)
        group = config.num_heads // config.num_kv_heads
        num_workspace = pairs * self._num_splits * group * (config.head_dim + 2)
        self._workspace = self._shared.take("attention", num_workspace, torch.float32, device)
        self._counters = torch.zeros(pairs, dtype=torch.int32, device=device)
        self._activations: dict[tuple[str, int], Tensor] = {}
        # By place: a kernel may read those of one product and write those of the next.
        self._token_scales: dict[str, Tensor] = {}

    def _kernel(self, linear: CudaLinear) -> tuple[Kernel, StreamPlan]:
        format_ = linear.weight.format
        config = choose_config(format_, self._columns)
        kernel, _ = self._library.linear(format_, self._columns, config)
        return kernel, plan_stream(linear.weight, config, self._library.num_multiprocessors)

    def _plan(self, linear: CudaLinear) -> StreamPlan:
        return self._kernel(linear)[1]

    def _activation(self, name: str, linear: CudaLinear) -> Activation:
        """The input buffer of `linear`; linears of the same place and size share one."""
        weight = linear.weight
        kind = linear.activation_kind
        element = 1 if kind.startswith("e4m3") else 2
        num_bytes = weight.num_k_blocks * K_BLOCK[weight.format] * element * self._columns
        key = (name + kind, num_bytes)
        if key not in self._activations:
            data = torch.zeros(num_bytes, dtype=torch.uint8, device=self._library.device)
            self._activations[key] = data
        token_scale_T = None
        if kind in PER_TOKEN_KINDS:
            ones_T = torch.ones(self.num_tokens, device=self._library.device)
            token_scale_T = self._token_scales.setdefault(name, ones_T)
        return Activation(
            self._activations[key],
            kind,
            self._columns * 16,
            16,
            kernel_scale(linear),
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
        self, linear: CudaLinear, x: Activation, *, rounds: bool = True
    ) -> LinearResult:
        weight = linear.weight
        kernel, plan = self._kernel(linear)
        row_scale = weight.row_scale_O * linear.sums_scale
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
        if self._all_reduce is None:
            return result
        features = linear.weight.out_features
        dense = self._shared.take(
            "reduced", self.num_tokens * features, torch.float32, self._library.device
        ).view(self.num_tokens, features)
        self._gathered(linear, result, dense)
        self._launches.append(Collective(self._all_reduce, dense))
        return LinearResult(partial=dense.data_ptr(), stride=features)

    def _count(self, kind: str, x: Activation, num_features: int) -> None:
        """Launch that counts what was clipped, if anybody asks and a stored scale may clip."""
        if self._saturation is None or x.kind != "e4m3":
            return
        data, chunk_stride, token_stride, _ = x.arguments()
        counts = self._saturation.of(kind)
        where = (num_features, self.slots_T, self.is_image_T, counts)
        arguments = (data, chunk_stride, token_stride, *where)
        grid = count_grid(num_features, self.num_tokens)
        self._add(self._library.count_largest(), grid, 128, arguments)

    def _add_norm(self, result: LinearResult | None, weight_D: Tensor, x: Activation) -> None:
        config = self._weights.config
        blocks = norm_blocks(self._columns)
        kernels = elementwise_kernels(self._library, config, blocks)
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
        self, index: int, layer: CudaLayer, qkv: LinearResult, x: Activation
    ) -> None:
        config, heads = self._weights.config, heads_of(self._weights.config)
        kernels = elementwise_kernels(self._library, config, 8)
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
        )
        grid = (self.num_tokens, -(-all_heads // heads_per_block), 1)
        self._add(kernels["rotate_and_store"], grid, 256, arguments)
        num_warps = attention_warps(
            self.num_tokens * config.num_kv_heads, self._library.num_multiprocessors
        )
        kind = attention_kind(layer.o)
        attention = self._library.attention(heads, self._cache.page_slots, kind, num_warps)
        output = x
        if x.token_scale_T is not None:
            # Rows of bf16: a token is rounded behind all of its heads.
            output = self._attended()
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
            *output.arguments(),
        )
        grid = (self._num_splits, config.num_kv_heads, self.num_tokens)
        self._add(attention, grid, num_warps * 32, arguments)
        if x.token_scale_T is not None:
            blocks = norm_blocks(self._columns)
            kernel = elementwise_kernels(self._library, config, blocks)[f"quantize_{x.kind}"]
            arguments = (output.data, 1.0, *x.arguments(), x.token_scale_T)
            self._add(kernel, (blocks, self.num_tokens, 1), 256, arguments, cluster=blocks)

    def _attended(self) -> Activation:
        """Where attention leaves what is still to be rounded, a row a token."""
        width = self._weights.config.num_heads * self._weights.config.head_dim
        count, device = self.num_tokens * width, self._library.device
        data = self._shared.take("attended", count, torch.bfloat16, device)
        return Activation(data, "bf16", 16, width * 2, 1.0)

    def _add_silu(self, gate_up: LinearResult, x: Activation) -> None:
        config = self._weights.config
        kernels = elementwise_kernels(self._library, config, 8)
        if x.token_scale_T is not None:
            per_token = (gate_up, config.mlp_width, *x.arguments(), x.token_scale_T)
            blocks = silu_blocks(self._columns)
            kernel = elementwise_kernels(self._library, config, blocks)[f"silu_mul_{x.kind}"]
            self._add(kernel, (blocks, self.num_tokens, 1), 512, per_token, cluster=blocks)
            return
        grid = (-(-config.mlp_width // (8 * 256)), self.num_tokens, 1)
        arguments = (gate_up, config.mlp_width, *x.arguments(), self.num_tokens)
        self._add(kernels[f"silu_mul_{x.kind}"], grid, 256, arguments)

    def _build(self) -> None:
        weights, config = self._weights, self._weights.config
        kernels = elementwise_kernels(self._library, config, 8)
        result: LinearResult | None = None
        if weights.fuse is None:
            embed = (weights.embedding_VD, self.token_ids_T, self.residual_TD)
            self._add(kernels["embed"], (self.num_tokens, 1, 1), 256, embed)
            if self._all_reduce is not None:
                self._launches.append(Collective(self._all_reduce, self.residual_TD))
        else:
            self._joined = self._activation("fuse", weights.fuse)
            result = self._add_linear(weights.fuse, self._joined)
        for index, layer in enumerate(weights.layers):
            x = self._activation("qkv", layer.qkv)
            self._add_norm(result, layer.attention_norm_D, x)
            self._count("qkv", x, config.width)
            qkv = self._add_linear(layer.qkv, x)
            x = self._activation("o", layer.o)
            self._add_attention(index, layer, qkv, x)
            self._count("o", x, config.num_heads * config.head_dim)
            result = self._reduced(layer.o, self._add_linear(layer.o, x))
            x = self._activation("gate_up", layer.gate_up)
            self._add_norm(result, layer.mlp_norm_D, x)
            self._count("gate_up", x, config.width)
            gate_up = self._add_linear(layer.gate_up, x)
            x = self._activation("down", layer.down)
            self._add_silu(gate_up, x)
            self._count("down", x, config.mlp_width)
            result = self._reduced(layer.down, self._add_linear(layer.down, x))
        x = self._head_input = self._activation("head", weights.head)
        self._add_norm(result, weights.norm_D, x)
        self._count("head", x, config.width)
        logits = self._add_linear(weights.head, x, rounds=False)
        self._gathered(weights.head, logits, self._logits_TV)

    def read_hidden(self) -> Tensor:
        """What the head read in the last step, behind the final norm: bf16 (T, D), a copy.

        What a quantized head reads is rounded: the last residual stream is normed again for it.
        """
        if self._head_input.kind != "bf16":
            return self._normed_again()
        return untile_activations(
            self._head_input.data,
            self._columns,
            self.num_tokens,
            self._weights.config.width,
            torch.bfloat16,
        )

    def _normed_again(self) -> Tensor:
        """The final norm as a head in bf16 would read it, by the same kernel."""
        config, blocks = self._weights.config, norm_blocks(self._columns)
        hidden_TD = torch.empty_like(self.residual_TD)
        arguments = (
            LinearResult(),
            self.residual_TD,
            self._weights.norm_D,
            float(config.norm_eps),
            hidden_TD,
            ctypes.c_int64(16),
            ctypes.c_int64(config.width * 2),
            1.0,
            None,
        )
        kernel = elementwise_kernels(self._library, config, blocks)["norm_bf16"]
        grid = (blocks, self.num_tokens, 1)
        launch = Launch(kernel, grid, 256, arguments, cluster=blocks, overlaps=False)
        launch.run(torch.cuda.current_stream().cuda_stream)
        return hidden_TD

    def join(self, hidden_TD: Tensor) -> None:
        """Enqueue what a draft model starts from: its tokens' embeddings beside `hidden_TD`."""
        fuse = self._weights.fuse
        assert fuse is not None
        x_TI, scale_T = joined_input(fuse, self._weights.embedding_VD[self.token_ids_T], hidden_TD)
        if self._joined.token_scale_T is not None and scale_T is not None:
            self._joined.token_scale_T.copy_(scale_T)
        tiled = tile_activations(x_TI, self._columns).view(-1)
        self._joined.data[: tiled.numel()].copy_(tiled)
        self.residual_TD.zero_()

    def run(self) -> None:
        """Enqueue one step on the current stream, without a graph."""
        self._prepare(self)
        cosines, sines, query_scale = self._rotary(self.positions_T)
        self._cosines.copy_(cosines)
        self._sines.copy_(sines)
        if query_scale is not None:
            self._query_scale_T.copy_(query_scale)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in self._launches:
            launch.run(stream)

    def capture(self, pool: Any = None) -> None:
        """Record the step as a CUDA graph, on a stream of its own.

        pool    torch's graph memory pool, shared by graphs that never run at the same time
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph

    def replay(self) -> None:
        """Enqueue one step on the current stream through the captured graph."""
        assert self._graph is not None, "capture first"
        self._graph.replay()
