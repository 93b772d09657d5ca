"""The runner on the CUDA kernels: planned work as rows of a graph, or as a prefill; tokens chosen
on the device and read one step late.

`launch` starts a step and returns before it is done; nothing in it waits for the device (a list
of banned tokens that was never seen before, and images, aside). What a row's token is may be known
to the device only: `Sequence.pending_row` says where the step before left it.

Shapes: T rows, R rows with logits, V vocabulary, P pages, S sequences.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.batch import ChunkPlace, RowStep
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.choose import BanTable, ChoicePlan, choose_tokens, plan_choice
from halfbyte.engine.config import EngineConfig, free_cache_bytes, resolve
from halfbyte.engine.graphs import (
    MAX_ROWS,
    Executor,
    HopperExecutor,
    RowInputs,
    compile_kernels,
    graph_sizes,
    look_up,
    make_inputs,
    size_for,
)
from halfbyte.engine.images import ImageEncoder, Placement
from halfbyte.engine.scheduler import Work
from halfbyte.engine.workers import Workers, config_of
from halfbyte.errors import UsageError
from halfbyte.kernels.cuda.library import KernelLibrary
from halfbyte.log import logger
from halfbyte.model.cuda_decoder import (
    Chunk,
    CudaWeights,
    KvCache,
    PrefillBatch,
    SharedBuffers,
    Singles,
    make_cache,
)
from halfbyte.model.cuda_load import load_cuda_weights
from halfbyte.model.load import load_vision
from halfbyte.model.parallel import Communicator, Solo, shard_of
from halfbyte.model.vision import VisionModel

# Steps whose staging memory may be in use at once: one runs, one waits, and one to spare.
_IN_FLIGHT = 3
# Kept free beside the cache: what captured graphs hold for themselves, and the libraries.
_RESERVED_BYTES = 512 * 2**20


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


class CudaRunner:
    """Runs steps on one device through an `Executor`."""

    def __init__(
        self,
        executor: Executor,
        cache: PagedCache,
        config: EngineConfig,
        vision: VisionModel | None = None,
        workers: Workers | None = None,
    ) -> None:
        """`config` is resolved; without `vision` requests have no images."""
        assert config.kv_cache_tokens is not None and config.max_model_len is not None
        self._workers = workers
        self.decoder = executor
        self.cache = cache
        self.device = executor.inputs.packed_5T.device
        self.images = None if vision is None else ImageEncoder(vision)
        self._block_tokens = config.block_tokens
        self._staging = Staging(self.device)
        self._table = PageTable(executor.inputs.table, self._staging)
        self._bans = BanTable(executor.config.vocab_size, self.device)
        self._facts: dict[str, object] = {}
        self._num_replays = 0
        self._num_prefills = 0

    def facts(self) -> dict[str, object]:
        """What runs the model and what it holds, for people."""
        return {**self.decoder.facts(), **self._facts}

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """What the loader knows."""
        self._facts.update(facts)

    @property
    def weight_bytes(self) -> int:
        """Of the weights of all ranks."""
        others = 0 if self._workers is None else self._workers.weight_bytes
        return self.decoder.num_weight_bytes + others

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache of all ranks."""
        return self.cache.num_bytes * self.decoder.communicator.size

    @property
    def failure(self) -> str | None:
        """Why no step can run any more: another rank has died."""
        return None if self._workers is None else self._workers.failure

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self._workers is not None:
            self._workers.close()

    @property
    def num_replays(self) -> int:
        """Steps that went through a graph."""
        return self._num_replays

    @property
    def num_prefills(self) -> int:
        """Steps that went through the products for many rows."""
        return self._num_prefills

    @torch.inference_mode()
    def run(self, works: SequenceOf[Work]) -> Tensor:
        """Compute the tokens of `works`; f32 logits (R, V), the caller's to change."""
        self._enter()
        step, vectors_ID = self._plan(works, 0)
        with self._all_ranks(step):
            logits_RV, is_own = self._compute(step, vectors_ID)
        return logits_RV if is_own else logits_RV.clone()

    def run_alone(self, work: Work) -> Tensor:
        """As `run`, for a sequence that has blocks but no slot: it is not scheduled."""
        return self.run([work])

    @torch.inference_mode()
    def launch(self, works: SequenceOf[Work]) -> PendingTokens:
        """Start a step and the choice of its tokens: one for each work that reaches the last known
        token, in order. Every such sequence is choosable (`choose.is_choosable`).
        """
        self._enter()
        plan = plan_choice([work.sequence for work in works if work.is_last])
        num_chosen = sum(work.is_last for work in works)
        step, vectors_ID = self._plan(works, num_chosen)
        with self._all_ranks(step):
            logits_RV, _ = self._compute(step, vectors_ID)
            tokens_R = self._choose(logits_RV, plan)
            self.decoder.inputs.last_tokens[:num_chosen].copy_(tokens_R)
            self._share_tokens(num_chosen)
        return self._staging.fetch(tokens_R)._replace(workers=self._workers)

    @torch.inference_mode()
    def follow(self, step: RowStep) -> None:
        """Compute this rank's part of a step that rank 0 planned."""
        self._enter()
        self._compute(step, None)
        self._share_tokens(step.num_chosen)

    def _all_ranks(self, step: RowStep) -> AbstractContextManager[None]:
        """Within it, all ranks compute the step."""
        return nullcontext() if self._workers is None else self._workers.running(step)

    def _share_tokens(self, num_chosen: int) -> None:
        """What rank 0 chose is where every rank looks it up."""
        if num_chosen:
            self.decoder.communicator.broadcast(self.decoder.inputs.last_tokens[:num_chosen])

    def _enter(self) -> None:
        """The engine's thread may not be the one that loaded."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _choose(self, logits_RV: Tensor, plan: ChoicePlan) -> Tensor:
        if logits_RV.shape[0] == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        bans = self._bans.rows_of(plan.bans) if any(plan.bans) else None
        arrays: list[NDArray[Any]] = []
        if bans is not None:
            arrays.append(np.array(bans, dtype=np.int64))
        if plan.draws:
            arrays.append(plan.numbers)
            arrays += [np.array(r, dtype=np.int64) for r in (plan.open_rows, plan.filtered_rows)]
        sent = self._staging.send(*arrays) if arrays else []
        if bans is not None:
            self._bans.apply(logits_RV, sent.pop(0))
        if not plan.draws:
            return choose_tokens(logits_RV, plan, None, None)
        return choose_tokens(logits_RV, plan, sent[0], (sent[1], sent[2]))

    def _plan(self, works: SequenceOf[Work], num_chosen: int) -> tuple[RowStep, Tensor | None]:
        """The step in host arrays, and the image vectors of a prefill."""
        num_rows = sum(work.num_rows for work in works)
        size = size_for(num_rows, self.decoder.sizes)
        table_rows, places_X, pages_X = self._table.changes(works)
        layout = lay_out_rows(works, table_rows, self._block_tokens, size or num_rows)
        placement = None if self.images is None else self.images.place(works)
        image_rows_I, vectors_ID = None, None
        if placement is not None and placement.vectors_ID is not None:
            if size is None:
                image_rows_I, vectors_ID = placement.rows_I.cpu().numpy(), placement.vectors_ID
            else:
                self._place_images(placement, layout.packed_5T)
        num_singles = _num_singles(works) if size is None else 0
        step = RowStep(
            places_X,
            pages_X,
            layout.packed_5T,
            size,
            num_singles,
            max((len(work.sequence.blocks) for work in works[:num_singles]), default=0),
            self._chunks(works, table_rows, num_singles) if size is None else (),
            np.array(layout.logit_rows, dtype=np.int64),
            image_rows_I,
            num_chosen,
        )
        return step, vectors_ID

    def _place_images(self, placement: Placement, packed_5T: NDArray[np.int64]) -> None:
        """Vectors of images become rows behind the vocabulary's embeddings, and their numbers
        the rows' token ids.
        """
        assert placement.vectors_ID is not None
        rows = placement.rows_I.tolist()
        self.decoder.spare_VD[: len(rows)].copy_(placement.vectors_ID)
        vocab_size = self.decoder.config.vocab_size
        packed_5T[0, rows] = np.arange(vocab_size, vocab_size + len(rows))

    def _chunks(
        self, works: SequenceOf[Work], table_rows: SequenceOf[int], num_singles: int
    ) -> tuple[ChunkPlace, ...]:
        chunks = []
        row = num_singles
        for work, table_row in zip(works[num_singles:], table_rows[num_singles:], strict=True):
            num_pages = -(-(work.start + work.num_rows) // self._block_tokens)
            chunks.append(ChunkPlace(row, work.num_rows, work.start, table_row, num_pages))
            row += work.num_rows
        return tuple(chunks)

    def _compute(self, step: RowStep, vectors_ID: Tensor | None) -> tuple[Tensor, bool]:
        """Logits of the wanted rows, and whether they are no one else's memory."""
        self._table.apply(step.places_X, step.pages_X)
        if step.size is None:
            return self._prefill(step, vectors_ID), True
        (packed_5T,) = self._staging.send(step.packed_5T)
        self.decoder.inputs.packed_5T[:, : step.size].copy_(packed_5T)
        self._num_replays += 1
        logits_TV = self.decoder.replay(step.size)
        if self.decoder.communicator.rank > 0:
            return logits_TV, True
        rows = step.logit_rows_R
        if np.array_equal(rows, np.arange(len(rows))):
            return logits_TV[: len(rows)], False
        (rows_R,) = self._staging.send(rows)
        return logits_TV.index_select(0, rows_R), True

    def _prefill(self, step: RowStep, vectors_ID: Tensor | None) -> Tensor:
        self._num_prefills += 1
        (packed_5T, logit_rows_R) = self._staging.send(step.packed_5T, step.logit_rows_R)
        token_ids_T, sources_T, positions_T, slots_T, tables_T = packed_5T
        inputs: RowInputs = self.decoder.inputs
        singles = None
        if step.num_singles:
            table = inputs.table[:, : step.table_width]
            table = table.index_select(0, tables_T[: step.num_singles])
            singles = Singles(table, (positions_T[: step.num_singles] + 1).int())
        chunks = []
        for chunk in step.chunks:
            pages_P = inputs.table[chunk.table_row, : chunk.num_pages].long()
            chunks.append(Chunk(chunk.first_row, chunk.num_rows, chunk.start, pages_P))
        image_rows_I = None
        if step.image_rows_I is not None:
            image_rows_I = torch.from_numpy(step.image_rows_I).to(self.device)
        batch = PrefillBatch(
            look_up(token_ids_T, sources_T, inputs.last_tokens),
            positions_T,
            slots_T,
            tuple(chunks),
            singles,
            image_rows_I,
            vectors_ID,
        )
        residual_TD = self.decoder.prefill(batch)
        if not step.logit_rows_R.size:
            return torch.empty(0, self.decoder.config.vocab_size, device=self.device)
        return self.decoder.head(residual_TD.index_select(0, logit_rows_R))


