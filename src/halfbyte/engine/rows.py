"""Rows of the CUDA runner's steps: host memory they travel through, the page table, their layout.

Shapes: T rows, P pages, S sequences, I image tokens, D model width.
"""

from collections import deque
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.batch import ChunkPlace
from halfbyte.engine.graphs import RowInputs, look_up
from halfbyte.engine.images import Placement
from halfbyte.engine.scheduler import Work
from halfbyte.engine.workers import Workers
from halfbyte.model.cuda_decoder import Chunk, PrefillBatch, Singles

# Steps whose staging memory may be in use at once: one runs, one waits, and one to spare.
_IN_FLIGHT = 3


class Staging:
    """Host memory that the device reads or writes while the host goes on.

    A ring of pinned buffers (plain memory without a GPU); one is used again only when the copy
    that last used it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._ring: deque[tuple[Tensor, Any]] = deque()

    def _take(self, num_values: int) -> Tensor:
        buffer = None
        if len(self._ring) > _IN_FLIGHT * 4:
            buffer, event = self._ring.popleft()
            if event is not None:
                event.synchronize()
        if buffer is None or buffer.numel() < num_values:
            count = max(1024, 1 << (num_values - 1).bit_length())
            buffer = torch.empty(count, dtype=torch.int64, pin_memory=self._is_cuda)
        return buffer

    def _mark(self, buffer: Tensor) -> Any:
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._ring.append((buffer, event))
        return event

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Copies of 8-byte arrays on the device, in one transfer."""
        total = sum(array.size for array in arrays)
        buffer = self._take(max(total, 1))
        host = buffer.numpy()
        start = 0
        for array in arrays:
            assert array.dtype.itemsize == 8, array.dtype
            host[start : start + array.size] = array.reshape(-1).view(np.int64)
            start += array.size
        device = torch.empty(total, dtype=torch.int64, device=self._device)
        device.copy_(buffer[:total], non_blocking=True)
        self._mark(buffer)
        sent, start = [], 0
        for array in arrays:
            part = device[start : start + array.size]
            if array.dtype == np.float64:
                part = part.view(torch.float64)
            sent.append(part.view(array.shape))
            start += array.size
        return sent

    def fetch(self, tokens_R: Tensor) -> "PendingTokens":
        """Start to copy tokens to the host."""
        count = tokens_R.numel()
        buffer = torch.empty(0, dtype=torch.int64) if count == 0 else self._take(count)
        buffer[:count].copy_(tokens_R, non_blocking=True)
        return PendingTokens(buffer[:count], self._mark(buffer) if count else None)


class PendingTokens(NamedTuple):
    """Tokens on their way to the host; read them before `_IN_FLIGHT` further steps are launched."""

    buffer: Tensor
    event: Any
    workers: Workers | None = None

    def wait(self) -> list[int]:
        """The tokens, once they have arrived. WorkerError if a rank they depend on is lost."""
        with nullcontext() if self.workers is None else self.workers.awaiting():
            if self.event is not None:
                self.event.synchronize()
        token_ids: list[int] = self.buffer.tolist()
        return token_ids


class PageTable:
    """Pages of the running sequences on the device, row by row, written as they grow."""

    def __init__(self, table: Tensor, staging: Staging) -> None:
        """`table` int32, one row for each slot and a last one for a sequence without."""
        self._table = table
        self._staging = staging

    @property
    def spare_row(self) -> int:
        """The row of a sequence that has no slot."""
        return self._table.shape[0] - 1

    def update(self, works: SequenceOf[Work]) -> list[int]:
        """Bring the rows of the works' sequences up to date: each one's row."""
        rows, places_X, pages_X = self.changes(works)
        self.apply(places_X, pages_X)
        return rows

    def changes(
        self, works: SequenceOf[Work]
    ) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
        """Each work's row, and which pages to write where in the flat table; counted as written."""
        width = self._table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        rows = []
        for work in works:
            sequence = work.sequence
            row = self.spare_row if sequence.slot is None else sequence.slot
            known = 0 if sequence.slot is None else sequence.num_tabled
            blocks = sequence.blocks
            places += range(row * width + known, row * width + len(blocks))
            pages += blocks[known:]
            if sequence.slot is not None:
                sequence.num_tabled = len(blocks)
            rows.append(row)
        return rows, np.array(places, dtype=np.int64), np.array(pages, dtype=np.int64)

    def apply(self, places_X: NDArray[np.int64], pages_X: NDArray[np.int64]) -> None:
        """Write what `changes` found, on this rank's device."""
        if places_X.size:
            sent = self._staging.send(places_X, pages_X)
            self._table.view(-1).index_copy_(0, sent[0], sent[1].int())


