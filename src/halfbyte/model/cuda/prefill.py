"""Many tokens at once through every layer: prompts, and single tokens beside them.

Shapes: T tokens, D model width, C tokens of a sequence as far as a chunk reaches, P pages of a
sequence, Z slots in a page, N query heads, K key/value heads, H head size, R rows.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.cuda.driver import Argument, LinearResult
from halfbyte.kernels.cuda.library import (
    make_prefill_room,
    prefill_tiles,
)
from halfbyte.kernels.cuda.ops import prefill_launches
from halfbyte.kernels.repack import (
    K_BLOCK,
    TileFormat,
)
from halfbyte.model.cuda.launches import (
    CudaModel,
    count_grid,
    elementwise_kernels,
    joined_input,
    kernel_scale,
    launch,
)
from halfbyte.model.cuda.prefill_attention import PrefillAttention
from halfbyte.model.cuda.prefill_batch import Angles, PrefillBatch, Rows
from halfbyte.model.cuda.weights import (
    PER_TOKEN_KINDS,
    CudaLayer,
    CudaLinear,
)

# Prompts of more tokens multiply faster through the library, by some per cent at 8192 (measured).
DECODED_TOKENS = 2048
# FP8 weights of more tokens are worth laying out for the library.
TILED_FP8_TOKENS = 1024
# Steps of these sizes, and of fewer rows by less than a step between them, run from graphs.
GRAPH_STEP = 128
GRAPH_SIZES = tuple(range(GRAPH_STEP, TILED_FP8_TOKENS + 1, GRAPH_STEP))
# Rows of a prefill that are normed at once.
_NORM_ROWS = 1024


class Prefill:
    """Runs many tokens at once through every layer of a decoder.

    NVFP4 layers multiply in fp16, where every value is exact, or in FP8 (`CudaWeights.mode`), as a
    decode step does. Keys and values are read as stored. NVFP4 is decoded in registers (prefill.cu)
    or, "nvfp4_fast" in batches of more than DECODED_TOKENS, read a layer at a time from a scratch
    buffer through the library; `decoded_formats` names those that registers always take, and no
    others. FP8 and bf16 go through the library.
    """

    def __init__(
        self,
        model: CudaModel,
        max_tokens: int,
        *,
        fast_accumulation: bool = False,
        decoded_formats: frozenset[TileFormat] | None = None,
        max_context_tokens: int = 0,
    ) -> None:
        """Take the model's shared buffers for what is only needed within a forward.

        max_context_tokens  of a sequence: memory for its attention is taken here, not when needed
        """
        library, weights, cache, shared = model.library, model.weights, model.cache, model.shared
        self._library, self._weights, self._cache = library, weights, cache
        self._rotary, self._all_reduce = model.rotary, model.all_reduce
        self._decoded_formats = decoded_formats
        self._num_tokens = max_tokens  # of the batch at work
        self._max_tokens = max_tokens
        self._fast_accumulation = fast_accumulation
        config, device = weights.config, library.device
        self._kernels = elementwise_kernels(library, config, 1)
        self._layout = library.layout()
        self._one = torch.ones((), device=device)
        self._epsilon = config.norm_eps
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
        self._scratch = shared.take("decoded", max(sizes, default=0), torch.uint8, device)
        self._attention = PrefillAttention(
            library, config, cache, shared, max_context_tokens=max_context_tokens
        )
        self._room = make_prefill_room(library.num_multiprocessors, device)
        most = max(max_tokens, *GRAPH_SIZES)
        self._token_scale_T = torch.ones(most, device=device)
        self._saturation = model.saturation
        self._is_image_T = torch.zeros(most, dtype=torch.uint8, device=device)
        self._slots_T: Tensor | None = None  # of the rows at work
        # By size, a graph for what precedes each layer's attention, and one for the rest.
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self._static: Rows | None = None
        self._last: Tensor | None = None
        # Row scales with the activations' scale folded in, made once: a product a forward is slow.
        self._row_scales = {id(linear): self._row_scale(linear) for linear in products}

    def _row_scale(self, linear: CudaLinear) -> Tensor:
        # bf16 activations are not divided, whatever the format.
        scale = 1.0 if self._kind(linear) == "bf16" else linear.sums_scale
        return linear.weight.row_scale_O * scale

    def _is_decoded(self, linear: CudaLinear) -> bool:
        """Whether its weights are decoded inside the product."""
        format_ = linear.weight.format
        if self._decoded_formats is not None:
            return format_ in self._decoded_formats
        if format_ == "fp8":
            # A draft model's first product reads rows that torch has put together.
            is_fuse = linear is self._weights.fuse
            return not is_fuse and self._num_tokens <= TILED_FP8_TOKENS
        few = self._num_tokens <= DECODED_TOKENS
        return format_ == "nvfp4" or (format_ == "nvfp4_fast" and few)

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
        grid = (k_blocks, row_tiles, 1)
        launch(self._layout[name], grid, 128, *arguments, overlaps=False)
        rows = self._scratch[: row_tiles * 64 * row_bytes].view(row_tiles * 64, row_bytes)
        return rows.view(torch.bfloat16 if is_bf16 else torch.float8_e4m3fn)

    def _kind(self, linear: CudaLinear) -> str:
        """Suffix of the kernel that writes this linear's input."""
        format_ = linear.weight.format
        if not self._is_decoded(linear):
            plain: dict[TileFormat, str] = {"nvfp4": "bf16", "nvfp4_fast": "e4m3_token"}
            return plain.get(format_, linear.activation_kind)
        return linear.activation_kind

    def _is_per_token(self, linear: CudaLinear) -> bool:
        return self._kind(linear) in PER_TOKEN_KINDS

    def _input(self, linear: CudaLinear, num_tokens: int) -> Tensor:
        """Room for a linear's input: (T, I), or in 16-byte chunks (I / chunk, T padded, 16)."""
        weight = linear.weight
        columns = weight.num_k_blocks * K_BLOCK[weight.format]
        if self._is_decoded(linear):
            per_chunk = 8 if weight.format == "nvfp4" else 16
            shape = (columns // per_chunk, sum(prefill_tiles(num_tokens)), 16)
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
        stream = torch.cuda.current_stream().cuda_stream
        row_scale_O = self._row_scales[id(linear)]
        for product in prefill_launches(
            self._library, linear.weight, x_chunks, row_scale_O, y_TO, self._room, overlaps=True
        ):
            product.run(stream)
        self._last = y_TO
        per_token = self._is_per_token(linear)
        return LinearResult(
            out=y_TO.data_ptr(),
            token_scale=self._token_scale_T.data_ptr() if per_token else None,
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
        per_token = self._is_per_token(linear)
        return LinearResult(
            out=y_TO.data_ptr(),
            row_scale=self._row_scales[id(linear)].data_ptr(),
            token_scale=self._token_scale_T.data_ptr() if per_token else None,
            stride=y_TO.shape[1],
        )

    def _strides(self, x_TI: Tensor, linear: CudaLinear) -> tuple[Argument, ...]:
        if self._is_decoded(linear):
            chunk_stride = ctypes.c_int64(x_TI.shape[1] * 16)
            return x_TI, chunk_stride, ctypes.c_int64(16), kernel_scale(linear)
        row_bytes = x_TI.shape[1] * x_TI.element_size()
        scale = kernel_scale(linear) if self._kind(linear) == "e4m3" else 1.0
        return x_TI, ctypes.c_int64(16), ctypes.c_int64(row_bytes), scale

    def _count(self, kind: str, linear: CudaLinear, x_TI: Tensor, num_tokens: int) -> None:
        """Count what was clipped, if anybody asks and a stored scale may clip."""
        if self._saturation is None or self._kind(linear) != "e4m3":
            return
        data, chunk_stride, token_stride, _ = self._strides(x_TI, linear)
        features = linear.weight.in_features
        where = (features, self._slots_T, self._is_image_T, self._saturation.of(kind))
        grid = count_grid(features, num_tokens)
        kernel = self._library.count_largest()
        launch(kernel, grid, 128, data, chunk_stride, token_stride, *where)

    def _norm(
        self, result: LinearResult | None, residual_TD: Tensor, weight_D: Tensor, linear: CudaLinear
    ) -> Tensor:
        num_tokens = residual_TD.shape[0]
        x_TI = self._input(linear, num_tokens)
        name = f"{'norm' if result is None else 'add_norm'}_{self._kind(linear)}"
        launch(
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

    def _attend(self, index: int, layer: CudaLayer, rows: Rows, batch: PrefillBatch) -> None:
        """Attention of every row, without v_scale, to where the output product reads it."""
        q_TNH, out_TNH = rows.q_TNH, rows.out_TNH
        if batch.singles is not None:
            self._attention.attend_singles(index, layer, q_TNH, out_TNH, batch.singles)
        for chunk in batch.chunks:
            part = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            self._attention.attend_chunk(index, layer, q_TNH[part], out_TNH[part], chunk)

    def _attention_output(self, layer: CudaLayer, out_TO: Tensor) -> Tensor:
        """Attention's output times v_scale, as the output product reads it."""
        num_tokens, width = out_TO.shape
        x_TI, kind = self._input(layer.o, num_tokens), self._kind(layer.o)
        if kind == "bf16":
            x_TI[:, :width] = out_TO * layer.v_scale
            return x_TI
        kernel, strides = self._kernels[f"quantize_{kind}"], self._strides(x_TI, layer.o)
        if self._is_per_token(layer.o):
            per_token = (out_TO, layer.v_scale, *strides, self._token_scale_T)
            launch(kernel, (1, num_tokens, 1), 512, *per_token)
        else:
            grid = (-(-width // (8 * 256)), num_tokens, 1)
            launch(kernel, grid, 256, out_TO, width, layer.v_scale, *strides)
        return x_TI

    def _silu(self, gate_up: LinearResult, linear: CudaLinear, num_tokens: int) -> Tensor:
        width = self._weights.config.mlp_width
        x_TI = self._input(linear, num_tokens)
        strides = self._strides(x_TI, linear)
        kind = self._kind(linear)
        if kind in PER_TOKEN_KINDS:
            arguments = (gate_up, width, *strides, self._token_scale_T)
            launch(self._kernels[f"silu_mul_{kind}"], (1, num_tokens, 1), 512, *arguments)
        else:
            grid = (-(-width // 256), -(-num_tokens // 8), 1)
            by_rows = (gate_up, width, *strides, num_tokens)
            launch(self._kernels[f"silu_mul_{kind}"], grid, 256, *by_rows)
        return x_TI

    def forward(self, batch: PrefillBatch) -> Tensor:
        """Run a batch; returns the residual stream after the last layer, (T, D) bf16.

        All but attention comes from graphs where some of this size are captured (`capture`).
        """
        weights = self._weights
        residual_TD = weights.embedding_VD[batch.token_ids_T]
        if batch.image_rows_I is not None:
            if batch.image_vectors_ID is not None:
                residual_TD[batch.image_rows_I] = batch.image_vectors_ID.to(torch.bfloat16)
            else:
                residual_TD[batch.image_rows_I] = 0
        if self._all_reduce is not None:
            self._all_reduce(residual_TD)
        num_tokens = residual_TD.shape[0]
        if self._saturation is not None:
            self._is_image_T.zero_()
            if batch.image_rows_I is not None:
                self._is_image_T[batch.image_rows_I] = 1
        angles = self._rotary(batch.positions_T)
        size = min((size for size in self._graphs if size >= num_tokens), default=0)
        if size - num_tokens not in range(GRAPH_STEP):
            return self._run_eagerly(batch, self._new_rows(residual_TD, batch.slots_T, angles))
        assert self._static is not None
        rows = self._static.first(size)
        rows.put(residual_TD, batch.slots_T, angles)
        for index, layer in enumerate(weights.layers):
            self._graphs[size][index].replay()
            self._attend(index, layer, rows, batch)
        self._graphs[size][-1].replay()
        return rows.residual_TD[:num_tokens]

    def _run_eagerly(self, batch: PrefillBatch, rows: Rows) -> Tensor:
        weights = self._weights
        num_tokens = self._num_tokens = len(rows.residual_TD)
        self._slots_T = rows.slots_T
        result: LinearResult | None = None
        if weights.fuse is not None:
            assert batch.hidden_TD is not None
            joined_TI, scale_T = joined_input(weights.fuse, rows.residual_TD, batch.hidden_TD)
            if scale_T is not None:
                self._token_scale_T[:num_tokens] = scale_T
            x = self._input(weights.fuse, num_tokens)
            x[:, : joined_TI.shape[1]] = joined_TI
            result = self._product(weights.fuse, x, num_tokens)
            rows.residual_TD.zero_()
        for index, layer in enumerate(weights.layers):
            self._enter(index, result, rows)
            self._attend(index, layer, rows, batch)
            result = self._leave(index, rows)
        return self._conclude(result, rows)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], pool: Any) -> None:
        """Record steps of so many rows as graphs, one from each layer's attention to the next's.

        Sizes that no step needs are left out. Launched one by one, a step's thousand kernels would
        wait for a busy host.

        pool  torch's graph memory pool, shared by graphs that never run at the same time
        """
        device, config = self._library.device, self._weights.config
        sizes = [size for size in sizes if size - GRAPH_STEP < self._max_tokens]
        largest = max(sizes)
        no_slots_T = torch.full((largest,), -1, dtype=torch.int64, device=device)
        residual_TD = torch.zeros(largest, config.width, dtype=torch.bfloat16, device=device)
        angles = self._rotary(torch.zeros_like(no_slots_T))
        self._static = self._new_rows(residual_TD, no_slots_T, angles)
        self._static.out_TNH.zero_()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in (largest, min(sizes)):  # load every kernel: nothing may while capturing
                self._num_tokens = size
                for index in range(config.num_layers + 1):
                    self._segment(index, self._static.first(size))
            for size in sorted(sizes, reverse=True):
                rows = self._static.first(size)
                self._num_tokens = size
                graphs = []
                for index in range(config.num_layers + 1):
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool)
                    self._segment(index, rows)
                    graph.capture_end()
                    graphs.append(graph)
                self._graphs[size] = graphs
        torch.cuda.current_stream().wait_stream(stream)

    def release(self) -> None:
        """Drop the captured graphs and the memory that they hold."""
        self._graphs.clear()

    def _segment(self, index: int, rows: Rows) -> None:
        """What lies between the attention of the layer before and that of layer `index`."""
        self._slots_T = rows.slots_T
        result = None if index == 0 else self._leave(index - 1, rows)
        if index < len(self._weights.layers):
            self._enter(index, result, rows)
        else:
            rows.residual_TD.copy_(self._conclude(result, rows))
        self._last = None

    def _new_rows(self, residual_TD: Tensor, slots_T: Tensor, angles: Angles) -> Rows:
        config = self._weights.config
        shape = (len(residual_TD), config.num_heads, config.head_dim)
        q_TNH = torch.empty(shape, dtype=torch.bfloat16, device=residual_TD.device)
        return Rows(residual_TD, slots_T, *angles, q_TNH, torch.empty_like(q_TNH))

    def _enter(self, index: int, result: LinearResult | None, rows: Rows) -> None:
        """A layer up to its attention: queries into `rows`, keys and values into the cache."""
        config, layer = self._weights.config, self._weights.layers[index]
        num_tokens, size = len(rows.residual_TD), config.head_dim
        x = self._norm(result, rows.residual_TD, layer.attention_norm_D, layer.qkv)
        self._count("qkv", layer.qkv, x, num_tokens)
        qkv = self._product(layer.qkv, x, num_tokens)
        num_heads = config.num_heads + 2 * config.num_kv_heads
        launch(
            self._kernels["rotate_and_store"],
            (num_tokens, -(-num_heads // (256 // (size // 16))), 1),
            256,
            qkv,
            rows.cos_TH2,
            rows.sin_TH2,
            rows.query_scale_T,
            rows.q_TNH,
            self._cache.keys[index],
            self._cache.values[index],
            rows.slots_T,
            layer.k_scale,
            layer.v_scale,
        )

    def _leave(self, index: int, rows: Rows) -> LinearResult:
        """The rest of a layer: what is still to be added to the residual stream."""
        layer, num_tokens = self._weights.layers[index], len(rows.residual_TD)
        x = self._attention_output(layer, rows.out_TNH.reshape(num_tokens, -1))
        self._count("o", layer.o, x, num_tokens)
        result = self._reduced(layer.o, self._product(layer.o, x, num_tokens))
        x = self._norm(result, rows.residual_TD, layer.mlp_norm_D, layer.gate_up)
        self._count("gate_up", layer.gate_up, x, num_tokens)
        gate_up = self._product(layer.gate_up, x, num_tokens)
        x = self._silu(gate_up, layer.down, num_tokens)
        self._count("down", layer.down, x, num_tokens)
        return self._reduced(layer.down, self._product(layer.down, x, num_tokens))

    def _conclude(self, result: LinearResult | None, rows: Rows) -> Tensor:
        assert result is not None
        return rows.residual_TD + self._scaled(self._weights.layers[-1].down, result)

    def _scaled(self, linear: CudaLinear, result: LinearResult) -> Tensor:
        """The last product with its scales applied, rounded to bf16: (T, D)."""
        width = self._weights.config.width
        assert self._last is not None
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
