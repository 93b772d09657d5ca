"""The Attend protocol, through which a layer reaches its keys and values, and dense attention.

`engine.cache` has the paged Attend. The dense one keeps nothing between calls; calibration and
tests use it.

Shapes: T tokens (flat over sequences), N query heads, K key/value heads, H head size.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats.fp8 import round_to_fp8
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import Rotation


class Attend(Protocol):
    """Attention of one layer over whatever the implementation remembers (decision 0002)."""

    def __call__(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation
    ) -> Tensor:
        """Rotate q and k, remember k and v, attend causally; returns out_TNH.

        q, k and v may be strided views of one product (last dimension dense) and are not
        modified. q and k come before rotation, so that a kernel may rotate while it stores.
        """


class DenseAttend:
    """Causal attention within each sequence of a flat batch; nothing is kept.

    cumulative_lengths  0 and the end of each sequence in the flat batch, so (S + 1,)
    kv_scales           per layer (k, v): round keys and values to FP8 as a cache would; None
                        leaves them alone
    """

    def __init__(
        self,
        cumulative_lengths: Sequence[int],
        kv_scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self._bounds = list(itertools.pairwise(cumulative_lengths))
        self._kv_scales = kv_scales

    def __call__(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation
    ) -> Tensor:
        q_TNH, k_TKH = dispatch.rotate(q_TNH, k_TKH, rotation)
        if self._kv_scales is not None:
            k_scale, v_scale = self._kv_scales[layer]
            k_TKH = round_to_fp8(k_TKH, torch.tensor(k_scale))
            v_TKH = round_to_fp8(v_TKH, torch.tensor(v_scale))
        out_TNH = torch.empty_like(q_TNH)
        for start, stop in self._bounds:
            out_1NJH = F.scaled_dot_product_attention(
                q_TNH[start:stop].transpose(0, 1)[None],
                k_TKH[start:stop].transpose(0, 1)[None],
                v_TKH[start:stop].transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=True,
            )
            out_TNH[start:stop] = out_1NJH[0].transpose(0, 1)
        return out_TNH
