"""A step in host arrays: what every rank and device is told. No torch.

Every token that a step computes is a row with a position, a slot of the cache and a row of the
page table, whose changes come with the step. `lay_out` makes a step of planned works; a device
reads rows, the spans they form, or both.

Shapes: T rows, S spans (one a sequence), P pages of a sequence, X changed places, R rows with
logits, I image tokens.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.plan.sequence import Work

_NOTHING = np.zeros(0, dtype=np.int64)


class TableChanges(NamedTuple):
    """Pages to write into a page table: int64 places of the table seen flat, and the pages."""

    places_X: NDArray[np.int64]
    pages_X: NDArray[np.int64]


NO_CHANGES = TableChanges(_NOTHING, _NOTHING)


class PageTable:
    """Pages of the running sequences: a row for each slot, and a last one for no slot.

    Whoever plans steps keeps one, whose changes keep those of the devices alike.
    """

    def __init__(self, max_sequences: int, max_pages: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.pages = np.zeros((max_sequences + 1, max_pages), dtype=np.int32)

    def update(self, works: SequenceOf[Work]) -> tuple[list[int], TableChanges]:
        """Bring the rows of the works' sequences up to date: each one's row, and what changed."""
        num_rows, width = self.pages.shape
        rows: list[int] = []
        places: list[int] = []
        pages: list[int] = []
        for work in works:
            sequence = work.sequence
            row, known = sequence.slot, sequence.num_tabled
            if row is None:
                row, known = num_rows - 1, 0
            blocks = sequence.blocks
            if known < len(blocks):
                places += range(row * width + known, row * width + len(blocks))
                pages += blocks[known:]
                if sequence.slot is not None:
                    sequence.num_tabled = len(blocks)
            rows.append(row)
        if not places:
            return rows, NO_CHANGES
        changes = TableChanges(np.array(places, dtype=np.int64), np.array(pages, dtype=np.int64))
        self.apply(changes)
        return rows, changes

    def apply(self, changes: TableChanges) -> None:
        """Write the changes that `update` of another table has found."""
        if changes.places_X.size:
            self.pages.reshape(-1)[changes.places_X] = changes.pages_X

    def pages_of(self, step: "PlannedStep") -> NDArray[np.int32]:
        """Pages of each span's sequence, int32 (S, P), as far as the longest one reaches."""
        width = -(-int(step.context_lengths_S.max()) // self.block_tokens)
        pages_SP: NDArray[np.int32] = self.pages[step.table_rows_S, :width]
        return pages_SP


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """A step: all that a rank needs to compute its part, vectors of images aside.

    changes            of the page table, to be made first
    packed_5T          int64: token id; row of the tokens that the step before chose, to take it
                       from instead, or -1; position; slot of the cache; row of the page table
    query_starts_S1    int32, the rows of span s are [starts[s], starts[s + 1]), one sequence's
    context_lengths_S  int32, tokens of that sequence, those of this step included
    table_rows_S       int64, its row of the page table
    logit_rows_R       int64, rows whose logits are wanted
    image_rows_I       int64, rows whose embeddings are replaced by vectors of images, or None
    num_chosen         tokens that rank 0 chooses on the device, for the next step to look up
    """

    changes: TableChanges
    packed_5T: NDArray[np.int64]
    query_starts_S1: NDArray[np.int32]
    context_lengths_S: NDArray[np.int32]
    table_rows_S: NDArray[np.int64]
    logit_rows_R: NDArray[np.int64]
    image_rows_I: NDArray[np.int64] | None = None
    num_chosen: int = 0

    @property
    def num_rows(self) -> int:
        """Number of tokens that the step computes, one a row."""
        return len(self.packed_5T[0])


def lay_out_rows(
    token_ids: SequenceOf[int],
    spans: SequenceOf[tuple[int, int]],
    table_rows: SequenceOf[int],
    table: PageTable,
    logit_rows: SequenceOf[int],
    *,
    changes: TableChanges = NO_CHANGES,
    image_rows_I: NDArray[np.int64] | None = None,
) -> PlannedStep:
    """A step of some sequences' positions [start, stop), whose tokens follow one another.

    The table's rows are up to date; `changes` are those that its devices have not seen.
    """
    num_spans, num_rows = len(spans), len(token_ids)
    packed_5T = np.empty((5, num_rows), dtype=np.int64)
    packed_5T[0] = token_ids
    packed_5T[1] = -1
    positions_T, slots_T, tables_T = packed_5T[2:]
    lengths_S = np.array([stop for _, stop in spans], dtype=np.int32)
    if num_rows == num_spans:  # each a row, as where all generate
        query_starts_S1 = np.arange(num_spans + 1, dtype=np.int32)
        tables_T[:] = table_rows
        np.subtract(lengths_S, 1, out=positions_T)
        tables_S = tables_T
    else:
        starts_S = np.array([start for start, _ in spans])
        counts_S = lengths_S - starts_S
        query_starts_S1 = np.zeros(num_spans + 1, dtype=np.int32)
        np.cumsum(counts_S, out=query_starts_S1[1:])
        span_T = np.repeat(np.arange(num_spans), counts_S)
        tables_S = np.array(table_rows, dtype=np.int64)
        tables_T[:] = tables_S[span_T]
        np.add(np.arange(num_rows), (starts_S - query_starts_S1[:-1])[span_T], out=positions_T)
    np.multiply(
        table.pages[tables_T, positions_T // table.block_tokens], table.block_tokens, out=slots_T
    )
    slots_T += positions_T % table.block_tokens
    return PlannedStep(
        changes,
        packed_5T,
        query_starts_S1,
        lengths_S,
        tables_S,
        np.array(logit_rows, dtype=np.int64),
        image_rows_I,
    )


def lay_out(
    works: SequenceOf[Work], table: PageTable, image_rows_I: NDArray[np.int64] | None = None
) -> PlannedStep:
    """Lay out the step that computes these works, in their order.

    Logits: of the last known token of each sequence that the step reaches and of the proposals
    behind it, and of every token of a sequence that wants prompt log-probs.

    Example, blocks of 4: A prefills tokens [5 6] at 0 in page 7, table row 0; B, table row 1,
    decodes at position 5 in page 3 a token that the step before chose at its row 2:
      ids [5 6 0], sources [-1 -1 2], positions [0 1 5], slots [28 29 13], tables [0 0 1],
      query starts [0 2 3], context lengths [2 6], logit rows [1 2].
    With two proposals p q behind it B has rows [B5 p q] at positions [5 6 7], all with logits.
    """
    table_rows, changes = table.update(works)
    token_ids: list[int] = []
    logit_rows: list[int] = []
    sources: list[tuple[int, int]] = []
    for work in works:
        sequence = work.sequence
        first_row = len(token_ids)
        token_ids += sequence.token_ids[work.start : work.start + work.count]
        next_row = len(token_ids)
        if sequence.num_pending:
            # Only the last token can be unknown, and only the work that reaches it has it.
            assert work.is_last and sequence.num_pending == 1 and not work.proposals
            sources.append((next_row - 1, sequence.pending_row))
        if sequence.wants_prompt_logprobs:
            logit_rows += range(first_row, next_row)
        elif work.is_last:
            logit_rows.append(next_row - 1)
        if work.proposals:
            token_ids += work.proposals
            logit_rows += range(next_row, len(token_ids))
    spans = [(work.start, work.start + work.num_rows) for work in works]
    step = lay_out_rows(
        token_ids,
        spans,
        table_rows,
        table,
        logit_rows,
        changes=changes,
        image_rows_I=image_rows_I,
    )
    for row, source in sources:
        step.packed_5T[:2, row] = 0, source
    return step
