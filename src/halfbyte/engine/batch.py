"""Scheduled work -> the index tensors of one Step.

Shapes: T tokens of a step (flat over sequences), S sequences, P pages, R rows with logits.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.cache import PagedAttend, PagedCache
from halfbyte.engine.scheduler import Work


class Places(NamedTuple):
    """Where works lie: int64 slot of the cache of each row, and each work's row of the page table.

    They hold until the next step is planned, also for sequences that have ended since.
    """

    slots_T: NDArray[np.int64]
    table_rows_S: list[int]


class BlockTable:
    """Block lists of the running sequences as rows of one array, extended as they grow."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self._pages = np.zeros((num_rows, max_blocks), dtype=np.int32)

    def rows(self, works: SequenceOf[Work]) -> NDArray[np.int32]:
        """int32 (S, P): pages of each work's sequence, as wide as the longest of them."""
        return self.pages(self._update(works), max(1, *(len(w.sequence.blocks) for w in works)))

    def pages(self, slots: SequenceOf[int], width: int) -> NDArray[np.int32]:
        """int32 (S, `width`): the first pages in rows of the table."""
        pages_SP: NDArray[np.int32] = self._pages[list(slots), :width]
        return pages_SP

    def places(self, works: SequenceOf[Work], block_tokens: int) -> Places:
        """Where the works' rows lie."""
        table_rows = self._update(works)
        slots = []
        for row, work in zip(table_rows, works, strict=True):
            positions = np.arange(work.start, work.start + work.num_rows)
            pages = self._pages[row, positions // block_tokens].astype(np.int64)
            slots.append(pages * block_tokens + positions % block_tokens)
        return Places(np.concatenate(slots), table_rows)

    def _update(self, works: SequenceOf[Work]) -> list[int]:
        """Bring the rows of the works' sequences up to date: each one's row."""
        slots = []
        for work in works:
            sequence = work.sequence
            slot, blocks = sequence.slot, sequence.blocks
            assert slot is not None
            if sequence.num_tabled < len(blocks):
                self._pages[slot, sequence.num_tabled : len(blocks)] = blocks[sequence.num_tabled :]
                sequence.num_tabled = len(blocks)
            slots.append(slot)
        return slots


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's tensors (the meaning of each: `model.decoder.Step`, `cache.PagedAttend`).

    logit_rows_R  None if every token's logits are wanted
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attend: PagedAttend
    logit_rows_R: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Indices:
    """A batch without the cache, and which rows image vectors replace: what other ranks need.

    `Batch`, `cache.PagedAttend` and `model.decoder.Step` say what the arrays mean.
    """

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]
    block_table_SP: NDArray[np.int32]
    context_lengths_S: NDArray[np.int32]
    query_starts_S1: NDArray[np.int32]
    logit_rows_R: NDArray[np.int64] | None
    image_rows_I: NDArray[np.int64] | None = None


class ChunkPlace(NamedTuple):
    """A chunk of a prompt among a prefill's rows, and where its sequence's pages are listed."""

    first_row: int
    num_rows: int
    start: int
    table_row: int
    num_pages: int


@dataclass(frozen=True, slots=True, eq=False)
class RowStep:
    """A step of the CUDA runner in host arrays: all that a rank needs to compute its part.

    places_X, pages_X  int64: what changes in the page table first, seen flat
    packed_5T          int64, as `graphs.RowInputs`
    size               rows of the graph that runs the step; None: a prefill
    num_singles        a prefill's leading rows of one token a sequence ...
    table_width        ... and the most pages that any of these has
    chunks             its other rows
    logit_rows_R       int64
    image_rows_I       int64, rows of a prefill that image vectors replace
    num_chosen         tokens that rank 0 chooses on the device, for the next step to look up
    """

    places_X: NDArray[np.int64]
    pages_X: NDArray[np.int64]
    packed_5T: NDArray[np.int64]
    size: int | None
    num_singles: int
    table_width: int
    chunks: tuple[ChunkPlace, ...]
    logit_rows_R: NDArray[np.int64]
    image_rows_I: NDArray[np.int64] | None
    num_chosen: int


def indices_of(batch: Batch, image_rows_I: Tensor | None = None) -> Indices:
    """What other ranks need of a batch that was laid out on the CPU."""
    attend = batch.attend
    return Indices(
        batch.token_ids_T.numpy(),
        batch.positions_T.numpy(),
        attend.slots_T.numpy(),
        attend.block_table_SP.numpy(),
        attend.context_lengths_S.numpy(),
        attend.query_starts_S1.numpy(),
        None if batch.logit_rows_R is None else batch.logit_rows_R.numpy(),
        None if image_rows_I is None else image_rows_I.cpu().numpy(),
    )


def batch_of(indices: Indices, cache: PagedCache, device: torch.device | str) -> Batch:
    """The batch over a rank's own cache, on its device."""

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    rows_R = indices.logit_rows_R
    attend = PagedAttend(
        cache,
        tensor(indices.slots_T),
        tensor(indices.block_table_SP),
        tensor(indices.context_lengths_S),
        tensor(indices.query_starts_S1),
    )
    return Batch(
        tensor(indices.token_ids_T),
        tensor(indices.positions_T),
        attend,
        None if rows_R is None else tensor(rows_R),
    )


def lay_out(
    works: SequenceOf[Work],
    pages_SP: NDArray[np.int32],
    cache: PagedCache,
    device: torch.device | str = "cpu",
) -> Batch:
    """Index tensors of a step. Logits: of the last known token of each sequence that the step
    reaches and of the proposals behind it, and of every token of a sequence that wants prompt
    log-probs.

    Example: A prefills 3 of 9 tokens, B decodes its sixth with two proposals p, q: rows
    [A0 A1 A2 B5 p q] at positions [0 1 2 5 6 7], logits of rows [3 4 5].
    """
    token_ids: list[int] = []
    logit_rows: list[int] = []
    for work in works:
        first_row = len(token_ids)
        token_ids += work.sequence.token_ids[work.start : work.start + work.count]
        if work.sequence.wants_prompt_logprobs:
            logit_rows += range(first_row, len(token_ids))
        elif work.is_last:
            logit_rows.append(len(token_ids) - 1)
        logit_rows += range(len(token_ids), len(token_ids) + len(work.proposals))
        token_ids += work.proposals
    spans = [(work.start, work.start + work.num_rows) for work in works]
    positions_T, attend = attend_over(spans, pages_SP, cache, device)
    all_rows = len(logit_rows) == len(token_ids)
    return Batch(
        torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions_T,
        attend,
        None if all_rows else torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )


def attend_over(
    spans: SequenceOf[tuple[int, int]],
    pages_SP: NDArray[np.int32],
    cache: PagedCache,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, PagedAttend]:
    """Positions (T,) of some sequences' spans [start, stop), and attention that writes them."""
    block_tokens = cache.block_tokens
    counts_S = [stop - start for start, stop in spans]
    positions_T = np.concatenate([np.arange(start, stop) for start, stop in spans])
    sequence_T = np.repeat(np.arange(len(spans)), counts_S)
    slots_T = pages_SP[sequence_T, positions_T // block_tokens].astype(np.int64) * block_tokens
    slots_T += positions_T % block_tokens
    attend = PagedAttend(
        cache,
        torch.from_numpy(slots_T).to(device),
        torch.from_numpy(pages_SP).to(device),
        torch.tensor([stop for _, stop in spans], dtype=torch.int32, device=device),
        torch.tensor([0, *np.cumsum(counts_S)], dtype=torch.int32, device=device),
    )
    return torch.from_numpy(positions_T).to(device), attend
