"""The device on CUDA kernels: a step as rows of a graph, or as a prefill; tokens chosen on the
device and read one step late.

`launch` starts a step and returns before it is done; nothing in it waits for the device (a list of
banned tokens that was never seen before, and images, aside). What a row's token is may be known to
the device only: the step says in which row the step before left it.

Shapes: T rows, R rows with logits, D model width, V vocabulary, I image tokens.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.device import Guessed, Results
from halfbyte.engine.draw import BanLists, DrawPlan, choose_tokens
from halfbyte.engine.graphs import (
    DraftExecutor,
    Executor,
    RowExecutor,
    RowInputs,
    look_up,
    size_for,
)
from halfbyte.engine.pinned import PendingTokens, PinnedRing
from halfbyte.engine.plan.step import PlannedStep, TableChanges
from halfbyte.kernels.cuda.library import NARROW_PREFILL_COLUMNS
from halfbyte.model.cuda.prefill_batch import Chunk, PrefillBatch, Singles
from halfbyte.model.cuda.weights import KvCache
from halfbyte.model.parallel import Communicator
from halfbyte.model.saturation import SaturationCounts

# Steps of more rows are taken to cost what their rows do.
_MOST_ROWS = 4096
# Fewer rows of a sequence are guesses to check rather than a prompt.
_CHUNK_ROWS = 16
# What a graph may read again for a chunk's rows, of the weights' bytes: about what a prefill of so
# few rows takes longer (benchmarks/records/mixed-steps-h200.json).
_READ_AGAIN = 1.4


class HopperDevice:
    """A device on CUDA kernels: an `Executor` over a paged cache."""

    # A graph runs to its end.
    slicer = None

    def __init__(
        self, executor: Executor, cache: PagedCache, draft: "HopperDraft | None" = None
    ) -> None:
        """Take an executor and its cache; without `draft` there is no draft model."""
        self.executor = executor
        self.cache = cache
        self.draft = draft
        self._device = executor.inputs.packed_5T.device
        self._ring = PinnedRing(self._device)
        self._bans = BanLists(self._device)
        self._num_replays = 0
        self._num_prefills = 0

    @property
    def config(self) -> TextConfig:
        return self.executor.config

    @property
    def communicator(self) -> Communicator:
        return self.executor.communicator

    @property
    def saturation(self) -> SaturationCounts | None:
        return self.executor.saturation

    @property
    def ahead(self) -> "HopperDevice":
        return self

    @property
    def step_sizes(self) -> tuple[int, ...]:
        sizes = self.executor.sizes
        if len(sizes) == 1:
            return sizes
        narrow = NARROW_PREFILL_COLUMNS
        return (*sizes, *range(-(-(sizes[-1] + 1) // narrow) * narrow, _MOST_ROWS + 1, narrow))

    @property
    def num_weight_bytes(self) -> int:
        draft = 0 if self.draft is None else self.draft.executor.num_weight_bytes
        return self.executor.num_weight_bytes + draft

    @property
    def num_replays(self) -> int:
        """Number of steps that went through a graph."""
        return self._num_replays

    @property
    def num_prefills(self) -> int:
        """Number of steps that went through the products for many rows."""
        return self._num_prefills

    def facts(self) -> dict[str, object]:
        draft = {} if self.draft is None else {"draft_model": self.draft.executor.facts()}
        return {**self.executor.facts(), **draft}

    @torch.inference_mode()
    def run(
        self, step: PlannedStep, vectors_ID: Tensor | None, *, wants_hidden: bool = False
    ) -> Results:
        self._enter()
        if wants_hidden:
            return Results(*self._compute_with_hidden(step, vectors_ID))
        logits_RV, is_own = self._compute(step, vectors_ID)
        return Results(logits_RV if is_own else logits_RV.clone(), None)

    @torch.inference_mode()
    def launch(
        self,
        step: PlannedStep,
        vectors_ID: Tensor | None,
        plan: DrawPlan,
        bans: SequenceOf[tuple[int, ...]],
    ) -> PendingTokens:
        self._enter()
        logits_RV, _ = self._compute(step, vectors_ID)
        tokens_R = self._choose(logits_RV, plan, bans)
        self.executor.inputs.last_tokens[: step.num_chosen].copy_(tokens_R)
        self._share_tokens(step.num_chosen)
        return self._ring.fetch(tokens_R)

    @torch.inference_mode()
    def follow(self, step: PlannedStep) -> None:
        self._enter()
        self._compute(step, None)
        self._share_tokens(step.num_chosen)

    def _share_tokens(self, num_chosen: int) -> None:
        """Broadcast the tokens that rank 0 chose, so that every rank can look them up."""
        if num_chosen:
            self.communicator.broadcast(self.executor.inputs.last_tokens[:num_chosen])

    def _enter(self) -> None:
        """The engine's thread may not be the one that loaded."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _choose(
        self, logits_RV: Tensor, plan: DrawPlan, bans: SequenceOf[tuple[int, ...]]
    ) -> Tensor:
        if logits_RV.shape[0] == 0:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        self._bans.apply(logits_RV, bans)
        sent = self._ring.send(*plan.arrays) if plan.draws else []
        return choose_tokens(logits_RV, plan, sent, may_look=False)

    def _compute(self, step: PlannedStep, vectors_ID: Tensor | None) -> tuple[Tensor, bool]:
        """Logits of the wanted rows, and whether nothing else uses their memory."""
        size = self._graph_for(step)
        if size is None:
            residual_TD = self._prefill(step, vectors_ID)
            if not step.logit_rows_R.size:
                return self._no_logits(), True
            residual_RD = residual_TD.index_select(0, self._sent(step.logit_rows_R))
            return self.executor.logits(self.executor.normed(residual_RD)), True
        return self._logits_of(step, self._replay(step, size, vectors_ID))

    def _compute_with_hidden(
        self, step: PlannedStep, vectors_ID: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the wanted rows, the caller's to change, and hidden states of all rows."""
        size = self._graph_for(step)
        if size is not None:
            logits_RV, is_own = self._logits_of(step, self._replay(step, size, vectors_ID))
            hidden_TD = self.executor.hidden(size)[: step.num_rows]
            return logits_RV if is_own else logits_RV.clone(), hidden_TD
        hidden_TD = self.executor.normed(self._prefill(step, vectors_ID))
        if not step.logit_rows_R.size:
            return self._no_logits(), hidden_TD
        hidden_RD = hidden_TD.index_select(0, self._sent(step.logit_rows_R))
        return self.executor.logits(hidden_RD), hidden_TD

    def _graph_for(self, step: PlannedStep) -> int | None:
        """The graph that computes the step best; None: a prefill does.

        A graph reads a chunk's context once a row, a prefill once in all, whose products take
        longer. With a single graph, all goes through it (`deterministic`).
        """
        size = size_for(step.num_rows, self.executor.sizes)
        if size is None or len(self.executor.sizes) == 1:
            return size
        counts_S = np.diff(step.query_starts_S1)
        tokens = int((counts_S * step.context_lengths_S)[counts_S >= _CHUNK_ROWS].sum())
        slots = self.cache.num_pages * self.cache.block_tokens
        num_bytes = tokens * self.cache.num_bytes / slots
        return None if num_bytes > _READ_AGAIN * self.executor.num_weight_bytes else size

    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.config.vocab_size, device=self._device)

    def _sent(self, array: NDArray[np.int64]) -> Tensor:
        (sent,) = self._ring.send(array)
        return sent

    def _replay(self, step: PlannedStep, size: int, vectors_ID: Tensor | None) -> Tensor:
        """Logits of all rows of a graph, overwritten by the next step."""
        self._num_replays += 1
        fill_inputs(self.executor, step, size, vectors_ID, self._ring)
        return self.executor.replay(size)

    def _logits_of(self, step: PlannedStep, logits_TV: Tensor) -> tuple[Tensor, bool]:
        """Select the wanted rows of a graph's logits; also whether they are a copy, which the
        caller may change.
        """
        if self.communicator.rank > 0:
            return logits_TV, True
        rows = step.logit_rows_R
        if np.array_equal(rows, np.arange(len(rows))):
            return logits_TV[: len(rows)], False
        return logits_TV.index_select(0, self._sent(rows)), True

    def _prefill(self, step: PlannedStep, vectors_ID: Tensor | None) -> Tensor:
        """The residual stream after the last layer, (T, D)."""
        self._num_prefills += 1
        inputs = self.executor.inputs
        return self.executor.prefill(
            prefill_batch(inputs, step, self.cache.block_tokens, self._ring, vectors_ID)
        )


