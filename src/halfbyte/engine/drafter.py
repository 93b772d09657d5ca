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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.batch import BlockTable, attend_over
from halfbyte.engine.cache import PagedAttend, PagedCache
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
    pages_SP   int32, pages of each work's sequence as they were in the step
    """

    logits_RV: Tensor
    hidden_TD: Tensor
    pages_SP: NDArray[np.int32]


class Drafter:
    """Guesses by an EAGLE head. Its figures are guesses, too: no answer depends on them."""

    def __init__(
        self,
        head: EagleHead,
        decoder: Decoder,
        sampler: Sampler,
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
        self._sampler = sampler
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
        # What the last entry of each generating sequence gave, and in which row it stands.
        self._hidden_SD: Tensor | None = None
        self._row_of: dict[int, int] = {}

    def follow(self, works: SequenceOf[Work], computed: Computed) -> None:
        """Write the entries of a step's positions whose next token is known.

        Call when the step is concluded, for all of its works; the sequences may have ended.
        """
        spans: list[tuple[int, int]] = []
        shifted: list[Work] = []
        rows: list[int] = []
        kept: list[int] = []
        last_rows: list[int] = []
        first_row = 0
        self._row_of.clear()
        for index, work in enumerate(works):
            sequence = work.sequence
            count = min(sequence.num_computed, len(sequence.token_ids) - 1) - work.start
            if count > 0:
                kept.append(index)
                spans.append((work.start, work.start + count))
                shifted.append(Work(sequence, work.start + 1, count))
                rows += range(first_row, first_row + count)
                if sequence.slot is not None and sequence.is_decoding:
                    self._row_of[sequence.arrival] = len(last_rows)
                    last_rows.append(len(rows) - 1)
            first_row += work.num_rows
        if not spans:
            return
        hidden_TD = computed.hidden_TD
        if len(rows) < len(hidden_TD):
            hidden_TD = hidden_TD[rows]
        pages_SP = computed.pages_SP[kept]
        positions_T, attend = attend_over(spans, pages_SP, self.cache, self._device)
        guessed_TD = self._head(self._embed(shifted, attend), hidden_TD, positions_T, attend)
        self._hidden_SD = guessed_TD[last_rows]

    def confidence(self, sequence: Sequence) -> int | None:
        """One class; no guess for a sequence that was not in the last step."""
        return 0 if sequence.arrival in self._row_of else None

    def guess(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        """Token after token for all sequences together, each as far as it wants."""
        assert self._hidden_SD is not None
        guesses: list[list[int]] = [[] for _ in wanted]
        active = list(range(len(wanted)))
        hidden_SD = self._hidden_SD[[self._row_of[sequence.arrival] for sequence, _ in wanted]]
        num_ahead = 0
        while True:
            sequences = [wanted[i][0] for i in active]
            logits_SV = self._decoder.logits(hidden_SD)
            chosen = self._sampler.guess(logits_SV, sequences, num_ahead)
            for index, token_id in zip(active, chosen, strict=True):
                guesses[index].append(token_id)
            num_ahead += 1
            places = [place for place, i in enumerate(active) if wanted[i][1] > num_ahead]
            if not places:
                return guesses
            active = [active[place] for place in places]
            hidden_SD = self._extend(
                [wanted[i][0] for i in active],
                [guesses[i][-1] for i in active],
                hidden_SD[places],
                num_ahead,
            )

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept by sequence but what the next `follow` replaces."""

    @property
    def num_bytes(self) -> int:
        """Of the cache."""
        return self.cache.num_bytes

    def _extend(
        self,
        sequences: SequenceOf[Sequence],
        token_ids: SequenceOf[int],
        hidden_SD: Tensor,
        num_ahead: int,
    ) -> Tensor:
        """One more entry each, behind the known tokens: what it gives, (S, D)."""
        starts = [len(sequence.token_ids) - 2 + num_ahead for sequence in sequences]
        works = [
            Work(sequence, start, 1) for sequence, start in zip(sequences, starts, strict=True)
        ]
        positions_S, attend = attend_over(
            [(start, start + 1) for start in starts],
            self._table.rows(works),
            self.cache,
            self._device,
        )
        ids_S = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        embedded_SD = self._decoder.embed(Step(ids_S, positions_S, attend))
        guessed_SD: Tensor = self._head(embedded_SD, hidden_SD, positions_S, attend)
        return guessed_SD

    def _embed(self, works: SequenceOf[Work], attend: PagedAttend) -> Tensor:
        """Embeddings of the works' tokens, images in their places."""
        token_ids: list[int] = []
        positions: list[int] = []
        for work in works:
            stop = work.start + work.count
            token_ids += work.sequence.token_ids[work.start : stop]
            positions += range(work.start, stop)
        placement = None if self._images is None else self._images.place(works)
        return self._decoder.embed(
            Step(
                torch.tensor(token_ids, dtype=torch.int64, device=self._device),
                torch.tensor(positions, dtype=torch.int64, device=self._device),
                attend,
                None,
                None if placement is None else placement.rows_I,
                None if placement is None else placement.vectors_ID,
            )
        )
