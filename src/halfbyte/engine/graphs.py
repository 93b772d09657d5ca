"""The device side of the CUDA runner: decode graphs by size, prefill, head; all on real launches.

`hopper` decides what runs; here are the steps and the memory they share. A graph of n rows
serves any step of up to n tokens, prompts included: every token is a row with a context length of
its own, and keys and values are stored before anybody attends.

Shapes: T rows, D model width, V padded vocabulary, R rows with logits, P pages of a sequence.
"""

import bisect
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.kernels.cuda.compiler import compile_kernel
from halfbyte.kernels.cuda.library import (
    COLUMNS,
    PREFILL_CONFIGS,
    HeadShape,
    attention_code,
    choose_config,
    chunk_attention_code,
    columns_for,
    compile_together,
    elementwise_code,
    linear_code,
    prefill_code,
)
from halfbyte.log import logger
from halfbyte.model.cuda.decode import DecodeStep
from halfbyte.model.cuda.launches import (
    CudaModel,
    attention_kind,
    head_logits,
    rounded_input,
)
from halfbyte.model.cuda.prefill import GRAPH_SIZES, Prefill
from halfbyte.model.cuda.prefill_batch import Chunk, PrefillBatch
from halfbyte.model.cuda.weights import CudaWeights
from halfbyte.model.parallel import Communicator, embedding_rows, split
from halfbyte.model.saturation import SaturationCounts

# Rows a graph may have: the widest streaming linear.
MAX_ROWS = COLUMNS[-1]
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, MAX_ROWS)
# One size for everything in deterministic mode; smaller ones would make prompts slow.
_LEAST_FIXED_ROWS = 64


def graph_sizes(max_sequences: int, *, deterministic: bool) -> tuple[int, ...]:
    """Sizes that are captured, ascending; deterministic: a single one that holds everything."""
    if deterministic:
        return (columns_for(max(_LEAST_FIXED_ROWS, max_sequences)),)
    return _SIZES


