"""A draft model beside the engine's model: keeps its entries up to date, guesses tokens from them.

The draft model's K and V lie in a cache of its own, in the same pages as the target's: entry p of a
sequence (`model.eagle`) in the slot of position p. After each step `follow` writes the entries of
all positions whose next token is now known, from the hidden states that the target has just given;
`guess` goes on from the last of them with guesses in their places, in slots that the next `follow`
overwrites.

Example: prompt a b c. The step computes positions 0-2 and chooses d. `follow` writes entries 0
(b, h0), 1 (c, h1), 2 (d, h2); the last gives the guess e'. `guess` of two writes entry 3 (e', g2)
and gives f'. The next step computes d e' f' at positions 3-5. If e' stood and f' did not, `follow`
writes entries 3 (e, h3) and 4 (the token chosen instead of f', h4).

The last entry of a block depends on the first token of the next one. So that entries can be shared
as the target's K and V are, that token belongs to the block's digest (`Scheduler.num_ahead`).

Shapes: T entries, R those that are gone on from, D model width, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from halfbyte.engine.device import DraftDevice, Guessed
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.plan.step import NO_CHANGES, TableChanges, lay_out_rows
from halfbyte.engine.runner import Computed, Runner
from halfbyte.engine.sampler import Sampler


class Drafter:
    """Proposes tokens by a draft model. No answer's tokens depend on what it proposes."""

    def __init__(self, model: DraftDevice, runner: Runner, sampler: Sampler) -> None:
        """`model` is the draft model of the runner's device."""
        self.model = model
        self._table = runner.table
        self._images = runner.images
        self._sampler = sampler
        # What the last entry of each generating sequence gave, and in which row it stands.
        self._last: Guessed | None = None
        self._row_of: dict[int, int] = {}

    def follow(self, found: SequenceOf[Computed]) -> None:
        """Write the entries of all positions in these steps whose next token is known.

        Call when the steps are concluded, before the next one is planned; the sequences may have
        ended.
        """
        shifted: list[Work] = []
        rows: list[int] = []
        table_rows: list[int] = []
        last_rows: list[int] = []
        first_row = 0
        self._row_of.clear()
        for computed in found:
            for work, table_row in zip(computed.works, computed.step.table_rows_S, strict=True):
                sequence, start = work.sequence, work.start
                count = min(sequence.num_computed, len(sequence.token_ids) - 1) - start
                if count > 0:
                    table_rows.append(int(table_row))
                    shifted.append(Work(sequence, start + 1, count))
                    rows += range(first_row, first_row + count)
                    if sequence.slot is not None and sequence.is_decoding:
                        self._row_of[sequence.arrival] = len(last_rows)
                        last_rows.append(len(rows) - 1)
                first_row += work.num_rows
        if not shifted:
            return
        states = [one.hidden_TD for one in found if one.hidden_TD is not None]
        hidden_TD = states[0] if len(states) == 1 else torch.cat(states)
        if len(rows) < len(hidden_TD):
            hidden_TD = hidden_TD[rows]
        token_ids = [
            token_id
            for work in shifted
            for token_id in work.sequence.token_ids[work.start : work.start + work.count]
        ]
        self._last = self._advance(shifted, token_ids, hidden_TD, table_rows, last_rows)

    def confidence(self, sequence: Sequence) -> int | None:
        """Class 0 for a sequence of the last step, None for any other: there is one class."""
        return 0 if sequence.arrival in self._row_of else None

    def guess(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        """Propose tokens for all sequences together, one by one, up to each one's number."""
        assert self._last is not None
        guesses: list[list[int]] = [[] for _ in wanted]
        active = list(range(len(wanted)))
        rows = [self._row_of[sequence.arrival] for sequence, _ in wanted]
        last = _select(self._last, rows)
        num_ahead = 0
        while True:
            sequences = [wanted[i][0] for i in active]
            logits_RV = last.logits_RV
            if logits_RV is None:
                logits_RV = self.model.logits(last.hidden_RD)
            chosen = self._sampler.guess(logits_RV, sequences, num_ahead)
            for index, token_id in zip(active, chosen, strict=True):
                guesses[index].append(token_id)
            num_ahead += 1
            places = [place for place, i in enumerate(active) if wanted[i][1] > num_ahead]
            if not places:
                return guesses
            active = [active[place] for place in places]
            last = self._extend(
                [wanted[i][0] for i in active],
                [guesses[i][-1] for i in active],
                last.hidden_RD[places],
                num_ahead,
            )

    def forget(self, sequence: Sequence) -> None:
        """Do nothing: the next `follow` replaces all that is kept of a sequence."""

    def _extend(
        self,
        sequences: SequenceOf[Sequence],
        token_ids: list[int],
        hidden_RD: Tensor,
        num_ahead: int,
    ) -> Guessed:
        """What one more entry each gives, behind the known tokens."""
        shifted = [Work(one, len(one.token_ids) - 1 + num_ahead, 1) for one in sequences]
        table_rows, changes = self._table.update(shifted)
        wanted = range(len(shifted))
        return self._advance(shifted, token_ids, hidden_RD, table_rows, wanted, changes)

    def _advance(
        self,
        shifted: SequenceOf[Work],
        token_ids: list[int],
        hidden_TD: Tensor,
        table_rows: SequenceOf[int],
        wanted_rows: SequenceOf[int],
        changes: TableChanges = NO_CHANGES,
    ) -> Guessed:
        """Compute entries and keep their K and V; what the wanted rows give.

        shifted    what their embeddings are of: the entries' positions, each one further
        token_ids  the tokens there, (T,)
        """
        spans = [(work.start - 1, work.start - 1 + work.count) for work in shifted]
        placement = None if self._images is None else self._images.place(shifted)
        step = lay_out_rows(
            token_ids,
            spans,
            table_rows,
            self._table,
            wanted_rows,
            changes=changes,
            image_rows_I=None if placement is None else placement.rows_I,
        )
        vectors_ID = None if placement is None else placement.vectors_ID
        return self.model.advance(step, hidden_TD, vectors_ID)


def _select(guessed: Guessed, rows: list[int]) -> Guessed:
    logits_RV = guessed.logits_RV
    # A copy even of all rows: what is drawn from is changed.
    return Guessed(guessed.hidden_RD[rows], None if logits_RV is None else logits_RV[rows])
