"""An EAGLE draft model: what the target will say next, from its hidden state and the token it said.

Entry p of a sequence joins the embedding of token p + 1 with the target's hidden state at p (behind
its final norm, as the head reads it), runs a few ordinary decoder layers at position p, and gives a
guess of the hidden state at p + 1; the target's own head makes logits of it, for token p + 2. A
guess takes the place of the hidden state in the next entry, and so on. The embedding is the
target's, too.

Which entries a sequence has and where they are kept: `engine.drafter`. Files: docs/formats.md.
Source: Li et al., EAGLE, arXiv 2401.15077.

Shapes: T entries, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from halfbyte.config import TextConfig
from halfbyte.kernels import dispatch
from halfbyte.model.attention import Attend
from halfbyte.model.decoder import DecoderLayer
from halfbyte.model.linear import Linear
from halfbyte.model.rope import RotaryTable


class EagleHead(nn.Module):
    """The draft model's own weights: what joins its two inputs, layers, norm."""

    def __init__(
        self,
        config: TextConfig,
        *,
        fuse: Linear,
        layers: Sequence[DecoderLayer],
        norm_D: Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self._fuse = fuse
        self._layers = tuple(layers)
        self.norm_D = nn.Buffer(norm_D, persistent=False)
        self._rotary = RotaryTable(config, norm_D.device)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of all weights as the draft model holds them in memory."""
        layers = sum(layer.num_weight_bytes for layer in self._layers)
        return self._fuse.num_bytes + layers + self.norm_D.nbytes

    @torch.inference_mode()
    def forward(
        self, embedded_TD: Tensor, hidden_TD: Tensor, positions_T: Tensor, attend: Attend
    ) -> Tensor:
        """Guesses of the hidden states behind the entries, behind a norm: (T, D).

        embedded_TD  of the token one further than the entry
        hidden_TD    the target's at the entry, or what this gave for it
        positions_T  int64, of the entries
        """
        residual_TD = self._fuse(torch.cat((embedded_TD, hidden_TD), dim=-1))
        rotation = self._rotary.at(positions_T)
        delta_TD: Tensor | None = None
        for index, layer in enumerate(self._layers):
            delta_TD, residual_TD = layer.advance(delta_TD, residual_TD, index, attend, rotation)
        if delta_TD is not None:
            residual_TD = residual_TD + delta_TD
        return dispatch.rms_norm(residual_TD, self.norm_D, self.config.norm_eps)