class HopperDraft:
    """A draft model on the CUDA kernels, over the target's page table.

    Its entries are rows of a graph, or of a prefill, as the target's tokens are.
    """

    def __init__(self, executor: DraftExecutor, cache: PagedCache) -> None:
        """`executor` shares the inputs of the target's; `cache` is as large as the target's."""
        self.executor = executor
        self.cache = cache
        self._ring = PinnedRing(executor.inputs.packed_5T.device)

    @torch.inference_mode()
    def advance(self, step: PlannedStep, hidden_TD: Tensor, vectors_ID: Tensor | None) -> Guessed:
        executor, rows = self.executor, step.logit_rows_R.tolist()
        size = size_for(step.num_rows, executor.sizes)
        if size is None:
            batch = prefill_batch(
                executor.inputs, step, self.cache.block_tokens, self._ring, vectors_ID, hidden_TD
            )
            return Guessed(executor.normed(executor.prefill(batch)[rows]), None)
        fill_inputs(executor, step, size, vectors_ID, self._ring)
        executor.hidden_TD[: step.num_rows].copy_(hidden_TD)
        logits_TV = executor.replay(size)
        return Guessed(executor.hidden(size)[rows], logits_TV[rows])

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.executor.logits(hidden_RD)


def fill_inputs(
    executor: RowExecutor,
    step: PlannedStep,
    size: int,
    vectors_ID: Tensor | None,
    ring: PinnedRing,
) -> None:
    """Put a step's rows where the graph of `size` rows reads them, and pad them.

    Padding rows store nothing and read one slot. Vectors of images become rows behind the
    vocabulary's embeddings, and their numbers the rows' token ids, which every rank must know.
    """
    apply_changes(step.changes, executor.inputs.table, ring)
    packed_5T = np.zeros((5, size), dtype=np.int64)
    packed_5T[1] = packed_5T[3] = -1
    packed_5T[:, : step.num_rows] = step.packed_5T
    if step.image_rows_I is not None:
        first, count = executor.config.vocab_size, len(step.image_rows_I)
        packed_5T[0, step.image_rows_I] = np.arange(first, first + count)
        if vectors_ID is not None:
            executor.spare_VD[:count].copy_(vectors_ID)
    executor.inputs.packed_5T[:, :size].copy_(ring.send(packed_5T)[0])


