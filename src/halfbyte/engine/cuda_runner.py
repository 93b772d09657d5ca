"""The runner on the CUDA kernels: planned work as rows of a graph, or as a prefill; tokens chosen
on the device and read one step late.

`launch` starts a step and returns before it is done; nothing in it waits for the device (a list
of banned tokens that was never seen before, and images, aside). What a row's token is may be known
to the device only: `Sequence.pending_row` says where the step before left it.

Shapes: T rows, R rows with logits, V vocabulary, P pages, S sequences.
"""

import gc
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.batch import ChunkPlace, Places, RowStep
from halfbyte.engine.cache import PagedCache, bytes_per_token
from halfbyte.engine.config import EngineConfig, draft_directory, free_cache_bytes, resolve
from halfbyte.engine.cuda_drafter import CudaDraftModel
from halfbyte.engine.drafter import Computed, Drafter
from halfbyte.engine.draw import BanLists, DrawPlan, choose_tokens, plan_draws
from halfbyte.engine.graphs import (
    MAX_ROWS,
    DraftExecutor,
    Executor,
    HopperExecutor,
    RowInputs,
    compile_kernels,
    graph_sizes,
    make_inputs,
    size_for,
)
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.rows import (
    PageTable,
    PendingTokens,
    Staging,
    count_singles,
    lay_out_rows,
    place_images,
    prefill_batch,
)
from halfbyte.engine.sampler import Sampler
from halfbyte.engine.scheduler import Work
from halfbyte.engine.workers import Workers, config_of
from halfbyte.errors import UsageError
from halfbyte.kernels.cuda.library import KernelLibrary
from halfbyte.log import logger
from halfbyte.model.cuda_decoder import CudaWeights, KvCache, SharedBuffers, make_cache
from halfbyte.model.cuda_load import load_cuda_draft, load_cuda_weights
from halfbyte.model.load import load_vision
from halfbyte.model.parallel import Communicator, Solo, shard_of
from halfbyte.model.vision import VisionModel

# Kept free beside the cache: what captured graphs hold for themselves, and the libraries.
_RESERVED_BYTES = 512 * 2**20


class Draft(NamedTuple):
    """A draft model's executor over the runner's inputs, and its cache, of the target's pages."""

    executor: DraftExecutor
    cache: PagedCache


