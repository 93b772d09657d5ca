"""Attention of a step with prompts: each chunk over its sequence's pages, and single tokens.

Shapes: T tokens, S single tokens, P pages of a sequence, N query heads, H head size.
"""

import ctypes
import math

import torch
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.kernels.cuda.library import KernelLibrary, attention_warps
from halfbyte.model.cuda.launches import (
    CHUNK_KEYS,
    CHUNK_ROWS,
    SharedBuffers,
    attention_splits,
    chunk_splits,
    chunk_tiles,
    context_bytes,
    heads_of,
    launch,
)
from halfbyte.model.cuda.prefill_batch import Chunk, Singles
from halfbyte.model.cuda.weights import CudaLayer, KvCache


class PrefillAttention:
    """Attention over the pages of every layer, with the memory that it works in."""

    def __init__(
        self,
        library: KernelLibrary,
        config: TextConfig,
        cache: KvCache,
        shared: SharedBuffers,
        *,
        max_context_tokens: int,
    ) -> None:
        """`max_context_tokens` of a sequence: their memory is taken here, not when it is needed."""
        self._library = library
        self._config = config
        self._cache = cache
        device = library.device
        num_bytes = context_bytes(max_context_tokens, config)
        self._context = shared.take("context", num_bytes, torch.uint8, device)
        self._workspace = torch.zeros(0, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def attend_chunk(
        self, index: int, layer: CudaLayer, q_TNH: Tensor, out_TNH: Tensor, chunk: Chunk
    ) -> None:
        """Attention of a chunk over its sequence's pages, without v_scale."""
        config, library = self._config, self._library
        size, kv_heads = config.head_dim, config.num_kv_heads
        num_keys = chunk.start + chunk.num_rows
        num_tiles = chunk_tiles(chunk.num_rows, config.num_heads // kv_heads)
        pairs = num_tiles * kv_heads
        num_splits = chunk_splits(pairs, num_keys, library.num_multiprocessors)
        self._make_room(pairs * num_splits * CHUNK_ROWS * (size + 2), pairs)
        context = self._context
        if context.numel() < context_bytes(num_keys, config):
            context = torch.empty(
                context_bytes(num_keys, config), dtype=torch.uint8, device=library.device
            )
        kernels = library.chunk_attention(heads_of(config), self._cache.page_slots)
        launch(
            kernels["lay_out_context"],
            (-(-num_keys // CHUNK_KEYS), kv_heads, 2),
            128,
            self._cache.keys[index],
            self._cache.values[index],
            chunk.pages_P,
            num_keys,
            context,
        )
        launch(
            kernels["chunk_attention"],
            (num_tiles, kv_heads, num_splits),
            384,
            q_TNH,
            context,
            chunk.start,
            chunk.num_rows,
            layer.k_scale * math.log2(math.e) / math.sqrt(size),
            self._workspace,
            self._counters,
            out_TNH,
        )

    def _make_room(self, num_workspace: int, num_counters: int) -> None:
        """Memory where blocks that share a context merge; the counters are zero between kernels."""
        device = self._library.device
        if self._workspace.numel() < num_workspace:
            self._workspace = torch.zeros(num_workspace, device=device)
        if self._counters.numel() < num_counters:
            self._counters = torch.zeros(num_counters, dtype=torch.int32, device=device)

    def attend_singles(
        self, index: int, layer: CudaLayer, q: Tensor, out: Tensor, singles: Singles
    ) -> None:
        config, library = self._config, self._library
        size, kv_heads = config.head_dim, config.num_kv_heads
        num_sequences = singles.context_lengths_S.shape[0]
        pairs = num_sequences * kv_heads
        num_splits = attention_splits(pairs, library.num_multiprocessors)
        group = config.num_heads // kv_heads
        num_workspace = pairs * num_splits * group * (size + 2)
        self._make_room(num_workspace, pairs)
        num_warps = attention_warps(pairs, library.num_multiprocessors)
        heads = heads_of(config)
        launch(
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