class Layout(NamedTuple):
    """A step's rows: one int64 array as `RowInputs.packed_5T`, and which rows have logits."""

    packed_5T: NDArray[np.int64]
    logit_rows: list[int]


def lay_out_rows(
    works: SequenceOf[Work], table_rows: SequenceOf[int], block_tokens: int, num_rows: int
) -> Layout:
    """Works as rows, padded to `num_rows` with rows that store nothing and read one slot.

    Logits: of the last known token of each sequence that the step reaches and of the proposals
    behind it, and of every token of a sequence that wants prompt log-probs.

    Example, blocks of 4, 4 rows: A prefills tokens [5 6] at 0 in page 7, table row 0; B, table row
    1, decodes at position 5 in page 3 a token that the step before chose at its row 2:
      ids [5 6 0 0], sources [-1 -1 2 -1], positions [0 1 5 0], slots [28 29 13 -1],
      tables [0 0 1 0], logit rows [1 2].
    """
    packed_5T = np.zeros((5, num_rows), dtype=np.int64)
    packed_5T[1] = packed_5T[3] = -1
    logit_rows: list[int] = []
    row = 0
    for work, table_row in zip(works, table_rows, strict=True):
        sequence, stop = work.sequence, work.start + work.count
        last = work.start + work.num_rows
        part = packed_5T[:, row : row + work.num_rows]
        part[0, : work.count] = sequence.token_ids[work.start : stop]
        part[0, work.count :] = work.proposals
        if sequence.num_pending:
            # Only the last token can be unknown, and only the work that reaches it has it.
            assert work.is_last and sequence.num_pending == 1 and not work.proposals
            part[0, -1] = 0
            part[1, -1] = sequence.pending_row
        positions = np.arange(work.start, last)
        first_block = work.start // block_tokens
        blocks = np.array(sequence.blocks[first_block : -(-last // block_tokens)], dtype=np.int64)
        part[2] = positions
        part[3] = blocks[positions // block_tokens - first_block] * block_tokens
        part[3] += positions % block_tokens
        part[4] = table_row
        if sequence.wants_prompt_logprobs:
            logit_rows += range(row, row + work.count)
        elif work.is_last:
            logit_rows.append(row + work.count - 1)
        logit_rows += range(row + work.count, row + work.num_rows)
        row += work.num_rows
    return Layout(packed_5T, logit_rows)


def count_singles(works: SequenceOf[Work]) -> int:
    """Leading works of a single token each."""
    for index, work in enumerate(works):
        if work.num_rows > 1:
            return index
    return len(works)


def place_images(
    placement: Placement, packed_5T: NDArray[np.int64], spare_VD: Tensor, vocab_size: int
) -> None:
    """Vectors of images become rows behind the vocabulary's embeddings, and their numbers the
    rows' token ids.
    """
    assert placement.vectors_ID is not None
    rows = placement.rows_I.tolist()
    spare_VD[: len(rows)].copy_(placement.vectors_ID)
    packed_5T[0, rows] = np.arange(vocab_size, vocab_size + len(rows))


def prefill_batch(
    inputs: RowInputs,
    packed_5T: Tensor,
    num_singles: int,
    table_width: int,
    places: SequenceOf[ChunkPlace],
    image_rows_I: Tensor | None,
    image_vectors_ID: Tensor | None,
    hidden_TD: Tensor | None = None,
) -> PrefillBatch:
    """Rows of a prefill on their device.

    packed_5T    as `RowInputs.packed_5T`, of the prefill alone
    num_singles  leading rows of one token a sequence, of which none has more than `table_width`
                 pages; the others are `places`
    """
    token_ids_T, sources_T, positions_T, slots_T, tables_T = packed_5T
    singles = None
    if num_singles:
        table = inputs.table[:, :table_width].index_select(0, tables_T[:num_singles])
        singles = Singles(table, (positions_T[:num_singles] + 1).int())
    chunks = []
    for place in places:
        pages_P = inputs.table[place.table_row, : place.num_pages].long()
        chunks.append(Chunk(place.first_row, place.num_rows, place.start, pages_P))
    return PrefillBatch(
        look_up(token_ids_T, sources_T, inputs.last_tokens),
        positions_T,
        slots_T,
        tuple(chunks),
        singles,
        image_rows_I,
        image_vectors_ID,
        hidden_TD,
    )
