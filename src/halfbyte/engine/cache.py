"""The paged KV cache and attention over it.

K and V are stored in the format that the checkpoint names and always read as stored, the tokens of
the same step included (decision 0012). Which page belongs to whom is decided in `blocks` and
`scheduler`; here are the tensors.

Shapes: P pages, Z slots in a page, K key/value heads, H head size, T tokens of a step,
S sequences of a step, N query heads, L layers.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import Rotation
from halfbyte.kernels.paged import PagedContext
from halfbyte.modules import CacheFormat

# A cache of so little is taken up at once: memory that a server holds in its first minutes is then
# what it holds later, and no answer waits for a page.
_TAKEN_AT_ONCE_BYTES = 128 * 2**20

DTYPES: dict[CacheFormat, torch.dtype] = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def bytes_per_token(config: TextConfig, format: CacheFormat) -> int:
    """Bytes that K and V of one position take in all layers together."""
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return values * DTYPES[format].itemsize


class PagedCache:
    """K and V of all layers: for each layer a pair (P, Z, K, H).

    kv_scales  per layer (k, v); what an FP8 cache is divided by when written. Ignored for bf16
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        format: CacheFormat,
        num_pages: int,
        block_tokens: int,
        kv_scales: Sequence[tuple[float, float]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.format = format
        self.num_pages = num_pages
        self.block_tokens = block_tokens
        self.softmax_scale = config.head_dim**-0.5
        self.scales = [(1.0, 1.0)] * config.num_layers if format == "bf16" else list(kv_scales)
        shape = (num_pages, block_tokens, config.num_kv_heads, config.head_dim)
        num_bytes = num_pages * block_tokens * bytes_per_token(config, format)
        at_once = num_bytes <= _TAKEN_AT_ONCE_BYTES

        def zeros() -> Tensor:
            return _zeros(shape, DTYPES[format], device, at_once=at_once)

        self.layers = [(zeros(), zeros()) for _ in range(config.num_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def _zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *, at_once: bool
) -> Tensor:
    """Zeros, because a kernel may load (and mask) slots that were never written.

    at_once  on a CPU: take the memory now, not when it is written
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu":
        # The system's zero pages, which become memory when touched; torch would write all of them
        # now. numpy would ask for huge ones, and an answer that is first to touch one waits for it:
        # up to 40 ms on a virtual machine.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if at_once:
            private |= getattr(mmap, "MAP_POPULATE", 0)
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=private)
        flat = torch.from_numpy(np.frombuffer(pages, dtype=np.uint8)[:num_bytes])
    else:
        flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return flat.view(dtype).view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttend:
    """Attention of one step (model.attention.Attend): stores its K and V, then attends to pages.

    slots_T            int64, page * Z + offset of each of the step's tokens
    block_table_SP     int32, pages of each sequence in order
    context_lengths_S  int32, tokens of each sequence, those of this step included
    query_starts_S1    int32, the step's tokens of sequence s are [starts[s], starts[s + 1])

    Example, Z=4: A prefills tokens 0-2 into page 7, B decodes its sixth token into page 5:
      slots [28 29 30 21], block_table [[7 0] [2 5]], context_lengths [3 6], query_starts [0 3 4].
    """

    cache: PagedCache
    slots_T: Tensor
    block_table_SP: Tensor
    context_lengths_S: Tensor
    query_starts_S1: Tensor

    def __call__(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation
    ) -> Tensor:
        q_TNH = self.store(layer, q_TNH, k_TKH, v_TKH, rotation, slice(None))
        return dispatch.paged_attention(q_TNH, self._context(layer))

    def store(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rotation: Rotation,
        rows: slice,
    ) -> Tensor:
        """Rotate some of the step's rows and write K and V to pages; returns rotated q_TNH."""
        k_cache_PZKH, v_cache_PZKH = self.cache.layers[layer]
        k_scale, v_scale = self.cache.scales[layer]
        q_TNH, k_TKH = dispatch.rotate(q_TNH, k_TKH, rotation)
        slots_T = self.slots_T[rows]
        dispatch.store_kv(k_TKH, v_TKH, k_cache_PZKH, v_cache_PZKH, slots_T, k_scale, v_scale)
        return q_TNH

    def attend_spans(self, layer: int, q_TNH: Tensor, spans: range, totals: Tensor) -> Tensor:
        """Compute a part of attention once all rows are stored; see `dispatch.attend_spans`."""
        return dispatch.attend_spans(q_TNH, self._context(layer), spans, totals)

    def _context(self, layer: int) -> PagedContext:
        return PagedContext(
            *self.cache.layers[layer],
            *self.cache.scales[layer],
            self.block_table_SP,
            self.context_lengths_S,
            self.query_starts_S1,
            self.cache.softmax_scale,
        )
