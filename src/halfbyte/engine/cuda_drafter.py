"""A draft model on the CUDA kernels: its entries are rows of a graph, or of a prefill, as the
target's tokens are, over the same page table; `drafter` says which entries there are.

Shapes: T rows, S sequences, D model width, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.batch import ChunkPlace, Places
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.drafter import Entries, Guessed
from halfbyte.engine.graphs import DraftExecutor, size_for
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.rows import PageTable, Staging, count_singles, place_images, prefill_batch
from halfbyte.engine.scheduler import Work


class CudaDraftModel:
    """A draft model's executor and cache."""

    def __init__(
        self,
        executor: DraftExecutor,
        cache: PagedCache,
        table: PageTable,
        staging: Staging,
        images: ImageEncoder | None,
    ) -> None:
        """`table` and `staging` are the runner's; `cache` is as large as the target's."""
        self._executor = executor
        self.cache = cache
        self._table = table
        self._staging = staging
        self._images = images

    def places_of(self, works: SequenceOf[Work]) -> Places:
        table_rows = self._table.update(works)
        block_tokens = self.cache.block_tokens
        slots = [
            work.sequence.blocks[position // block_tokens] * block_tokens + position % block_tokens
            for work in works
            for position in range(work.start, work.start + work.num_rows)
        ]
        return Places(np.array(slots, dtype=np.int64), table_rows)

    def advance(self, entries: Entries, hidden_TD: Tensor, wanted_rows: SequenceOf[int]) -> Guessed:
        num_rows = len(entries.token_ids)
        size = size_for(num_rows, self._executor.sizes)
        packed_5T = _packed(entries, size or num_rows)
        placement = None if self._images is None else self._images.place(entries.works)
        inputs = self._executor.inputs
        if size is None:
            chunks = self._chunks(entries)
            num_singles = len(entries.works) - len(chunks)
            longest = max((stop for _, stop in entries.spans[:num_singles]), default=0)
            batch = prefill_batch(
                inputs,
                self._staging.send(packed_5T)[0],
                num_singles,
                -(-longest // self.cache.block_tokens),
                chunks,
                None if placement is None else placement.rows_I,
                None if placement is None else placement.vectors_ID,
                hidden_TD,
            )
            residual_TD = self._executor.prefill(batch)
            hidden_SD = self._executor.normed(residual_TD[list(wanted_rows)])
            return Guessed(hidden_SD, None)
        if placement is not None:
            vocab_size = self._executor.config.vocab_size
            place_images(placement, packed_5T, self._executor.spare_VD, vocab_size)
        inputs.packed_5T[:, :size].copy_(self._staging.send(packed_5T)[0])
        self._executor.hidden_TD[:num_rows].copy_(hidden_TD)
        logits_TV = self._executor.replay(size)
        rows = list(wanted_rows)
        return Guessed(self._executor.hidden(size)[rows], logits_TV[rows])

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return self._executor.logits(hidden_SD)

    def _chunks(self, entries: Entries) -> tuple[ChunkPlace, ...]:
        """The spans behind the leading single entries."""
        num_singles = count_singles(entries.works)
        chunks = []
        row = num_singles
        spans = entries.spans[num_singles:]
        for (start, stop), table_row in zip(
            spans, entries.places.table_rows_S[num_singles:], strict=True
        ):
            num_pages = -(-stop // self.cache.block_tokens)
            chunks.append(ChunkPlace(row, stop - start, start, table_row, num_pages))
            row += stop - start
        return tuple(chunks)


def _packed(entries: Entries, num_rows: int) -> NDArray[np.int64]:
    """Entries as rows (`RowInputs.packed_5T`), padded with rows that store nothing."""
    spans = entries.spans
    packed_5T = np.zeros((5, num_rows), dtype=np.int64)
    packed_5T[1] = packed_5T[3] = -1
    count = len(entries.token_ids)
    packed_5T[0, :count] = entries.token_ids
    packed_5T[2, :count] = np.concatenate([np.arange(start, stop) for start, stop in spans])
    packed_5T[3, :count] = entries.places.slots_T
    counts_S = [stop - start for start, stop in spans]
    packed_5T[4, :count] = np.repeat(entries.places.table_rows_S, counts_S)
    return packed_5T