def _num_singles(works: SequenceOf[Work]) -> int:
    """Leading works of a single token each."""
    for index, work in enumerate(works):
        if work.num_rows > 1:
            return index
    return len(works)


def paged_kv(cache: PagedCache) -> KvCache:
    """The engine's FP8 cache as the kernels see it: the same memory as bytes."""
    assert cache.format == "fp8"
    keys, values = zip(*cache.layers, strict=True)
    return KvCache(
        tuple(key.view(torch.uint8) for key in keys),
        tuple(value.view(torch.uint8) for value in values),
    )


def check_limits(config: EngineConfig) -> None:
    """Raise UsageError for a configuration that the deterministic mode cannot keep."""
    if config.deterministic and config.max_sequences > MAX_ROWS:
        raise UsageError(
            f"max_sequences {config.max_sequences}: deterministic runs every step through one "
            f"graph of at most {MAX_ROWS} rows"
        )


def fit_to_graphs(config: EngineConfig) -> EngineConfig:
    """The configuration with what the graphs ask of it: deterministic steps fit the one graph."""
    check_limits(config)
    if not config.deterministic:
        return config
    (size,) = graph_sizes(config.max_sequences, deterministic=True)
    return replace(config, max_batch_tokens=size)


def load_cuda_runner(
    checkpoint: Checkpoint, config: EngineConfig, workers: Workers | None = None
) -> tuple[CudaRunner, EngineConfig]:
    """Weights, cache and graphs on a Hopper GPU; `cuda_load.reason_against` found nothing.

    With `workers`, started and not yet joined, this is rank 0 of several.
    """
    start = time.perf_counter()
    config = fit_to_graphs(config)
    communicator: Communicator = Solo() if workers is None else workers.join(uses_kernels=True)
    local = config if workers is None else config_of(config, 0)
    library, weights = load_rank(checkpoint, local, communicator)
    with torch.inference_mode():
        vision = load_vision(checkpoint, device=library.device)
    torch.cuda.synchronize()
    weights_s = time.perf_counter() - start

    def settle(free_bytes: int) -> EngineConfig:
        """The cache is sized by the rank that has least room."""
        if workers is None:
            return resolve(local, weights.config, "fp8", free_bytes)
        free_bytes = min(free_bytes, workers.free_bytes())
        resolved = resolve(local, weights.config, "fp8", free_bytes)
        workers.make_caches(replace(resolved, device=config.device))
        return resolved

    if workers is not None:
        workers.connect()
    runner, resolved = build_runner(
        library, weights, local, vision, communicator=communicator, settle=settle, workers=workers
    )
    facts = {
        "load_weights_s": round(weights_s, 2),
        "load_s": round(time.perf_counter() - start, 2),
    }
    runner.add_facts(facts)
    logger.info(
        "%s: %.1f MB of weights in %.1f s (%.2f GB/s a rank), ready after %.1f s",
        checkpoint.directory.name,
        runner.weight_bytes / 1e6,
        weights_s,
        weights.num_bytes / 1e9 / weights_s,
        time.perf_counter() - start,
    )
    return runner, resolved


