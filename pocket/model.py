"""The model for training: plain functions over a mapping of canonical tensor names.

The same architecture that `halfbyte.model` serves, in float32 weights that are rounded to the
working dtype where they are used. Sequences lie flat, one behind another, and never see each other.
Tests hold it to `transformers` and to the engine's decoder on the exported checkpoint.

Shapes: T tokens, P patches, M merged patches, D width, N query heads, K key/value heads, H head
size, H2 = H / 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.model.rope import RotaryTable
from pocket.vocabulary import MAX_IMAGE_SIDE, VOCAB_SIZE

Weights = Mapping[str, Tensor]
# (q, k, v, bounds, longest, causal) -> what was attended to
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


def pocket_config(
    *,
    layers: int = 12,
    width: int = 384,
    mlp_width: int = 768,
    vision_layers: int = 4,
    vision_width: int = 256,
) -> ModelConfig:
    """The architecture; other sizes are for trials and tests. Widths are multiples of 128."""
    heads = width // 64
    text = TextConfig(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=2 if heads % 2 == 0 else 1,
        head_dim=64,
        mlp_width=mlp_width,
        vocab_size=VOCAB_SIZE,
        norm_eps=1e-5,
        max_positions=32768,
        rope=RopeConfig(
            theta=1e6,
            kind="yarn",
            factor=16.0,
            original_max_positions=2048,
            beta_fast=32.0,
            beta_slow=1.0,
            llama_4_scaling_beta=0.1,
        ),
        tied_head=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=11,
    )
    vision = VisionConfig(
        num_layers=vision_layers,
        width=vision_width,
        num_heads=vision_width // 64,
        head_dim=64,
        mlp_width=2 * vision_width,
        patch_size=14,
        image_size=MAX_IMAGE_SIDE,
        num_channels=3,
        rope_theta=10000.0,
        norm_eps=1e-5,
        activation="silu",
        spatial_merge_size=2,
        projector_activation="gelu",
        projector_bias=False,
        image_token_id=10,
        feature_layer=-1,
    )
    return ModelConfig(text, vision)


def initial_weights(
    config: ModelConfig, seed: int, device: torch.device | str
) -> dict[str, Tensor]:
    """float32 weights: norms one, linears by their fan-in, those that end a block near zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, expected in expected_tensors(config, unquantized(config)).items():
        if "norm" in name:
            values = torch.ones(expected.shape)
        else:
            values = torch.randn(expected.shape, generator=generator)
            spread = 0.02 if name == "embedding.weight" else values[0].numel() ** -0.5
            ends_block = name.endswith(("attention.o.weight", "mlp.down.weight"))
            values *= (
                spread * (0.1 if ends_block else 1.0) * (0.5 if name == "head.weight" else 1.0)
            )
        weights[name] = values.to(device)
    return weights


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A batch on the device; what `packs.Batch` says, with the longest lengths as plain numbers."""

    tokens_T: Tensor
    positions_T: Tensor
    image_index_T: Tensor
    token_bounds: Tensor
    patches_PC: Tensor
    grid_P2: Tensor
    patch_bounds: Tensor
    longest_document: int
    longest_image: int


def attend_flash(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: Tensor, longest: int, causal: bool
) -> Tensor:
    """Attention within each sequence by FlashAttention (a GPU)."""
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q_TNH, k_TKH, v_TKH, bounds, bounds, longest, longest, window_size=window)  # type: ignore[return-value]


def attend_flash_repeated(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: Tensor, longest: int, causal: bool
) -> Tensor:
    """The same with keys and values repeated for the heads that share them."""
    times = q_TNH.shape[1] // k_TKH.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k_TKH, v_TKH))
    return attend_flash(q_TNH, k, v, bounds, longest, causal)


def attend_one_by_one(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: Tensor, longest: int, causal: bool
) -> Tensor:
    """The plain definition: one sequence after another."""
    out = torch.zeros_like(q_TNH)
    times = q_TNH.shape[1] // k_TKH.shape[1]
    pieces = []
    edges = bounds.tolist()
    for start, end in pairwise(edges):
        if end == start:
            continue
        q = q_TNH[start:end].transpose(0, 1)[None]
        k, v = (
            x[start:end].repeat_interleave(times, 1).transpose(0, 1)[None] for x in (k_TKH, v_TKH)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        pieces.append(found[0].transpose(0, 1))
    tail = out[edges[-1] :]
    return torch.cat([*pieces, tail])


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The vectors of `x` over the root of their mean square, times a weight, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(x.dtype)


def _rotate(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor) -> Tensor:
    first, second = x_TNH.float().chunk(2, dim=-1)
    cos, sin = cos_TH2[:, None], sin_TH2[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_TNH.dtype)


def block(
    x_TD: Tensor,
    weights: tuple[Tensor, ...],
    cos_TH2: Tensor,
    sin_TH2: Tensor,
    scale_T: Tensor | None,
    bounds: Tensor,
    longest: int,
    *,
    attend: Attend,
    causal: bool,
    eps: float,
) -> Tensor:
    """One layer of the decoder or of the tower; `weights` in the order of `BLOCK`."""
    norm1, q, k, v, o, norm2, gate, up, down = weights
    dtype = x_TD.dtype
    normed = rms_norm(x_TD, norm1, eps)
    heads = [F.linear(normed, w.to(dtype)).view(len(normed), -1, 64) for w in (q, k, v)]
    q_TNH, k_TKH = (_rotate(x, cos_TH2, sin_TH2) for x in heads[:2])
    if scale_T is not None:
        q_TNH = (q_TNH * scale_T[:, None, None]).to(dtype)
    attended = attend(q_TNH, k_TKH, heads[2], bounds, longest, causal)
    x_TD = x_TD + F.linear(attended.flatten(1), o.to(dtype))
    normed = rms_norm(x_TD, norm2, eps)
    hidden = F.silu(F.linear(normed, gate.to(dtype))) * F.linear(normed, up.to(dtype))
    return x_TD + F.linear(hidden, down.to(dtype))


BLOCK = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o",
    "mlp_norm", "mlp.gate", "mlp.up", "mlp.down",
)  # fmt: skip
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Model:
    """Computes with weights that are handed in; holds the architecture and the kernels to use."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str,
        *,
        attend: Attend,
        dtype: torch.dtype,
        compiled: bool,
    ) -> None:
        assert config.vision is not None
        self.config, self.vision, self.dtype = config, config.vision, dtype
        self._rotary = RotaryTable(config.text, device)
        pixels = [torch.tensor(x, device=device).repeat_interleave(196) for x in (MEAN, STD)]
        self._mean_C, self._std_C = pixels
        text_eps, tower_eps = config.text.norm_eps, self.vision.norm_eps

        def text(*args: Any) -> Tensor:
            return block(*args, attend=attend, causal=True, eps=text_eps)

        def tower(*args: Any) -> Tensor:
            return block(*args, attend=attend, causal=False, eps=tower_eps)

        self._text = torch.compile(text, dynamic=False) if compiled else text
        self._tower = torch.compile(tower, dynamic=False) if compiled else tower

    def hidden(self, weights: Weights, inputs: Inputs) -> Tensor:
        """The decoder's last hidden states, normed: (T, D)."""
        x_TD = self.embed(weights, inputs)
        return self.decode(weights, x_TD, inputs, num_layers=self.config.text.num_layers)

    def embed(self, weights: Weights, inputs: Inputs) -> Tensor:
        """What the decoder reads, of tokens and of pictures: (T, D)."""
        x_TD = F.embedding(inputs.tokens_T, weights["embedding.weight"]).to(self.dtype)
        vectors_MD = self.see(weights, inputs)
        is_image = (inputs.image_index_T >= 0)[:, None]
        index_T = inputs.image_index_T.clamp(min=0)
        return torch.where(is_image, vectors_MD[index_T].to(self.dtype), x_TD)

    def decode(self, weights: Weights, x_TD: Tensor, inputs: Inputs, *, num_layers: int) -> Tensor:
        """Layers and norm over a residual stream: (T, D). A draft model's weights serve, too."""
        rotation = self._rotary.at(inputs.positions_T)
        for layer in range(num_layers):
            own = tuple(weights[f"decoder.{layer}.{name}.weight"] for name in BLOCK)
            x_TD = self._text(
                x_TD,
                own,
                rotation.cos_TH2,
                rotation.sin_TH2,
                rotation.query_scale_T,
                inputs.token_bounds,
                inputs.longest_document,
            )
        return rms_norm(x_TD, weights["norm.weight"], self.config.text.norm_eps)

    def see(self, weights: Weights, inputs: Inputs) -> Tensor:
        """A vector for every merged patch: (M, D)."""
        vision = self.vision
        pixels = (inputs.patches_PC.float() / 255.0 - self._mean_C) / self._std_C
        patch = weights["encoder.patch.weight"].flatten(1)
        x_PD = F.linear(pixels.to(self.dtype), patch.to(self.dtype))
        x_PD = rms_norm(x_PD, weights["encoder.norm.weight"], vision.norm_eps)
        pair = torch.arange(vision.head_dim // 2, device=x_PD.device, dtype=torch.float32)
        frequencies = vision.rope_theta ** (-2.0 * pair / vision.head_dim)
        place = inputs.grid_P2.float()
        angles = torch.cat(
            (place[:, :1] * frequencies[0::2], place[:, 1:] * frequencies[1::2]), dim=-1
        )
        cos, sin = angles.cos(), angles.sin()
        for layer in range(vision.num_layers):
            own = tuple(weights[f"encoder.{layer}.{name}.weight"] for name in BLOCK)
            x_PD = self._tower(x_PD, own, cos, sin, None, inputs.patch_bounds, inputs.longest_image)
        x_PD = rms_norm(x_PD, weights["projector.norm.weight"], self.config.text.norm_eps)
        # Channel by channel, the four patches of a square side by side.
        merged = x_PD.view(-1, 4, vision.width).transpose(1, 2).reshape(-1, 4 * vision.width)
        merged = F.linear(merged, weights["projector.merge.weight"].to(self.dtype))
        hidden = F.gelu(F.linear(merged, weights["projector.in.weight"].to(self.dtype)))
        return F.linear(hidden, weights["projector.out.weight"].to(self.dtype))

    def logits(self, weights: Weights, hidden_TD: Tensor) -> Tensor:
        """float32 logits of some rows."""
        return F.linear(hidden_TD, weights["head.weight"].to(self.dtype)).float()
