"""The keys and values that a ragged batch attends to, as every implementation takes them."""

from typing import NamedTuple

from torch import Tensor


class PagedContext(NamedTuple):
    """Stored keys and values of a layer, and which of them each query of a batch sees.

    k_cache_PZKH, v_cache_PZKH  e4m3 or bf16, read as stored
    k_scale, v_scale   multiply what an e4m3 cache holds; pass 1.0 for a bf16 cache
    block_table_SP     int32, page of each Z tokens of a sequence, in order
    context_lengths_S  int32, stored tokens of each sequence, those of this step included
    query_starts_S1    int32, rows of q that belong to sequence s: [starts[s], starts[s + 1])
    softmax_scale      multiplies q . k
    """

    k_cache_PZKH: Tensor
    v_cache_PZKH: Tensor
    k_scale: float
    v_scale: float
    block_table_SP: Tensor
    context_lengths_S: Tensor
    query_starts_S1: Tensor
    softmax_scale: float
