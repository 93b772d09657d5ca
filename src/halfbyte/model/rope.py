"""Rotary embedding: YaRN frequencies, attention factor, position-dependent query scale.

Angles are taken in float64, because an f32 angle at position 262143 is off by up to 0.016 rad; the
cosines are then rounded to f32. The rotation itself is an op (`kernels.dispatch.rotate`).

Shapes: T tokens, H2 half a head.
Sources: Peng et al., YaRN, arXiv 2309.00071, sections 3.2 and 3.4; `transformers`
(`_compute_yarn_parameters`, Ministral3 `get_llama_4_attn_scale`) for what absent and zero
parameters mean.
"""

import math

import numpy as np
import torch
from torch import Tensor

from halfbyte.config import RopeConfig, TextConfig
from halfbyte.kernels.dispatch import Rotation as Rotation


def _dimension_of(rotations: float, rope: RopeConfig, head_dim: int) -> float:
    """Index of the frequency that turns `rotations` times within the original context."""
    turns = rope.original_max_positions / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, in radians, float64 (H2,).

    YaRN keeps the fast half as it is, divides the slow ones by `factor`, and blends linearly
    between the dimensions that turn `beta_fast` and `beta_slow` times in the original context.
    """
    pairs = head_dim // 2
    index = torch.arange(pairs, dtype=torch.float64)
    plain = rope.theta ** (-2.0 * index / head_dim)
    if rope.kind == "default":
        return plain
    low = max(math.floor(_dimension_of(rope.beta_fast, rope, head_dim)), 0)
    high = min(math.ceil(_dimension_of(rope.beta_slow, rope, head_dim)), head_dim - 1)
    width = high - low if high != low else 0.001  # a step instead of a division by zero
    interpolated = ((index - low) / width).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


class RotaryTable:
    """Angles of any position; stateless but for the frequencies, which live on one device."""

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        self._rope = config.rope
        self._frequencies_H2 = frequencies(config.rope, config.head_dim).to(device)
        self._factor = config.rope.attention_factor

    def at(self, positions_T: Tensor) -> Rotation:
        """The rotation of tokens at these positions (int64, on the table's device)."""
        angles_TH2 = positions_T.double()[:, None] * self._frequencies_H2
        if angles_TH2.device.type == "cpu":
            # torch asks its threads even for a few, and they spin on in the kernels' way.
            angles = angles_TH2.numpy()
            cos_TH2, sin_TH2 = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
        else:
            cos_TH2, sin_TH2 = angles_TH2.cos(), angles_TH2.sin()
        factor = self._factor
        query_scale_T = self._query_scale(positions_T)
        return Rotation((cos_TH2 * factor).float(), (sin_TH2 * factor).float(), query_scale_T)

    def _query_scale(self, positions_T: Tensor) -> Tensor | None:
        beta, length = self._rope.llama_4_scaling_beta, self._rope.original_max_positions
        if beta == 0 or length == 0:
            return None
        periods_T = torch.div(positions_T, length, rounding_mode="floor").double()
        return (1 + beta * torch.log1p(periods_T)).float()