def size_for(num_rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest graph that holds so many rows; None if none does."""
    index = bisect.bisect_left(sizes, num_rows)
    return None if index == len(sizes) else sizes[index]


class RowInputs(NamedTuple):
    """Tensors on the device from which every graph reads what a step's rows are.

    packed_5T    int64: token id; row of `last_tokens` to take it from instead, or -1; position;
                 slot of the cache, -1 stores nothing; row of `table`
    last_tokens  int64, the tokens that the step before chose
    table        int32, pages of each running sequence
    """

    packed_5T: Tensor
    last_tokens: Tensor
    table: Tensor


def make_inputs(
    num_tables: int, max_pages: int, max_chosen: int, device: torch.device
) -> RowInputs:
    """Inputs whose rows do no harm: they store nothing and read the first slot of page 0."""
    packed_5T = torch.zeros(5, MAX_ROWS, dtype=torch.int64, device=device)
    packed_5T[1] = -1
    packed_5T[3] = -1
    return RowInputs(
        packed_5T,
        torch.zeros(max_chosen, dtype=torch.int64, device=device),
        torch.zeros(num_tables, max_pages, dtype=torch.int32, device=device),
    )


class StepRows(NamedTuple):
    """Inputs of one step, unpacked into a tensor for each quantity."""

    token_ids_T: Tensor
    positions_T: Tensor
    context_lengths_T: Tensor
    slots_T: Tensor
    block_table_TP: Tensor


def unpack(inputs: RowInputs, num_rows: int) -> StepRows:
    """The first rows of the inputs; tokens of the step before are looked up."""
    token_ids_T, sources_T, positions_T, slots_T, tables_T = inputs.packed_5T[:, :num_rows]
    return StepRows(
        look_up(token_ids_T, sources_T, inputs.last_tokens),
        positions_T,
        (positions_T + 1).int(),
        slots_T,
        inputs.table.index_select(0, tables_T),
    )


def look_up(token_ids_T: Tensor, sources_T: Tensor, last_tokens: Tensor) -> Tensor:
    """Token ids, those with a source taken from the last step (0 where it found none)."""
    found_T = last_tokens[sources_T.clamp(min=0)].clamp(min=0)
    return torch.where(sources_T >= 0, found_T, token_ids_T)


class RowExecutor(Protocol):
    """Computes steps of rows for a model, or for a draft model beside it."""

    @property
    def config(self) -> TextConfig: ...

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of its own weights on this rank, without what a draft model borrows."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def inputs(self) -> RowInputs: ...

    @property
    def spare_VD(self) -> Tensor:
        """Rows behind the vocabulary's embeddings, where vectors of images are put.

        Row i is read as token id `vocab_size` + i. Rank 0 of several has them.
        """

    def replay(self, size: int) -> Tensor:
        """Run a step of the first `size` rows of `inputs`; returns logits f32 (size, V).

        The next step overwrites the logits.
        """

    def hidden(self, size: int) -> Tensor:
        """What the head read in the last `replay` of this size: (size, D), the caller's."""

    def prefill(self, batch: PrefillBatch) -> Tensor:
        """Run a batch through all layers; returns the residual stream after the last, (T, D)."""

    def normed(self, residual_RD: Tensor) -> Tensor:
        """Apply the final norm to rows of `prefill`'s result: (R, D)."""

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Apply the head to rows behind the final norm: f32 (R, V)."""

    def facts(self) -> dict[str, object]: ...


class Executor(RowExecutor, Protocol):
    """Computes the model's steps: `HopperExecutor` with kernels, a twin in plain torch in tests.

    Decision 0038 says why there is a twin.
    """

    @property
    def communicator(self) -> Communicator:
        """The ranks that compute every step together; rank 0 alone gets logits."""

    @property
    def saturation(self) -> SaturationCounts | None:
        """Counts of clipped activations, where the engine was told to count."""


class DraftExecutor(RowExecutor, Protocol):
    """Computes entries of a draft model (`drafter`), in the rows of an `Executor`'s inputs.

    A row of entry p holds the token at p + 1, position p and its slot. A `prefill`'s batch has
    hidden states; norm and head are those that give guesses.
    """

    @property
    def hidden_TD(self) -> Tensor:
        """Where the hidden states beside the tokens of a `replay` are put, (MAX_ROWS, D)."""


def compile_kernels(weights: CudaWeights, page_slots: int, sizes: Sequence[int]) -> None:
    """Compile what steps of these sizes need, in parallel, into the cache on disk."""
    config = weights.config
    heads = HeadShape(config.head_dim, config.num_heads, config.num_kv_heads)
    formats = sorted({linear.weight.format for linear in weights.linears})
    # The head takes any number of rows of a prefill.
    widths = sorted({columns_for(size) for size in sizes} | set(COLUMNS))
    tasks: list[Callable[[], bytes]] = [
        partial(linear_code, format_, width, choose_config(format_, width))
        for width in widths
        for format_ in formats
    ]
    tasks += [partial(prefill_code, *key) for key in PREFILL_CONFIGS if key[0] in formats]
    tasks.append(partial(chunk_attention_code, heads, page_slots))
    tasks += [
        partial(elementwise_code, config.width, config.mlp_width, blocks, heads)
        for blocks in (8, 2, 1)
    ]
    kinds = {attention_kind(layer.o) for layer in weights.layers}
    tasks += [
        partial(attention_code, heads, page_slots, kind, num_warps)
        for kind in sorted({*kinds, "bf16"})
        for num_warps in (8, 4, 2)
    ]
    tasks += [partial(compile_kernel, name, {}) for name in ("gather", "layout")]
    compile_together(tasks)


class HopperExecutor:
    """Graphs, prefill and head over one set of weights and one cache; a draft model's as well."""

    def __init__(
        self,
        model: CudaModel,
        inputs: RowInputs,
        communicator: Communicator,
        *,
        sizes: tuple[int, ...],
        max_batch_tokens: int,
    ) -> None:
        """Lay out buffers and prefill; graphs are recorded by `capture`, after the cache."""
        self.saturation = model.saturation
        self._model = model
        self._weights = weights = model.weights
        self._inputs = inputs
        self._communicator = communicator
        self._sizes = sizes
        self._max_context_tokens = inputs.table.shape[1] * model.cache.page_slots
        num_ranks, vocab_size = communicator.size, weights.config.vocab_size
        self._widths = tuple(len(split(vocab_size, rank, num_ranks)) for rank in range(num_ranks))
        self._prefill = Prefill(
            model,
            max_batch_tokens,
            fast_accumulation=True,
            max_context_tokens=self._max_context_tokens,
        )
        # Graphs of a draft model read it.
        num_hidden = 0 if weights.fuse is None else MAX_ROWS
        self.hidden_TD = torch.zeros(
            num_hidden, weights.config.width, dtype=torch.bfloat16, device=model.library.device
        )
        self._steps: dict[int, DecodeStep] = {}
        self._capture_s = 0.0
        self._graph_bytes = 0
        num_logits = MAX_ROWS * weights.head.weight.out_features
        self._logits_TV = model.shared.take(
            "logits", num_logits, torch.float32, model.library.device
        ).view(MAX_ROWS, -1)

    @property
    def config(self) -> TextConfig:
        return self._weights.config

    @property
    def num_weight_bytes(self) -> int:
        return self._weights.num_bytes

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def inputs(self) -> RowInputs:
        return self._inputs

    @property
    def spare_VD(self) -> Tensor:
        is_part = self._weights.vocab is not None
        return self._weights.embedding_VD[self._weights.num_logits + is_part :]

    @property
    def communicator(self) -> Communicator:
        return self._communicator

    def _rows_of(self, token_ids_T: Tensor) -> Tensor:
        """Token ids as rows of this device's embedding table."""
        vocab = self._weights.vocab
        if vocab is None:
            return token_ids_T
        has_spare = len(self.spare_VD) > 0
        return embedding_rows(token_ids_T, vocab, self.config.vocab_size, has_spare=has_spare)

    def _whole(self, logits_RO: Tensor) -> Tensor:
        """Logits of the whole vocabulary, on rank 0."""
        local_RO = logits_RO[:, : self._weights.num_logits]
        if self._communicator.size == 1:
            return local_RO
        return self._communicator.gather(local_RO, self._widths)

    def _make_step(self, size: int) -> DecodeStep:
        def prepare(step: DecodeStep) -> None:
            rows = unpack(self._inputs, size)
            step.token_ids_T.copy_(self._rows_of(rows.token_ids_T))
            step.positions_T.copy_(rows.positions_T)
            step.context_lengths_T.copy_(rows.context_lengths_T)
            step.slots_T.copy_(rows.slots_T)
            step.block_table_TP.copy_(rows.block_table_TP)
            if self.saturation is not None:
                step.is_image_T.copy_(rows.token_ids_T >= self.config.vocab_size)
            if self._weights.fuse is not None:
                step.join(self.hidden_TD[:size])

        return DecodeStep(
            self._model,
            size,
            max_context_tokens=self._max_context_tokens,
            prepare=prepare,
            logits_TV=self._logits_TV[:size],
        )

    def allocate(self) -> None:
        """Take the memory that all steps share; call it before the cache is sized."""
        self._make_step(self._sizes[-1])

    @torch.inference_mode()
    def warm_up(self, num_tokens: int, *, gives_hidden: bool = False) -> None:
        """Run a prefill of so many tokens that stores nothing: its memory is held from then on.

        gives_hidden  every row's state behind the norm will be asked for, not only the last one's
        """
        device = self._model.library.device
        positions_T = torch.arange(num_tokens, device=device)
        slots_T = torch.full_like(positions_T, -1)
        num_pages = -(-num_tokens // self._model.cache.page_slots)
        chunk = Chunk(0, num_tokens, 0, torch.zeros(num_pages, dtype=torch.int32, device=device))
        batch = PrefillBatch(torch.zeros_like(positions_T), positions_T, slots_T, (chunk,))
        if self._weights.fuse is not None:
            hidden_TD = self.hidden_TD[:1].expand(num_tokens, -1)
            batch = replace(batch, hidden_TD=hidden_TD.contiguous())
        residual_TD = self.prefill(batch)
        hidden_TD = self.normed(residual_TD if gives_hidden else residual_TD[-1:])
        self.logits(hidden_TD[-1:])
        torch.cuda.synchronize()

    @torch.inference_mode()
    def capture(self) -> None:
        """Record a CUDA graph for steps of every size, and for short prefills."""
        start = time.perf_counter()
        torch.cuda.empty_cache()  # capturing does it too, which would hide what graphs take
        free_before, _ = torch.cuda.mem_get_info()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            step = self._make_step(size)
            step.capture(pool)
            self._steps[size] = step
        if self._weights.fuse is None and len(self._sizes) > 1:
            self._prefill.capture(GRAPH_SIZES, pool)
        torch.cuda.synchronize()
        self._communicator.before_close(self._release)
        self._capture_s = time.perf_counter() - start
        self._graph_bytes = free_before - torch.cuda.mem_get_info()[0]
        logger.info(
            "%d graphs of %s rows captured in %.1f s: %.1f MB, %.1f MB shared by all steps",
            len(self._sizes),
            ", ".join(map(str, self._sizes)),
            self._capture_s,
            self._graph_bytes / 1e6,
            self._model.shared.num_bytes / 1e6,
        )

    def _release(self) -> None:
        self._steps.clear()
        self._prefill.release()
        # Steps and their graphs may be part of cycles.
        gc.collect()

    def replay(self, size: int) -> Tensor:
        self._steps[size].replay()
        return self._whole(self._logits_TV[:size])

    def run_eagerly(self, size: int) -> Tensor:
        """Compute what `replay` computes without the graph; for tests."""
        self._steps[size].run()
        return self._whole(self._logits_TV[:size])

    def prefill(self, batch: PrefillBatch) -> Tensor:
        token_ids_T = self._rows_of(batch.token_ids_T)
        return self._prefill.forward(replace(batch, token_ids_T=token_ids_T))

    def normed(self, residual_RD: Tensor) -> Tensor:
        return self._prefill.normed(residual_RD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        parts = [self._logits(part) for part in torch.split(hidden_RD, MAX_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        head = self._weights.head
        if self.saturation is not None and head.activation_kind == "e4m3":
            self.saturation.add_codes("head", rounded_input(head, hidden_RD)[0])
        return self._whole(head_logits(self._model.library, head, hidden_RD))

    def hidden(self, size: int) -> Tensor:
        return self._steps[size].read_hidden()

    def facts(self) -> dict[str, object]:
        return {
            "decoder": "CUDA kernels, one graph a size",
            "graph_sizes": list(self._sizes),
            "graph_bytes": self._graph_bytes,
            "graph_capture_s": round(self._capture_s, 2),
            "shared_bytes": self._model.shared.num_bytes,
            "products": self._weights.mode,
            "ranks": self._communicator.size,
        }
