"""Scheduled work -> the index tensors of one Step.

Shapes: T tokens of a step (flat over sequences), S sequences, P pages, R rows with logits.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.cache import PagedAttend, PagedCache
from halfbyte.engine.scheduler import Work


class BlockTable:
    """Block lists of the running sequences as rows of one array, extended as they grow."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self._pages = np.zeros((num_rows, max_blocks), dtype=np.int32)

    def rows(self, works: SequenceOf[Work]) -> NDArray[np.int32]:
        """int32 (S, P): pages of each work's sequence, as wide as the longest of them."""
        slots, width = [], 1
        for work in works:
            sequence = work.sequence
            slot, blocks = sequence.slot, sequence.blocks
            assert slot is not None
            if sequence.num_tabled < len(blocks):
                self._pages[slot, sequence.num_tabled : len(blocks)] = blocks[sequence.num_tabled :]
                sequence.num_tabled = len(blocks)
            slots.append(slot)
            width = max(width, len(blocks))
        pages_SP: NDArray[np.int32] = self._pages[slots, :width]
        return pages_SP


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's tensors (the meaning of each: `model.decoder.Step`, `cache.PagedAttend`).

    logit_rows_R  None if every token's logits are wanted
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attend: PagedAttend
    logit_rows_R: Tensor | None


def lay_out(
    works: SequenceOf[Work],
    pages_SP: NDArray[np.int32],
    cache: PagedCache,
    device: torch.device | str = "cpu",
) -> Batch:
    """Index tensors of a step. Logits: of the last known token of each sequence that the step
    reaches, and of every token of a sequence that wants prompt log-probs.
    """
    block_tokens = cache.block_tokens
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    query_starts = [0]
    for work in works:
        start, stop = work.start, work.start + work.count
        first_row = len(token_ids)
        token_ids += work.sequence.token_ids[start:stop]
        positions += range(start, stop)
        query_starts.append(len(token_ids))
        if work.sequence.wants_prompt_logprobs:
            logit_rows += range(first_row, len(token_ids))
        elif work.is_last:
            logit_rows.append(len(token_ids) - 1)
    positions_T = np.array(positions, dtype=np.int64)
    counts_S = [work.count for work in works]
    sequence_T = np.repeat(np.arange(len(works)), counts_S)
    slots_T = pages_SP[sequence_T, positions_T // block_tokens].astype(np.int64) * block_tokens
    slots_T += positions_T % block_tokens
    context_lengths_S = [work.start + work.count for work in works]
    attend = PagedAttend(
        cache,
        torch.from_numpy(slots_T).to(device),
        torch.from_numpy(pages_SP).to(device),
        torch.tensor(context_lengths_S, dtype=torch.int32, device=device),
        torch.tensor(query_starts, dtype=torch.int32, device=device),
    )
    all_rows = len(logit_rows) == len(token_ids)
    return Batch(
        torch.tensor(token_ids, dtype=torch.int64, device=device),
        torch.from_numpy(positions_T).to(device),
        attend,
        None if all_rows else torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )
