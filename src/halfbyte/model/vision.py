"""The Pixtral encoder and the projector: pixels in, one decoder-width vector a merged patch out.

Images are encoded one by one at their own size, so nothing is padded and an image's vectors do not
depend on what else is in the batch. Everything here is unquantized, so products are torch's own.
Resizing and tokens are `chat.images`; placing vectors among embeddings is `Decoder.embed`.

Shapes: T patches of one image row by row, D tower width, N heads, H head size (H2 = H / 2, H4 =
H / 4), M merged patches, F MLP width.
Sources: Pixtral 12B, arXiv 2410.07073, section 2.1; `transformers` (Pixtral, Mistral3) for the
order of frequencies and of merged channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.config import VisionConfig
from halfbyte.errors import FormatError
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import Rotation

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True, slots=True, eq=False)
class EncoderLayerWeights:
    """One layer's weights; q, k, v and gate, up are stacked."""

    attention_norm_D: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm_D: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ProjectorWeights:
    """The projector's weights; biases where the checkpoint has them."""

    norm_D: Tensor
    merge: Tensor
    into: Tensor
    into_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None


def patch_rotation(config: VisionConfig, rows: int, columns: int, device: torch.device) -> Rotation:
    """Angles of a grid of patches: even frequencies turn by row, odd ones by column.

    Worked example, H=8, frequencies f0 f1 f2 f3: the patch in row r, column c turns its four pairs
    by r f0, r f2, c f1, c f3. Taken in float64, rounded to f32.
    """
    pair = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    frequencies_H2 = config.rope_theta ** (-2.0 * pair / config.head_dim)
    row_T = torch.arange(rows, dtype=torch.float64, device=device).repeat_interleave(columns)
    column_T = torch.arange(columns, dtype=torch.float64, device=device).repeat(rows)
    angles_TH2 = torch.cat(
        (row_T[:, None] * frequencies_H2[0::2], column_T[:, None] * frequencies_H2[1::2]), dim=-1
    )
    return Rotation(angles_TH2.cos().float(), angles_TH2.sin().float(), None)


class EncoderLayer(nn.Module):
    """Full (not causal) attention and a gated MLP, each behind an RMSNorm."""

    def __init__(self, config: VisionConfig, weights: EncoderLayerWeights) -> None:
        super().__init__()
        self._heads = [config.num_heads] * 3
        self._head_dim = config.head_dim
        self._eps = config.norm_eps
        self._activation = config.activation
        self.weights = weights

    def forward(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        weights = self.weights
        normed_TD = dispatch.rms_norm(x_TD, weights.attention_norm_D, self._eps)
        attended_TD = F.linear(self._attend(normed_TD, rotation), weights.o)
        normed_TD, x_TD = dispatch.add_rms_norm(attended_TD, x_TD, weights.mlp_norm_D, self._eps)
        hidden_TF = self._gate(F.linear(normed_TD, weights.gate_up))
        return x_TD + F.linear(hidden_TF, weights.down)

    def _attend(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        fused = F.linear(x_TD, self.weights.qkv).view(x_TD.shape[0], -1, self._head_dim)
        q_TNH, k_TNH, v_TNH = torch.split(fused, self._heads, dim=1)
        q_TNH, k_TNH = dispatch.rotate(q_TNH, k_TNH, rotation)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TNH, v_TNH))
        out_1NTH = F.scaled_dot_product_attention(q, k, v)
        return out_1NTH[0].transpose(0, 1).flatten(1)

    def _gate(self, gate_up_T2F: Tensor) -> Tensor:
        if self._activation == "silu":
            return dispatch.silu_mul(gate_up_T2F)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return _ACTIVATIONS[self._activation](gate_TF) * up_TF


class VisionModel(nn.Module):
    """Encoder, patch merger and projector."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        patch: Tensor,
        norm_D: Tensor,
        layers: Sequence[EncoderLayerWeights],
        projector: ProjectorWeights,
        projector_eps: float,
    ) -> None:
        """`projector_eps` is the decoder's norm epsilon, which the projector's norm shares.

        `layers` are those up to the feature layer; later ones would be computed for nothing.
        """
        super().__init__()
        self.config = config
        self.patch = nn.Buffer(patch, persistent=False)
        self.norm_D = nn.Buffer(norm_D, persistent=False)
        self.layers = nn.ModuleList([EncoderLayer(config, weights) for weights in layers])
        self.projector = projector
        self._projector_eps = projector_eps

    @torch.inference_mode()
    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Vectors of each image, row by row: (M, decoder width) in the weights' dtype.

        images  normalized pixels (3, height, width), any size of at least one merged patch; what
                goes beyond whole merged patches is not seen

        The i-th vector belongs at the i-th image token of the image (row breaks excluded).
        """
        return [self._project(*self._encode(pixels)) for pixels in images]

    def num_vectors(self, height: int, width: int) -> int:
        """Merged patches of an image of this many pixels."""
        side = self.config.patch_size * self.config.spatial_merge_size
        return (height // side) * (width // side)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, int, int]:
        channels, height, width = pixels.shape
        if channels != self.config.num_channels or self.num_vectors(height, width) == 0:
            raise FormatError(f"an image of {channels} x {height} x {width} has no whole patch")
        pixels = pixels.to(self.patch.device, self.patch.dtype)
        grid_DYX = F.conv2d(pixels[None], self.patch, stride=self.config.patch_size)[0]
        rows, columns = grid_DYX.shape[1:]
        x_TD = grid_DYX.flatten(1).t().contiguous()
        x_TD = dispatch.rms_norm(x_TD, self.norm_D, self.config.norm_eps)
        rotation = patch_rotation(self.config, rows, columns, x_TD.device)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation)
        return x_TD, rows, columns

    def _project(self, x_TD: Tensor, rows: int, columns: int) -> Tensor:
        weights = self.projector
        x_TD = dispatch.rms_norm(x_TD, weights.norm_D, self._projector_eps)
        merged_MD = F.linear(
            merge_patches(x_TD, rows, columns, self.config.spatial_merge_size), weights.merge
        )
        hidden = F.linear(merged_MD, weights.into, weights.into_bias)
        hidden = _ACTIVATIONS[self.config.projector_activation](hidden)
        return F.linear(hidden, weights.out, weights.out_bias)


def merge_patches(x_TD: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Squares of side x side patches as one row each: (M, D * side * side), channel by channel.

    Worked example, D=2, side 2, patches a b / c d of one square with channels a0 a1 ...: the row is
    a0 b0 c0 d0 a1 b1 c1 d1. Rows and columns beyond whole squares are dropped.
    """
    width = x_TD.shape[1]
    grid = x_TD.view(rows, columns, width)[: rows // side * side, : columns // side * side]
    squares = grid.reshape(rows // side, side, columns // side, side, width)
    return squares.permute(0, 2, 4, 1, 3).reshape(-1, width * side * side)


def num_layers_used(config: VisionConfig) -> int:
    """Layers up to the feature layer: -1 is the last one's output, 0 the embedded patches."""
    if config.feature_layer >= 0:
        return config.feature_layer
    return config.num_layers + 1 + config.feature_layer
