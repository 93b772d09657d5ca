"""The Ministral3 decoder: layer, stack, final norm, head. No scheduling, no files, no cache.

`load` builds it; `engine.runner` and `calibrate.stream` call it.

Shapes: T tokens (flat over sequences), D model width, N query heads, K key/value heads, H head
size, F MLP width, V vocabulary, R rows whose logits are wanted, I image positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.config import TextConfig
from halfbyte.kernels import dispatch
from halfbyte.model.attention import Attend
from halfbyte.model.linear import Linear
from halfbyte.model.parallel import Communicator, Solo, split
from halfbyte.model.rope import RotaryTable, Rotation
from halfbyte.model.saturation import SaturationCounts

Tap = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes: a flat, ragged batch (decision 0002).

    token_ids_T, positions_T  int64
    attend            remembers keys and values; knows which tokens belong together
    logit_rows_R      int64 rows whose logits are wanted; None means all
    image_rows_I      int64 rows whose embedding is replaced ...
    image_vectors_ID  ... by these vectors, in this order; only rank 0 of several has them

    Example: sequence A prefills tokens 5 6 7 from position 0, B decodes token 9 at position 4:
      token_ids [5 6 7 9], positions [0 1 2 4], logit_rows [2 3].
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attend: Attend
    logit_rows_R: Tensor | None = None
    image_rows_I: Tensor | None = None
    image_vectors_ID: Tensor | None = None


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm, around a residual stream."""

    def __init__(
        self,
        config: TextConfig,
        attention_norm_D: Tensor,
        mlp_norm_D: Tensor,
        *,
        qkv: Linear,
        o: Linear,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        super().__init__()
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._head_dim = config.head_dim
        self._eps = config.norm_eps
        self.attention_norm_D = nn.Buffer(attention_norm_D, persistent=False)
        self.mlp_norm_D = nn.Buffer(mlp_norm_D, persistent=False)
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down

    @property
    def num_weight_bytes(self) -> int:
        norms = (self.attention_norm_D, self.mlp_norm_D)
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return sum(norm.nbytes for norm in norms) + sum(linear.num_bytes for linear in linears)

    def forward(
        self,
        x_TD: Tensor,
        layer: int,
        attend: Attend,
        rotation: Rotation,
        tap: Tap | None = None,
    ) -> Tensor:
        """Compute the layer's output, residual included: x_TD; the input is not modified.

        `tap` sees "attention.input" (of q, k, v), "attention.k" (rotated), "attention.v",
        "attention.o.input", "mlp.input" (of gate, up) and "mlp.down.input" as they pass.
        """
        delta_TD, residual_TD = self.advance(None, x_TD, layer, attend, rotation, tap)
        return residual_TD + delta_TD

    def advance(
        self,
        delta_TD: Tensor | None,
        residual_TD: Tensor,
        layer: int,
        attend: Attend,
        rotation: Rotation,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute `forward` but for the last addition, which whoever normalises next makes.

        delta_TD  what the layer before left to be added to the residual; None for nothing
        returns   (delta_TD, residual_TD), whose sum is the layer's output
        """
        q_TNH, k_TKH, v_TKH, residual_TD = self.project(delta_TD, residual_TD, tap)
        if tap is not None:
            tap("attention.k", dispatch.rotate(q_TNH, k_TKH, rotation)[1])
            tap("attention.v", v_TKH)
        out_TNH = attend(layer, q_TNH, k_TKH, v_TKH, rotation)
        return self.transform(out_TNH, residual_TD, tap)

    def project(
        self, delta_TD: Tensor | None, residual_TD: Tensor, tap: Tap | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute `advance` up to attention: q_TNH, k_TKH, v_TKH and the residual stream.

        Row by row, as `transform`: a caller may compute some rows now and others later.
        """
        if delta_TD is None:
            normed_TD = dispatch.rms_norm(residual_TD, self.attention_norm_D, self._eps)
        else:
            normed_TD, residual_TD = dispatch.add_rms_norm(
                delta_TD, residual_TD, self.attention_norm_D, self._eps
            )
        if tap is not None:
            tap("attention.input", normed_TD)
        fused_TMH = self.qkv(normed_TD).view(normed_TD.shape[0], -1, self._head_dim)
        q_TNH, k_TKH, v_TKH = torch.split(fused_TMH, self._heads, dim=1)
        return q_TNH, k_TKH, v_TKH, residual_TD

    def transform(
        self, out_TNH: Tensor, residual_TD: Tensor, tap: Tap | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the rest of `advance` from attention's result, `out_TNH`."""
        out_TD = out_TNH.flatten(1)
        if tap is not None:
            tap("attention.o.input", out_TD)
        normed_TD, residual_TD = dispatch.add_rms_norm(
            self.o(out_TD), residual_TD, self.mlp_norm_D, self._eps
        )
        if tap is not None:
            tap("mlp.input", normed_TD)
        hidden_TF = dispatch.silu_mul(self.gate_up(normed_TD))
        if tap is not None:
            tap("mlp.down.input", hidden_TF)
        return self.down(hidden_TF), residual_TD


class Decoder(nn.Module):
    """Embedding, layers, final norm and head; `forward` maps a Step to logits.

    One rank of several has a share of the layers' heads and features, which `config` counts, and of
    the vocabulary's rows. All ranks take the same steps; rank 0 alone gets logits.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        embedding_VD: Tensor,
        layers: Sequence[DecoderLayer],
        norm_D: Tensor,
        head: Linear,
        kv_scales: Sequence[tuple[float, float]],
        communicator: Communicator | None = None,
        saturation: SaturationCounts | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.saturation = saturation
        self.communicator = communicator or Solo()
        size = self.communicator.size
        shares = [split(config.vocab_size, rank, size) for rank in range(size)]
        self._vocab = shares[self.communicator.rank]
        self._vocab_widths = tuple(len(share) for share in shares)
        self.kv_scales = tuple(kv_scales)
        self.embedding_VD = nn.Buffer(embedding_VD, persistent=False)
        self.layers = nn.ModuleList(layers)
        self.norm_D = nn.Buffer(norm_D, persistent=False)
        self.head = head
        self.rotary = RotaryTable(config, embedding_VD.device)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of all weights as the decoder holds them in memory."""
        layers = sum(layer.num_weight_bytes for layer in self.decoder_layers())
        return layers + self.embedding_VD.nbytes + self.norm_D.nbytes + self.head.num_bytes

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers in order, for callers that run them one by one."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Logits of the wanted rows, f32 (R, V); on ranks above 0 no rows."""
        residual_TD = self._residual(step)
        if step.logit_rows_R is not None:
            residual_TD = residual_TD[step.logit_rows_R]
        return self.logits(self._normed(residual_TD))

    @torch.inference_mode()
    def forward_with_hidden(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits as of `forward`, and what the head reads of every row: (logits_RV, hidden_TD)."""
        return self.concluded(None, self._residual(step), step.logit_rows_R)

    @torch.inference_mode()
    def concluded(
        self, delta_TD: Tensor | None, residual_TD: Tensor, logit_rows_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply final norm and head to the last layer's result: (logits_RV, hidden_TD)."""
        if delta_TD is not None:
            residual_TD = residual_TD + delta_TD
        hidden_TD = self._normed(residual_TD)
        rows = slice(None) if logit_rows_R is None else logit_rows_R
        return self.logits(hidden_TD[rows]), hidden_TD

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Apply the head to hidden states behind the final norm: f32 (R, V)."""
        return self.communicator.gather(self.head(hidden_RD, torch.float32), self._vocab_widths)

    def _normed(self, residual_TD: Tensor) -> Tensor:
        return dispatch.rms_norm(residual_TD, self.norm_D, self.config.norm_eps)

    def _residual(self, step: Step) -> Tensor:
        residual_TD = self.embed(step)
        rotation = self.rotary.at(step.positions_T)
        delta_TD: Tensor | None = None
        for index, layer in enumerate(self.decoder_layers()):
            delta_TD, residual_TD = layer.advance(
                delta_TD, residual_TD, index, step.attend, rotation
            )
        if delta_TD is not None:
            residual_TD = residual_TD + delta_TD
        return residual_TD

    def embed(self, step: Step) -> Tensor:
        """Embeddings of the step's tokens, image vectors in their places: x_TD."""
        if self.communicator.size > 1:
            return self._embed_share(step)
        x_TD = _looked_up(self.embedding_VD, step.token_ids_T)
        if step.image_rows_I is not None and step.image_vectors_ID is not None:
            x_TD[step.image_rows_I] = step.image_vectors_ID.to(x_TD.dtype)
        return x_TD

    def _embed_share(self, step: Step) -> Tensor:
        """Each row comes from the rank that holds it, zeros from all others: the sum is exact."""
        row_T = step.token_ids_T - self._vocab.start
        is_other_T = (row_T < 0) | (row_T >= len(self._vocab))
        x_TD = _looked_up(self.embedding_VD, row_T.masked_fill(is_other_T, 0))
        x_TD.masked_fill_(is_other_T[:, None], 0)
        if step.image_rows_I is not None:
            x_TD[step.image_rows_I] = 0
            if step.image_vectors_ID is not None:
                x_TD[step.image_rows_I] = step.image_vectors_ID.to(x_TD.dtype)
        return self.communicator.all_reduce(x_TD)


def _looked_up(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Copy rows out of a table."""
    if table_VD.device.type != "cpu":
        return table_VD[ids_T]
    # As bytes through numpy: torch asks its threads even for a few rows (see `RotaryTable.at`).
    rows = table_VD.view(torch.uint8).numpy()[ids_T.numpy()]
    return torch.from_numpy(rows).view(table_VD.dtype)