class CudaRunner:
    """Runs steps on one device through an `Executor`."""

    def __init__(
        self,
        executor: Executor,
        cache: PagedCache,
        config: EngineConfig,
        vision: VisionModel | None = None,
        workers: Workers | None = None,
        draft: Draft | None = None,
    ) -> None:
        """`config` is resolved; without `vision` requests have no images, without `draft` there is
        no draft model.
        """
        assert config.kv_cache_tokens is not None and config.max_model_len is not None
        self._workers = workers
        self._draft = draft
        self.decoder = executor
        self.cache = cache
        self.device = executor.inputs.packed_5T.device
        self.images = None if vision is None else ImageEncoder(vision)
        self._block_tokens = config.block_tokens
        self._staging = Staging(self.device)
        self._table = PageTable(executor.inputs.table, self._staging)
        self._bans = BanLists(self.device)
        self._facts: dict[str, object] = {}
        self._num_replays = 0
        self._num_prefills = 0

    def facts(self) -> dict[str, object]:
        """What runs the model and what it holds, for people."""
        draft = {} if self._draft is None else {"draft_model": self._draft.executor.facts()}
        return {**self.decoder.facts(), **draft, **self._facts}

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """What the loader knows."""
        self._facts.update(facts)

    @property
    def weight_bytes(self) -> int:
        """Of the weights of all ranks, a draft model's included."""
        others = 0 if self._workers is None else self._workers.weight_bytes
        others += 0 if self._draft is None else self._draft.executor.num_weight_bytes
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

    @torch.inference_mode()
    def run_with_hidden(self, works: SequenceOf[Work]) -> Computed:
        """As `run`, with the hidden states that a draft model reads. One process only."""
        assert self._workers is None
        self._enter()
        step, vectors_ID = self._plan(works, 0)
        logits_RV, hidden_TD = self._compute_with_hidden(step, vectors_ID)
        num_rows = sum(work.num_rows for work in works)
        _, _, _, slots_T, tables_T = step.packed_5T[:, :num_rows]
        firsts = np.cumsum([0, *(work.num_rows for work in works[:-1])])
        places = Places(slots_T, tables_T[firsts].tolist())
        return Computed(logits_RV, hidden_TD[:num_rows], places)

    def drafter(self, sampler: Sampler) -> Drafter | None:
        """The draft model over this runner's pages, if there is one; guesses by `sampler`."""
        if self._draft is None:
            return None
        executor, cache = self._draft
        model = CudaDraftModel(executor, cache, self._table, self._staging, self.images)
        return Drafter(model, sampler)

    def run_alone(self, work: Work) -> Tensor:
        """As `run`, for a sequence that has blocks but no slot: it is not scheduled."""
        return self.run([work])

    @torch.inference_mode()
    def launch(self, works: SequenceOf[Work]) -> PendingTokens:
        """Start a step and the choice of its tokens: one for each work that reaches the last known
        token, in order. Every such sequence is choosable (`sampler.is_choosable`).
        """
        self._enter()
        chosen = [work.sequence for work in works if work.is_last]
        num_chosen, plan = len(chosen), plan_draws(chosen)
        bans = [sequence.request.params.banned_token_ids for sequence in chosen]
        step, vectors_ID = self._plan(works, num_chosen)
        with self._all_ranks(step):
            logits_RV, _ = self._compute(step, vectors_ID)
            tokens_R = self._choose(logits_RV, plan, bans)
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

    def _choose(
        self, logits_RV: Tensor, plan: DrawPlan, bans: SequenceOf[tuple[int, ...]]
    ) -> Tensor:
        if logits_RV.shape[0] == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        self._bans.apply(logits_RV, bans)
        sent = self._staging.send(*plan.arrays) if plan.draws else []
        return choose_tokens(logits_RV, plan, sent, may_look=False)

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
                vocab_size = self.decoder.config.vocab_size
                place_images(placement, layout.packed_5T, self.decoder.spare_VD, vocab_size)
        num_singles = count_singles(works) if size is None else 0
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
            residual_TD = self._prefill(step, vectors_ID)
            if not step.logit_rows_R.size:
                return torch.empty(0, self.decoder.config.vocab_size, device=self.device), True
            residual_RD = residual_TD.index_select(0, self._sent(step.logit_rows_R))
            return self.decoder.logits(self.decoder.normed(residual_RD)), True
        return self._logits_of(step, self._replay(step, step.size))

    def _compute_with_hidden(
        self, step: RowStep, vectors_ID: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the wanted rows, the caller's to change, and hidden states of all rows."""
        self._table.apply(step.places_X, step.pages_X)
        if step.size is not None:
            logits_RV, is_own = self._logits_of(step, self._replay(step, step.size))
            hidden_TD = self.decoder.hidden(step.size)
            return logits_RV if is_own else logits_RV.clone(), hidden_TD
        hidden_TD = self.decoder.normed(self._prefill(step, vectors_ID))
        if not step.logit_rows_R.size:
            return torch.empty(0, self.decoder.config.vocab_size, device=self.device), hidden_TD
        hidden_RD = hidden_TD.index_select(0, self._sent(step.logit_rows_R))
        return self.decoder.logits(hidden_RD), hidden_TD

    def _sent(self, array: NDArray[np.int64]) -> Tensor:
        (sent,) = self._staging.send(array)
        return sent

    def _replay(self, step: RowStep, size: int) -> Tensor:
        """Logits of all rows of a graph, overwritten by the next step."""
        self.decoder.inputs.packed_5T[:, :size].copy_(self._sent(step.packed_5T))
        self._num_replays += 1
        return self.decoder.replay(size)

    def _logits_of(self, step: RowStep, logits_TV: Tensor) -> tuple[Tensor, bool]:
        """The wanted rows of a graph's, and whether they are no one else's memory."""
        if self.decoder.communicator.rank > 0:
            return logits_TV, True
        rows = step.logit_rows_R
        if np.array_equal(rows, np.arange(len(rows))):
            return logits_TV[: len(rows)], False
        return logits_TV.index_select(0, self._sent(rows)), True

    def _prefill(self, step: RowStep, vectors_ID: Tensor | None) -> Tensor:
        """The residual stream after the last layer, (T, D)."""
        self._num_prefills += 1
        image_rows_I = None
        if step.image_rows_I is not None:
            image_rows_I = torch.from_numpy(step.image_rows_I).to(self.device)
        batch = prefill_batch(
            self.decoder.inputs,
            self._sent(step.packed_5T),
            step.num_singles,
            step.table_width,
            step.chunks,
            image_rows_I,
            vectors_ID,
        )
        return self.decoder.prefill(batch)


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
        draft = _load_draft(config, weights)
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
        library,
        weights,
        local,
        vision,
        draft,
        communicator=communicator,
        settle=settle,
        workers=workers,
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


def _load_draft(config: EngineConfig, target: CudaWeights) -> CudaWeights | None:
    directory = draft_directory(config)
    if directory is None:
        return None
    draft = load_cuda_draft(Checkpoint.open_eagle(directory), target)
    logger.info(
        "%s: draft model of %d layers, %.1f MB of weights",
        Path(directory).name,
        draft.config.num_layers,
        draft.num_bytes / 1e6,
    )
    return draft


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
    draft: CudaWeights | None = None,
    *,
    communicator: Communicator | None = None,
    settle: Callable[[int], EngineConfig] | None = None,
    workers: Workers | None = None,
) -> tuple[CudaRunner, EngineConfig]:
    """A runner over weights that lie on the device: sizes the cache by what is left beside the
    memory that steps need, which is taken first.

    draft         a draft model's weights, where this is the only rank
    communicator  connected; every rank builds at the same time, as steps are tried and captured
    settle        free bytes -> the resolved configuration; by this rank alone if None
    """
    text, device = weights.config, library.device
    sizes = graph_sizes(config.max_sequences, deterministic=config.deterministic)
    longest = config.max_model_len or text.max_positions
    max_pages = -(-longest // config.block_tokens)
    _free_what_is_gone()
    for each in (weights,) if draft is None else (weights, draft):
        compile_kernels(each, config.block_tokens, sizes)
    shared = SharedBuffers()

    def executor(model: CudaWeights, cache: KvCache, inputs: RowInputs) -> HopperExecutor:
        return HopperExecutor(
            library,
            model,
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
    def try_steps(model: CudaWeights) -> None:
        trial_cache = make_cache(model.config, 1, config.block_tokens, device)
        trial = executor(model, trial_cache, inputs(1))
        trial.allocate()
        if config.max_batch_tokens > sizes[-1]:
            trial.warm_up(config.max_batch_tokens, gives_hidden=draft is not None)

    try_steps(weights)
    if draft is not None:
        try_steps(draft)
    tables = (sum(sizes) * 2 + config.max_sequences + 1) * max_pages * 4
    tables *= 1 if draft is None else 2
    reserved = _RESERVED_BYTES + tables
    free_bytes = max(0, free_cache_bytes(config) - reserved)
    draft_bytes = 0 if draft is None else bytes_per_token(draft.config, "fp8")
    if settle is None or draft is not None:
        resolved = resolve(config, text, "fp8", free_bytes, draft_token_bytes=draft_bytes)
    else:
        resolved = settle(free_bytes)
    assert resolved.kv_cache_tokens is not None and resolved.max_model_len is not None
    num_pages = resolved.kv_cache_tokens // config.block_tokens

    def make_paged(model: CudaWeights) -> PagedCache:
        return PagedCache(
            model.config,
            format="fp8",
            num_pages=num_pages,
            block_tokens=config.block_tokens,
            kv_scales=[(layer.k_scale, layer.v_scale) for layer in model.layers],
            device=device,
        )

    cache = make_paged(weights)
    pages = -(-resolved.max_model_len // config.block_tokens)
    final = executor(weights, paged_kv(cache), inputs(pages))
    final.capture()
    made = None
    if draft is not None:
        draft_cache = make_paged(draft)
        beside = executor(draft, paged_kv(draft_cache), final.inputs)
        beside.capture()
        made = Draft(beside, draft_cache)
    return CudaRunner(final, cache, resolved, vision, workers, made), resolved
