"""A decoder and its KV cache: runs planned work, gives logits. Loads both from a checkpoint.

Shapes: T tokens of a step, R rows with logits, V vocabulary.
"""

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import require_trusted
from halfbyte.config import TextConfig
from halfbyte.engine.batch import (
    Batch,
    BlockTable,
    Indices,
    Places,
    batch_of,
    indices_of,
    lay_out,
)
from halfbyte.engine.cache import PagedCache, bytes_per_token
from halfbyte.engine.config import EngineConfig, draft_directory, free_cache_bytes, resolve
from halfbyte.engine.cuda_runner import CudaRunner, load_cuda_runner
from halfbyte.engine.drafter import Computed, Drafter, PlainDraftModel
from halfbyte.engine.images import ImageEncoder, Placement
from halfbyte.engine.sampler import Sampler
from halfbyte.engine.scheduler import Work
from halfbyte.engine.slices import Chunk
from halfbyte.engine.walk import Costs
from halfbyte.engine.workers import Workers, check_device, check_devices, config_of
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda.library import unavailable
from halfbyte.log import logger
from halfbyte.model.cuda_load import reason_against, reason_against_draft
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.eagle import EagleHead
from halfbyte.model.load import load_decoder, load_eagle, load_vision
from halfbyte.model.parallel import check_size
from halfbyte.model.vision import VisionModel


class Runner:
    """Runs steps on one device, and with `workers` on all ranks at once."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        vision: VisionModel | None = None,
        workers: Workers | None = None,
        eagle: EagleHead | None = None,
    ) -> None:
        """`config` is resolved; without `vision` requests have no images, without `eagle` there is
        no draft model.
        """
        assert config.kv_cache_tokens is not None and config.kv_cache != "auto"
        num_blocks = config.kv_cache_tokens // config.block_tokens
        self.decoder = decoder
        self._eagle = eagle
        self.images = None if vision is None else ImageEncoder(vision)
        self.device = config.device
        self.cache = PagedCache(
            decoder.config,
            format=config.kv_cache,
            num_pages=num_blocks,
            block_tokens=config.block_tokens,
            kv_scales=decoder.kv_scales,
            device=config.device,
        )
        assert config.max_model_len is not None
        blocks_per_sequence = -(-config.max_model_len // config.block_tokens)
        self._table = BlockTable(config.max_sequences, min(num_blocks, blocks_per_sequence))
        self._workers = workers
        self._costs = Costs()

    @property
    def can_slice(self) -> bool:
        """Whether `begin` works here: all ranks would have to stop at the same places, and on a
        GPU the clock says nothing about what has been computed.
        """
        return self._workers is None and torch.device(self.device).type == "cpu"

    @property
    def weight_bytes(self) -> int:
        """Of the weights of all ranks, a draft model's included."""
        others = 0 if self._workers is None else self._workers.weight_bytes
        others += 0 if self._eagle is None else self._eagle.num_weight_bytes
        return self.decoder.num_weight_bytes + others

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache of all ranks."""
        return self.cache.num_bytes * self.decoder.communicator.size

    @property
    def failure(self) -> str | None:
        """Why no step can run any more: another rank has died."""
        return None if self._workers is None else self._workers.failure

    def facts(self) -> dict[str, object]:
        """What runs the model, for people."""
        return {"decoder": "ops, one by one"}

    def run(self, works: SequenceOf[Work]) -> Tensor:
        """Compute the tokens of `works`; f32 logits (R, V) of the rows that `lay_out` names.

        What any runner must do with `work.proposals`, k of them behind the last known token:
        compute them as the next k tokens of a prompt would be - positions, K and V included, all
        k + 1 rows causal - and give logits for each of the k + 1 rows, in order. Blocks for them
        are there. The caller may drop the last of them: their K and V are then overwritten by a
        later step, before anything reads them.
        """
        placement = None if self.images is None else self.images.place(works)
        return self._run(works, self._table.rows(works), placement)

    def run_with_hidden(self, works: SequenceOf[Work]) -> Computed:
        """As `run`, with the hidden states that a draft model reads. One process only."""
        assert self._workers is None
        placement = None if self.images is None else self.images.place(works)
        batch = lay_out(works, self._table.rows(works), self.cache, self.device)
        computed = self.decoder.forward_with_hidden(_step(batch, placement))
        return Computed(*computed, self.places_of(works))

    @torch.inference_mode()
    def begin(self, works: SequenceOf[Work]) -> Chunk:
        """Begin to compute the tokens of `works` in slices; only where `can_slice`."""
        batch = lay_out(works, self._table.rows(works), self.cache, self.device)
        placing = None
        if self.images is not None:
            # An entry of a draft model is made of the token behind its own.
            placing = self.images.begin(works, num_ahead=0 if self._eagle is None else 1)
        step_of = partial(_step, batch)
        return Chunk(works, self.decoder, step_of, batch.attend, placing, self._costs)

    def lacks_images(self, works: SequenceOf[Work]) -> bool:
        """Whether images that these works show are still to be encoded."""
        return self.images is not None and self.images.begin(works).has_missing

    def places_of(self, works: SequenceOf[Work]) -> Places:
        """Where the works' rows lie as they are now."""
        return self._table.places(works, self.cache.block_tokens)

    def drafter(self, sampler: Sampler) -> Drafter | None:
        """The draft model over this runner's pages, if there is one; guesses by `sampler`."""
        if self._eagle is None:
            return None
        model = PlainDraftModel(
            self._eagle,
            self.decoder,
            self._table,
            num_pages=self.cache.num_pages,
            block_tokens=self.cache.block_tokens,
            device=self.device,
            images=self.images,
        )
        return Drafter(model, sampler)

    def run_alone(self, work: Work) -> Tensor:
        """As `run`, for a sequence that has blocks but no slot: it is not scheduled."""
        return self._run([work], np.array([work.sequence.blocks], dtype=np.int32))

    def follow(self, indices: Indices) -> None:
        """Compute this rank's part of a step that rank 0 laid out."""
        placement = None
        if indices.image_rows_I is not None:
            rows_I = torch.from_numpy(indices.image_rows_I).to(self.device)
            placement = Placement(rows_I, None)
        self._compute(batch_of(indices, self.cache, self.device), placement)

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self._workers is not None:
            self._workers.close()

    def _run(
        self,
        works: SequenceOf[Work],
        pages_SP: NDArray[np.int32],
        placement: Placement | None = None,
    ) -> Tensor:
        if self._workers is None:
            return self._compute(lay_out(works, pages_SP, self.cache, self.device), placement)
        batch = lay_out(works, pages_SP, self.cache, "cpu")
        indices = indices_of(batch, None if placement is None else placement.rows_I)
        with self._workers.running(indices):
            return self._compute(batch_of(indices, self.cache, self.device), placement)

    def _compute(self, batch: Batch, placement: Placement | None) -> Tensor:
        logits_RV: Tensor = self.decoder(_step(batch, placement))
        return logits_RV


