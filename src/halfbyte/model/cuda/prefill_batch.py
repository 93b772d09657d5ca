"""What a step with prompts computes, and where its rows lie between the kernels.

Shapes: T tokens, S single tokens, P pages of a sequence, D model width, N query heads, H head size,
I rows of images.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Cosines and sines (T, H / 2), and what queries are scaled by or None.
Angles = tuple[Tensor, Tensor, Tensor | None]


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence among a prefill's rows.

    start       tokens of the sequence that are stored already
    pages_P     int32, the sequence's pages as far as this chunk reaches
    """

    first_row: int
    num_rows: int
    start: int
    pages_P: Tensor


class Singles(NamedTuple):
    """The leading rows of a prefill that are one token each of a sequence.

    block_table_SP, context_lengths_S  int32, as for a decode step
    """

    block_table_SP: Tensor
    context_lengths_S: Tensor


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """A ragged batch: first single tokens of sequences, then chunks of prompts.

    image_rows_I   rows whose embedding is replaced by `image_vectors_ID`, which rank 0 alone has
    hidden_TD      what a draft model reads beside the embeddings
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    chunks: tuple[Chunk, ...]
    singles: Singles | None = None
    image_rows_I: Tensor | None = None
    image_vectors_ID: Tensor | None = None
    hidden_TD: Tensor | None = None


class Rows(NamedTuple):
    """Where a step's rows are between the kernels.

    slots_T  of the cache; -1 stores nothing
    out_TNH  attention's output, without v_scale
    """

    residual_TD: Tensor
    slots_T: Tensor
    cos_TH2: Tensor
    sin_TH2: Tensor
    query_scale_T: Tensor | None
    q_TNH: Tensor
    out_TNH: Tensor

    def first(self, size: int) -> "Rows":
        """The first `size` rows of every buffer, in the same memory."""
        return Rows(*(None if part is None else part[:size] for part in self))  # type: ignore[arg-type]

    def put(self, residual_TD: Tensor, slots_T: Tensor, angles: Angles) -> None:
        """Fill in a step; rows behind it store nothing, and nobody reads what they give."""
        count = len(residual_TD)
        self.slots_T[count:] = -1
        for target, source in zip(self[:5], (residual_TD, slots_T, *angles), strict=True):
            if target is not None and source is not None:
                target[:count].copy_(source)