def load_rank(
    checkpoint: Checkpoint, config: EngineConfig, communicator: Communicator
) -> tuple[KernelLibrary, CudaWeights]:
    """A rank's kernels and weights on its device. Images need rows of rank 0 alone."""
    device = torch.device(config.device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    _free_what_is_gone()
    library = KernelLibrary(device)
    has_images = checkpoint.config.vision is not None and communicator.rank == 0
    shard = None
    if communicator.size > 1:
        shard = shard_of(checkpoint.config.text, communicator.rank, communicator.size)
    with torch.inference_mode():
        weights = load_cuda_weights(
            checkpoint,
            device,
            num_spare_embeddings=MAX_ROWS if has_images else 0,
            shard=shard,
            mode=config.products,
        )
    return library, weights


def _free_what_is_gone() -> None:
    """Give back the memory of an engine that was here before: it is only gone once its cycles are,
    and two sets of weights may not fit at once.
    """
    gc.collect()
    torch.cuda.empty_cache()


def build_runner(
    library: KernelLibrary,
    weights: CudaWeights,
    config: EngineConfig,
    vision: VisionModel | None = None,
    *,
    communicator: Communicator | None = None,
    settle: Callable[[int], EngineConfig] | None = None,
    workers: Workers | None = None,
) -> tuple[CudaRunner, EngineConfig]:
    """A runner over weights that lie on the device: sizes the cache by what is left beside the
    memory that steps need, which is taken first.

    communicator  connected; every rank builds at the same time, as steps are tried and captured
    settle        free bytes -> the resolved configuration; by this rank alone if None
    """
    text, device = weights.config, library.device
    sizes = graph_sizes(config.max_sequences, deterministic=config.deterministic)
    longest = config.max_model_len or text.max_positions
    max_pages = -(-longest // config.block_tokens)
    _free_what_is_gone()
    compile_kernels(weights, config.block_tokens, sizes)
    shared = SharedBuffers()

    def executor(cache: KvCache, inputs: RowInputs) -> HopperExecutor:
        return HopperExecutor(
            library,
            weights,
            cache,
            inputs,
            sizes=sizes,
            max_batch_tokens=config.max_batch_tokens,
            shared=shared,
            communicator=communicator,
        )

    def inputs(num_pages: int) -> RowInputs:
        return make_inputs(config.max_sequences + 1, num_pages, config.max_sequences, device)

    # Everything that steps share, against a cache of one page; what it leaves is the cache's.
    trial = executor(make_cache(text, 1, config.block_tokens, device), inputs(1))
    trial.allocate()
    if config.max_batch_tokens > sizes[-1]:
        trial.warm_up(config.max_batch_tokens)
    del trial
    tables = (sum(sizes) * 2 + config.max_sequences + 1) * max_pages * 4
    reserved = _RESERVED_BYTES + tables
    free_bytes = max(0, free_cache_bytes(config) - reserved)
    resolved = resolve(config, text, "fp8", free_bytes) if settle is None else settle(free_bytes)
    assert resolved.kv_cache_tokens is not None and resolved.max_model_len is not None
    cache = PagedCache(
        text,
        format="fp8",
        num_pages=resolved.kv_cache_tokens // config.block_tokens,
        block_tokens=config.block_tokens,
        kv_scales=[(layer.k_scale, layer.v_scale) for layer in weights.layers],
        device=device,
    )
    pages = -(-resolved.max_model_len // config.block_tokens)
    final = executor(paged_kv(cache), inputs(pages))
    final.capture()
    return CudaRunner(final, cache, resolved, vision, workers), resolved
