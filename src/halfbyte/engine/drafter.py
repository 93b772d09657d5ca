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

Shapes: T entries, S sequences, D model width, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.engine.batch import BlockTable, Places, attend_over
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.sampler import Sampler
from halfbyte.engine.scheduler import Work
from halfbyte.engine.sequence import Sequence
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.eagle import EagleHead


class Computed(NamedTuple):
    """What a step of the target gives to a draft model.

    logits_RV  as `Runner.run`
    hidden_TD  of every row of the step, behind the final norm
    places     of the step's works
    """

    logits_RV: Tensor
    hidden_TD: Tensor
    places: Places


class Entries(NamedTuple):
    """Entries to compute, a span of each of some sequences.

    works      what their embeddings are of: the span's positions, each one further
    token_ids  the tokens there, (T,)
    """

    works: SequenceOf[Work]
    token_ids: list[int]
    places: Places

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Positions [start, stop) of each sequence's entries."""
        return [(work.start - 1, work.start - 1 + work.count) for work in self.works]


class Guessed(NamedTuple):
    """What some entries give: hidden states to go on from, and their logits if they came along."""

    hidden_SD: Tensor
    logits_SV: Tensor | None


class DraftModel(Protocol):
    """A draft model's layers over a cache of its own, in the target's pages."""

    @property
    def cache(self) -> PagedCache: ...

    def places_of(self, works: SequenceOf[Work]) -> Places:
        """As they are now."""

    def advance(self, entries: Entries, hidden_TD: Tensor, wanted_rows: SequenceOf[int]) -> Guessed:
        """Compute entries and remember their K and V; what the wanted rows give.

        hidden_TD  the target's at the entries, or what this gave for it
        """

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """The target's head: f32 (S, V), the caller's to change."""


class PlainDraftModel:
    """An `EagleHead` in plain ops, beside the target in plain ops."""

    def __init__(
        self,
        head: EagleHead,
        decoder: Decoder,
        table: BlockTable,
        *,
        num_pages: int,
        block_tokens: int,
        device: str,
        images: ImageEncoder | None,
    ) -> None:
        """`table` is the runner's, `decoder` the target, whose embedding and head are used."""
        self._head = head
        self._decoder = decoder
        self._table = table
        self._device = device
        self._images = images
        # bf16, whatever the target's: it is a small part of the whole, and has no scales.
        self.cache = PagedCache(
            head.config,
            format="bf16",
            num_pages=num_pages,
            block_tokens=block_tokens,
            kv_scales=(),
            device=device,
        )

    def places_of(self, works: SequenceOf[Work]) -> Places:
        return self._table.places(works, self.cache.block_tokens)

    def advance(self, entries: Entries, hidden_TD: Tensor, wanted_rows: SequenceOf[int]) -> Guessed:
        spans = entries.spans
        num_pages = -(-max(stop for _, stop in spans) // self.cache.block_tokens)
        pages_SP = self._table.pages(entries.places.table_rows_S, num_pages)
        positions_T, attend = attend_over(spans, pages_SP, self.cache, self._device)
        placement = None if self._images is None else self._images.place(entries.works)
        step = Step(
            torch.tensor(entries.token_ids, dtype=torch.int64, device=self._device),
            positions_T,
            attend,
            None,
            None if placement is None else placement.rows_I,
            None if placement is None else placement.vectors_ID,
        )
        guessed_TD: Tensor = self._head(self._decoder.embed(step), hidden_TD, positions_T, attend)
        return Guessed(guessed_TD[list(wanted_rows)], None)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_SD)


class Drafter:
    """Guesses by a draft model. Its figures are guesses, too: no answer depends on them."""

    def __init__(self, model: DraftModel, sampler: Sampler) -> None:
        self.model = model
        self._sampler = sampler
        # What the last entry of each generating sequence gave, and in which row it stands.
        self._last: Guessed | None = None
        self._row_of: dict[int, int] = {}

    def follow(self, works: SequenceOf[Work], computed: Computed) -> None:
        """Write the entries of a step's positions whose next token is known.

        Call when the step is concluded, for all of its works; the sequences may have ended.
        """
        shifted: list[Work] = []
        token_ids: list[int] = []
        rows: list[int] = []
        table_rows: list[int] = []
        last_rows: list[int] = []
        first_row = 0
        self._row_of.clear()
        for work, table_row in zip(works, computed.places.table_rows_S, strict=True):
            sequence, start = work.sequence, work.start
            count = min(sequence.num_computed, len(sequence.token_ids) - 1) - start
            if count > 0:
                table_rows.append(table_row)
                shifted.append(Work(sequence, start + 1, count))
                token_ids += sequence.token_ids[start + 1 : start + 1 + count]
                rows += range(first_row, first_row + count)
                if sequence.slot is not None and sequence.is_decoding:
                    self._row_of[sequence.arrival] = len(last_rows)
                    last_rows.append(len(rows) - 1)
            first_row += work.num_rows
        if not shifted:
            return
        hidden_TD = computed.hidden_TD
        if len(rows) < len(hidden_TD):
            hidden_TD = hidden_TD[rows]
        places = Places(computed.places.slots_T[rows], table_rows)
        self._last = self.model.advance(Entries(shifted, token_ids, places), hidden_TD, last_rows)

    def confidence(self, sequence: Sequence) -> int | None:
        """One class; no guess for a sequence that was not in the last step."""
        return 0 if sequence.arrival in self._row_of else None

    def guess(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        """Token after token for all sequences together, each as far as it wants."""
        assert self._last is not None
        guesses: list[list[int]] = [[] for _ in wanted]
        active = list(range(len(wanted)))
        rows = [self._row_of[sequence.arrival] for sequence, _ in wanted]
        last = _select(self._last, rows)
        num_ahead = 0
        while True:
            sequences = [wanted[i][0] for i in active]
            logits_SV = last.logits_SV
            if logits_SV is None:
                logits_SV = self.model.logits(last.hidden_SD)
            chosen = self._sampler.guess(logits_SV, sequences, num_ahead)
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
                last.hidden_SD[places],
                num_ahead,
            )

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept by sequence but what the next `follow` replaces."""

    @property
    def num_bytes(self) -> int:
        """Of the cache."""
        return self.model.cache.num_bytes

    def _extend(
        self,
        sequences: SequenceOf[Sequence],
        token_ids: list[int],
        hidden_SD: Tensor,
        num_ahead: int,
    ) -> Guessed:
        """One more entry each, behind the known tokens: what it gives, (S, D)."""
        starts = [len(sequence.token_ids) - 2 + num_ahead for sequence in sequences]
        pairs = list(zip(sequences, starts, strict=True))
        places = self.model.places_of([Work(sequence, start, 1) for sequence, start in pairs])
        shifted = [Work(sequence, start + 1, 1) for sequence, start in pairs]
        entries = Entries(shifted, token_ids, places)
        return self.model.advance(entries, hidden_SD, range(len(sequences)))


def _select(guessed: Guessed, rows: list[int]) -> Guessed:
    logits_SV = guessed.logits_SV
    # A copy even of all rows: what is drawn from is changed.
    return Guessed(guessed.hidden_SD[rows], None if logits_SV is None else logits_SV[rows])