def _step(batch: Batch, placement: Placement | None) -> Step:
    return Step(
        batch.token_ids_T,
        batch.positions_T,
        batch.attend,
        batch.logit_rows_R,
        None if placement is None else placement.rows_I,
        None if placement is None else placement.vectors_ID,
    )


def reason_against_kernels(checkpoint: Checkpoint, config: EngineConfig) -> str | None:
    """Why a checkpoint does not run on the CUDA kernels; None when it does."""
    reason = unavailable(torch.device(config.device).type)
    if reason is not None:
        return reason
    if "HALFBYTE_KERNELS" in os.environ:
        return f"HALFBYTE_KERNELS={os.environ['HALFBYTE_KERNELS']} is set"
    if config.mode not in ("auto", "fp8_declared"):
        return f"mode {config.mode}; the kernels compute fp8_declared"
    stored = checkpoint.quantization.kv_cache
    kv_cache = stored if config.kv_cache == "auto" else config.kv_cache
    reason = reason_against(
        checkpoint,
        kv_cache,
        config.block_tokens,
        products=config.products,
        num_ranks=config.tensor_parallel_size,
    )
    directory = draft_directory(config)
    if reason is None and directory is not None:
        draft = Checkpoint.open_eagle(directory)
        reason = reason_against_draft(draft, config.block_tokens, products=config.products)
    return reason


