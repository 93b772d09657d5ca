"""A decoder's weights on a Hopper GPU, in the order in which products stream them; its KV cache.

FP8 products take activations rounded to FP8 by the checkpoint's input scale, or by each token's
largest value; NVFP4 products decode weights exactly and take bf16 activations (exact in fp16).
Prepared as "nvfp4_fast" they run in FP8 instead, in decoding and prefill alike: values rounded to
e4m3, activations rounded by each token's largest value.

Shapes: D model width, V vocabulary, P pages, Z slots in a page, K key/value heads, H head size.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.kernels.cuda.library import OutKind
from halfbyte.kernels.repack import TiledWeight, TileFormat

Products = Literal["exact", "fast"]
ACTIVATION_KIND: dict[TileFormat, OutKind] = {
    "fp8": "e4m3",
    "nvfp4": "f16",
    "bf16": "bf16",
    "nvfp4_fast": "e4m3_paired",
}
# Activations that come with a scale of each token.
PER_TOKEN_KINDS = ("e4m3_token", "e4m3_paired")


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """A prepared weight and what its activations are divided by before they are rounded.

    input_scale   FP8: the checkpoint's, None for each token's largest value. NVFP4: a power of two
                  that keeps activations inside fp16, 1.0 for all but extreme calibrated maxima.
                  bf16: 1.0
    """

    weight: TiledWeight
    input_scale: float | None = 1.0

    @property
    def activation_kind(self) -> OutKind:
        """What its input is written as where the weights are read as they lie."""
        if self.weight.format == "fp8" and self.input_scale is None:
            return "e4m3_token"
        return ACTIVATION_KIND[self.weight.format]

    @property
    def sums_scale(self) -> float:
        """What sums are multiplied by for their activations, beside the scale of each token."""
        is_per_token = self.activation_kind in PER_TOKEN_KINDS
        return 1.0 if is_per_token or self.input_scale is None else self.input_scale


@dataclass(frozen=True, slots=True)
class CudaLayer:
    """One decoder layer on the device: norms, four products, scales of K and V."""

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
    """A decoder's weights on the device, or a tensor-parallel rank's part.

    config   the rank's heads and MLP width; `vocab_size` is the whole model's
    vocab    the rows of the vocabulary in embedding and head; None = all
    fuse     a draft model's (`model.eagle`), which joins an embedding and a hidden state; embedding
             and head are then those of the model that it guesses for
    """

    config: TextConfig
    embedding_VD: Tensor
    layers: tuple[CudaLayer, ...]
    norm_D: Tensor
    head: CudaLinear
    vocab: range | None = None
    fuse: CudaLinear | None = None

    @property
    def mode(self) -> Products:
        """How NVFP4 weights were prepared to multiply: "fast" is in FP8."""
        formats = {linear.weight.format for linear in self.linears}
        return "fast" if "nvfp4_fast" in formats else "exact"

    @property
    def num_logits(self) -> int:
        """Number of tokens whose logits this rank's head gives."""
        return self.config.vocab_size if self.vocab is None else len(self.vocab)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, without those that a draft model borrows."""
        ends = [self.head] if self.fuse is None else [self.fuse]
        linears = [*ends, *(li for la in self.layers for li in layer_linears(la))]
        dense = [
            self.norm_D,
            *(n for la in self.layers for n in (la.attention_norm_D, la.mlp_norm_D)),
        ]
        if self.fuse is None:
            dense.append(self.embedding_VD)
        return sum(li.weight.num_bytes for li in linears) + sum(
            t.numel() * t.element_size() for t in dense
        )

    @property
    def linears(self) -> tuple[CudaLinear, ...]:
        """Every product of a step: a draft model's first, the head, then the layers'."""
        ends = (self.head,) if self.fuse is None else (self.fuse, self.head)
        return (*ends, *(li for la in self.layers for li in layer_linears(la)))

    @property
    def num_step_bytes(self) -> int:
        """Bytes that a decode step streams: every linear, not the embedding table."""
        return self.num_bytes - self.embedding_VD.numel() * 2


def layer_linears(layer: CudaLayer) -> tuple[CudaLinear, ...]:
    """The four products of a layer, in the order in which a step runs them."""
    return layer.qkv, layer.o, layer.gate_up, layer.down


class KvCache(NamedTuple):
    """Paged e4m3 keys and values of every layer: (P, Z, K, H) each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def page_slots(self) -> int:
        """Number of tokens that a page of the cache holds."""
        return self.keys[0].shape[1]


def make_cache(
    config: TextConfig, num_pages: int, page_slots: int, device: torch.device
) -> KvCache:
    """Allocate an empty cache: two (P, Z, K, H) tensors of bytes for each layer."""
    shape = (num_pages, page_slots, config.num_kv_heads, config.head_dim)

    def tensors() -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(config.num_layers)
        )

    return KvCache(tensors(), tensors())