def apply_changes(changes: TableChanges, table: Tensor, ring: PinnedRing) -> None:
    """Write what has changed into the page table on the device."""
    if changes.places_X.size:
        places_X, pages_X = ring.send(*changes)
        table.view(-1).index_copy_(0, places_X, pages_X.int())


def prefill_batch(
    inputs: RowInputs,
    step: PlannedStep,
    block_tokens: int,
    ring: PinnedRing,
    vectors_ID: Tensor | None,
    hidden_TD: Tensor | None = None,
) -> PrefillBatch:
    """Lay out a step's rows on their device as a prefill takes them.

    The leading spans of one row each attend as singles, the others as chunks.
    """
    apply_changes(step.changes, inputs.table, ring)
    token_ids_T, sources_T, positions_T, slots_T, tables_T = ring.send(step.packed_5T)[0]
    is_longer_S = np.diff(step.query_starts_S1) > 1
    num_singles = int(is_longer_S.argmax()) if is_longer_S.any() else len(is_longer_S)
    singles = None
    if num_singles:
        table_width = -(-int(step.context_lengths_S[:num_singles].max()) // block_tokens)
        table = inputs.table[:, :table_width].index_select(0, tables_T[:num_singles])
        singles = Singles(table, (positions_T[:num_singles] + 1).int())
    chunks = []
    starts, lengths = step.query_starts_S1.tolist(), step.context_lengths_S.tolist()
    for index in range(num_singles, len(lengths)):
        first_row, num_rows = starts[index], starts[index + 1] - starts[index]
        num_pages = -(-lengths[index] // block_tokens)
        pages_P = inputs.table[int(step.table_rows_S[index]), :num_pages]
        chunks.append(Chunk(first_row, num_rows, lengths[index] - num_rows, pages_P))
    image_rows_I = None
    if step.image_rows_I is not None:
        image_rows_I = torch.from_numpy(step.image_rows_I).to(token_ids_T.device)
    return PrefillBatch(
        look_up(token_ids_T, sources_T, inputs.last_tokens),
        positions_T,
        slots_T,
        tuple(chunks),
        singles,
        image_rows_I,
        vectors_ID,
        hidden_TD,
    )


def paged_kv(cache: PagedCache) -> KvCache:
    """The engine's FP8 cache as the kernels see it: the same memory as bytes."""
    assert cache.format == "fp8"
    keys, values = zip(*cache.layers, strict=True)
    return KvCache(
        tuple(key.view(torch.uint8) for key in keys),
        tuple(value.view(torch.uint8) for value in values),
    )