def load_runner(
    directory: str | Path, config: EngineConfig
) -> tuple[Runner | CudaRunner, EngineConfig]:
    """Load a checkpoint and make its cache; the configuration comes back resolved.

    With a tensor-parallel size above 1 the other ranks are processes, started here; `Runner.close`
    ends them. Raises CheckpointError, UsageError, CapacityError, each with what to do.
    """
    checkpoint = Checkpoint.open(directory)
    check_device(config)
    require_trusted(checkpoint.config, config.accept)
    check_size(checkpoint.config.text, config.tensor_parallel_size)
    if config.deterministic and config.tensor_parallel_size > 2:
        # Two terms have one sum; the order of more is NCCL's, which may choose by size.
        raise UnsupportedError(
            "deterministic runs on one or two GPUs: sums over "
            f"{config.tensor_parallel_size} ranks have no fixed order"
        )
    reason = reason_against_kernels(checkpoint, config)
    if reason is None:
        config = replace(config, mode="fp8_declared", kv_cache="fp8")
    elif torch.device(config.device).type == "cuda":
        logger.warning("CUDA kernels not used: %s; the model runs in plain torch", reason)
        if config.deterministic:
            raise UnsupportedError(f"deterministic needs the CUDA kernels: {reason}")
    if config.mode == "auto":
        config = replace(config, mode="weight_only")
    if config.tensor_parallel_size == 1:
        return _load_ranks(checkpoint, config, None, uses_kernels=reason is None)
    if draft_directory(config) is not None:
        raise UnsupportedError(
            "an EAGLE head runs beside a model in one process only; use --speculative ngram, or "
            f"tensor-parallel size 1 instead of {config.tensor_parallel_size}"
        )
    check_devices(config)
    workers = Workers(Path(directory), config)
    try:
        return _load_ranks(checkpoint, config, workers, uses_kernels=reason is None)
    except BaseException:
        workers.close()
        raise


def _load_ranks(
    checkpoint: Checkpoint, config: EngineConfig, workers: Workers | None, *, uses_kernels: bool
) -> tuple[Runner | CudaRunner, EngineConfig]:
    if uses_kernels:
        return load_cuda_runner(checkpoint, config, workers)
    return _load(checkpoint, config, workers)


def _load(
    checkpoint: Checkpoint, config: EngineConfig, workers: Workers | None
) -> tuple[Runner, EngineConfig]:
    assert config.mode != "auto"
    local = config if workers is None else config_of(config, 0)
    decoder = load_decoder(
        checkpoint,
        device=local.device,
        mode=config.mode,
        communicator=None if workers is None else workers.join(),
    )
    vision = load_vision(checkpoint, device=local.device)
    eagle = _load_eagle(config, decoder.config)
    if workers is not None:
        workers.connect()
    free_bytes = free_cache_bytes(local)
    if workers is not None:
        free_bytes = min(free_bytes, workers.free_bytes())
    resolved = resolve(
        local,
        decoder.config,
        checkpoint.quantization.kv_cache,
        free_bytes,
        draft_token_bytes=0 if eagle is None else bytes_per_token(eagle.config, "bf16"),
    )
    if workers is not None:
        workers.make_caches(replace(resolved, device=config.device))
    runner = Runner(decoder, resolved, vision, workers, eagle)
    logger.info(
        "%s: %.1f MB of weights, KV cache of %d tokens (%s, %.1f MB), sequences up to %d tokens%s",
        checkpoint.directory.name,
        runner.weight_bytes / 1e6,
        resolved.kv_cache_tokens,
        resolved.kv_cache,
        runner.cache_bytes / 1e6,
        resolved.max_model_len,
        f", spread over {config.tensor_parallel_size} ranks" if workers is not None else "",
    )
    return runner, resolved


def _load_eagle(config: EngineConfig, target: TextConfig) -> EagleHead | None:
    directory = draft_directory(config)
    if directory is None:
        return None
    assert config.mode != "auto"
    checkpoint = Checkpoint.open_eagle(directory)
    eagle = load_eagle(checkpoint, target, device=config.device, mode=config.mode)
    logger.info(
        "%s: draft model of %d layers, %.1f MB of weights",
        checkpoint.directory.name,
        eagle.config.num_layers,
        eagle.num_weight_bytes / 1e6,
    )
    return eagle
