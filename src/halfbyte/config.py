"""Frozen dataclasses of the architecture: text, vision, rope. No torch, no files.

`checkpoint.metadata` fills them from config.json or params.json; everything else reads them.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of the decoder: frequencies, YaRN, and the query scale.

    `factor`, `beta_*` and `mscale*` mean something for kind "yarn" only. The attention factor of
    YaRN is 1 + 0.1 ln(factor) scaled by `mscale` over the same with `mscale_all_dim` (a zero
    `mscale_all_dim` divides by 1). `llama_4_scaling_beta` is the slope of the position-dependent
    query scale 1 + beta ln(1 + floor(position / original_max_positions)); 0 switches it off.
    """

    theta: float
    kind: Literal["default", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    llama_4_scaling_beta: float = 0.0

    @property
    def attention_factor(self) -> float:
        """What YaRN multiplies cosines and sines by (so scores by its square); 1 without YaRN.

        It is 1 for factors up to 1, too. Source: YaRN (arXiv 2309.00071), section 3.4, with the two
        mscale knobs of DeepSeek-V2.
        """
        if self.kind != "yarn" or self.factor <= 1:
            return 1.0
        log = 0.1 * math.log(self.factor)
        return (1 + self.mscale * log) / (1 + self.mscale_all_dim * log)


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The dense decoder (Ministral3): grouped-query attention, SiLU-gated MLP, RMSNorm."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    norm_eps: float
    max_positions: int
    rope: RopeConfig
    tied_head: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The Pixtral encoder and the projector behind it.

    has_merger   a norm and a product that joins squares of patches stand before the projector;
                 without them (Pixtral Large, LLaVA's classes) each patch goes through it alone
    """

    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    patch_size: int
    image_size: int
    num_channels: int
    rope_theta: float
    norm_eps: float
    activation: Literal["silu", "gelu"]
    spatial_merge_size: int
    projector_activation: Literal["gelu", "silu"]
    projector_bias: bool
    image_token_id: int
    # Index of the encoder layer whose output is used; -1 is the last.
    feature_layer: int
    has_merger: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model; `vision` is None for text-only checkpoints."""

    text: TextConfig
    vision: VisionConfig | None
