"""The Pixtral encoder and the projector: pixels in, one decoder-width vector a merged patch out.

Images are encoded one by one at their own size, so nothing is padded and an image's vectors do not
depend on what else is in the batch. Everything here is unquantized, so products are torch's own.
Resizing and tokens are `chat.images`; placing vectors among embeddings is `Decoder.embed`.

On a CPU an image goes through the layers in blocks of rows whose bounds depend on its size alone:
other work can come between them, and the bits are the same whether it does or not (decision 0075).
On other devices all rows are one block.

Shapes: T patches of one image row by row, D tower width, N heads, H head size (H2 = H / 2, H4 =
H / 4), M merged patches, F MLP width.
Sources: Pixtral 12B, arXiv 2410.07073, section 2.1; `transformers` (Pixtral, Mistral3) for the
order of frequencies and of merged channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.config import VisionConfig
from halfbyte.errors import FormatError
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import Rotation
from halfbyte.model.parts import Part, compute_all

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}

# Pixel rows [top, stop) of an image, normalized: (3, stop - top, width), float.
PixelRows = Callable[[int, int], Tensor]

# Patches of a block on a CPU: of what goes through weights, enough that these are read for many;
# of queries, few enough that their attention over the 12,100 patches of the largest picture is
# short beside a step that generates.
_BLOCK_ROWS = 128
_QUERY_ROWS = 32


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
    """The projector's weights; merger and biases where the checkpoint has them."""

    norm_D: Tensor | None
    merge: Tensor | None
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

    def project(self, x_TD: Tensor, rotation: Rotation) -> Sequence[Tensor]:
        """Queries, keys and values (T, N, H) of some rows."""
        normed_TD = dispatch.rms_norm(x_TD, self.weights.attention_norm_D, self._eps)
        fused = F.linear(normed_TD, self.weights.qkv).view(x_TD.shape[0], -1, self._head_dim)
        q_TNH, k_TNH, v_TNH = torch.split(fused, self._heads, dim=1)
        return (*dispatch.rotate(q_TNH, k_TNH, rotation), v_TNH)

    def transform(self, attended_TNH: Tensor, x_TD: Tensor) -> Tensor:
        """The layer's output for some rows, from what they attended to and the layer's input."""
        weights = self.weights
        attended_TD = F.linear(attended_TNH.flatten(1), weights.o)
        normed_TD, x_TD = dispatch.add_rms_norm(attended_TD, x_TD, weights.mlp_norm_D, self._eps)
        hidden_TF = self._gate(F.linear(normed_TD, weights.gate_up))
        return x_TD + F.linear(hidden_TF, weights.down)

    def _gate(self, gate_up_T2F: Tensor) -> Tensor:
        if self._activation == "silu":
            return dispatch.silu_mul(gate_up_T2F)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return _ACTIVATIONS[self._activation](gate_TF) * up_TF


class VisionModel(nn.Module):
    """The vision encoder with its patch merger and projector."""

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
        vectors = []
        for pixels in images:
            channels, height, width = pixels.shape
            if channels != self.config.num_channels or self.num_vectors(height, width) == 0:
                raise FormatError(f"an image of {channels} x {height} x {width} has no whole patch")
            encoding = self.begin(height, width, partial(_rows_of, pixels))
            compute_all(encoding.parts())
            vectors.append(encoding.vectors_MD)
        return vectors

    @torch.inference_mode()
    def begin(self, height: int, width: int, rows: PixelRows) -> "Encoding":
        """Begin to encode an image of this many pixels in parts; see `forward`."""
        return Encoding(self, height, width, rows)

    def num_vectors(self, height: int, width: int) -> int:
        """Number of vectors, a merged patch each, of an image of this many pixels."""
        side = self.config.patch_size * self.config.spatial_merge_size
        return (height // side) * (width // side)

    def embed(self, pixels: Tensor) -> Tensor:
        """Patches (T, D) of whole rows of them, normed for the first layer."""
        pixels = pixels.to(self.patch.device, self.patch.dtype)
        grid_DYX = F.conv2d(pixels[None], self.patch, stride=self.config.patch_size)[0]
        x_TD = grid_DYX.flatten(1).t().contiguous()
        return dispatch.rms_norm(x_TD, self.norm_D, self.config.norm_eps)

    def project(self, x_TD: Tensor, rows: int, columns: int) -> Tensor:
        """Vectors (M, decoder width) of `rows` x `columns` patches behind the last layer."""
        weights = self.projector
        if weights.norm_D is not None and weights.merge is not None:
            x_TD = dispatch.rms_norm(x_TD, weights.norm_D, self._projector_eps)
            side = self.config.spatial_merge_size
            x_TD = F.linear(merge_patches(x_TD, rows, columns, side), weights.merge)
        hidden = F.linear(x_TD, weights.into, weights.into_bias)
        hidden = _ACTIVATIONS[self.config.projector_activation](hidden)
        return F.linear(hidden, weights.out, weights.out_bias)


class Encoding:
    """One image on its way through the encoder, part by part.

    vectors_MD  means something when all of `parts` are computed
    """

    def __init__(self, vision: VisionModel, height: int, width: int, rows: PixelRows) -> None:
        config = vision.config
        self._vision = vision
        self._pixel_rows = rows
        self._rows, self._columns = height // config.patch_size, width // config.patch_size
        patch = vision.patch
        self._num = num = self._rows * self._columns
        is_cpu = patch.device.type == "cpu"
        self._block_rows = _BLOCK_ROWS if is_cpu else num
        self._query_rows = _QUERY_ROWS if is_cpu else num
        # Each layer's output takes the place of its input, what is attended to that of the queries.
        self._x_TD: Tensor | None = None
        self._q_NTH: Tensor | None = None
        # Head by head: attention reads all keys and values of a head for every block of queries.
        self._k_NTH: Tensor | None = None
        self._v_NTH: Tensor | None = None
        num_vectors = vision.num_vectors(height, width)
        self.vectors_MD = patch.new_empty(num_vectors, len(vision.projector.out))

    def parts(self) -> Iterator[Part]:
        """Parts of the whole, to be computed once, in order."""
        yield self.embedding()
        yield self.turning()
        for layer in self._vision.layers:
            assert isinstance(layer, EncoderLayer)
            yield from self.layer_parts(layer)
        yield self.merging()

    def embedding(self) -> Part:
        """The part that makes patches of pixels, normed for the first layer."""
        return self._part("embed", self._rows, self._grid_rows(), self._embed)

    def turning(self) -> Part:
        """The part that computes the angles of all patches, which every layer needs."""
        return self._part("turn", 1, 1, self._turn)

    def layer_parts(self, layer: EncoderLayer) -> Iterator[Part]:
        """The parts of one layer, computed after those of the layer before it."""
        num = self._num
        yield self._part("project", num, self._block_rows, partial(self._project, layer))
        yield self._part("attend", num, self._query_rows, self._attend)
        self._k_NTH = self._v_NTH = None
        yield self._part("transform", num, self._block_rows, partial(self._transform, layer))

    def merging(self) -> Part:
        """The part behind the last layer, merger and projector, which makes the vectors."""
        side = self._vision.config.spatial_merge_size
        return self._part("merge", self._rows // side * side, self._grid_rows(), self._merge)

    def _grid_rows(self) -> int:
        """Rows of patches of a block: whole squares of patches, and whole rows of squares."""
        side = self._vision.config.spatial_merge_size
        return max(self._block_rows // self._columns // side, 1) * side

    @property
    def patches_TD(self) -> Tensor:
        """The patches as far as they have come; they change in place when a layer runs."""
        assert self._x_TD is not None, "nothing is embedded yet"
        return self._x_TD

    def go_on(self, patches_TD: Tensor) -> None:
        """Take patches up where `patches_TD` of another encoding of the same image was kept."""
        assert patches_TD.shape == (self._num, self._vision.config.width), patches_TD.shape
        self._x_TD = patches_TD

    def _part(self, name: str, rows: int, block: int, compute: Callable[[int, int], None]) -> Part:
        """All of so many rows, block by block: `compute` never sees other bounds."""

        def compute_blocks(start: int, stop: int) -> None:
            for first in range(start * block, min(stop * block, rows), block):
                compute(first, min(first + block, rows))

        return Part(
            f"picture: {name}", self._num.bit_length(), -(-rows // block), 1, compute_blocks
        )

    def _embed(self, start: int, stop: int) -> None:
        side = self._vision.config.patch_size
        rows = slice(start * self._columns, stop * self._columns)
        x_TD = self._vision.embed(self._pixel_rows(start * side, stop * side))
        self._x_TD = self._with_rows(self._x_TD, rows, x_TD)

    def _turn(self, start: int, stop: int) -> None:
        device = self._vision.patch.device
        self._rotation = patch_rotation(self._vision.config, self._rows, self._columns, device)

    def _project(self, layer: EncoderLayer, start: int, stop: int) -> None:
        assert self._x_TD is not None
        rows = slice(start, stop)
        projected = layer.project(self._x_TD[rows], self._rotation.rows(rows))
        q_NTH, k_NTH, v_NTH = (x_TNH.transpose(0, 1) for x_TNH in projected)
        self._q_NTH = self._with_rows(self._q_NTH, rows, q_NTH)
        self._k_NTH = self._with_rows(self._k_NTH, rows, k_NTH)
        self._v_NTH = self._with_rows(self._v_NTH, rows, v_NTH)

    def _attend(self, start: int, stop: int) -> None:
        assert self._q_NTH is not None and self._k_NTH is not None and self._v_NTH is not None
        rows = slice(start, stop)
        out_1NTH = F.scaled_dot_product_attention(
            self._q_NTH[None, :, rows], self._k_NTH[None], self._v_NTH[None]
        )
        self._q_NTH = self._with_rows(self._q_NTH, rows, out_1NTH[0])

    def _transform(self, layer: EncoderLayer, start: int, stop: int) -> None:
        assert self._q_NTH is not None and self._x_TD is not None
        rows = slice(start, stop)
        x_TD = layer.transform(self._q_NTH[:, rows].transpose(0, 1), self._x_TD[rows])
        self._x_TD = self._with_rows(self._x_TD, rows, x_TD)

    def _with_rows(self, buffer: Tensor | None, rows: slice, values: Tensor) -> Tensor:
        """The buffer with values in these rows, its last dimension but one; changed in place.

        Values of all rows are themselves the buffer: nothing is copied where one block is all.
        """
        if values.shape[-2] == self._num:
            return values
        if buffer is None:
            buffer = values.new_empty((*values.shape[:-2], self._num, values.shape[-1]))
        buffer[..., rows, :] = values
        return buffer

    def _merge(self, start: int, stop: int) -> None:
        side, columns = self._vision.config.spatial_merge_size, self._columns
        vectors = slice(start // side * (columns // side), stop // side * (columns // side))
        assert self._x_TD is not None
        x_TD = self._x_TD[start * columns : stop * columns]
        self.vectors_MD[vectors] = self._vision.project(x_TD, stop - start, columns)


def _rows_of(pixels: Tensor, top: int, stop: int) -> Tensor:
    return pixels[:, top:stop]


def merge_patches(x_TD: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Join squares of side x side patches to rows: (M, D * side * side), channel by channel.

    Worked example, D=2, side 2, patches a b / c d of one square with channels a0 a1 ...: the row is
    a0 b0 c0 d0 a1 b1 c1 d1. Rows and columns beyond whole squares are dropped.
    """
    width = x_TD.shape[1]
    grid = x_TD.view(rows, columns, width)[: rows // side * side, : columns // side * side]
    squares = grid.reshape(rows // side, side, columns // side, side, width)
    return squares.permute(0, 2, 4, 1, 3).reshape(-1, width * side * side)


def num_layers_used(config: VisionConfig) -> int:
    """Number of layers up to the feature layer: -1 is the last one's output, 0 the embedding."""
    if config.feature_layer >= 0:
        return config.feature_layer
    return config.num_layers + 1 + config.feature_layer
