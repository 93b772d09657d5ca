"""From a checkpoint to a runner: weights, then a device with its cache, on every rank alike.

A rank loads its part of the weights (`load_part`), the ranks meet, each says what room it has, rank
0 decides what the caches hold (`config.resolve`), and each builds its device (`Part.build`). Rank 0
does it in `load_runner`, the others in `follower`.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import require_trusted
from halfbyte.config import TextConfig
from halfbyte.engine.cache import PagedCache, bytes_per_token
from halfbyte.engine.config import (
    EngineConfig,
    draft_directory,
    free_cache_bytes,
    resolve,
    with_mode,
)
from halfbyte.engine.graphs import (
    MAX_ROWS,
    HopperExecutor,
    RowInputs,
    compile_kernels,
    graph_sizes,
    make_inputs,
)
from halfbyte.engine.hopper import HopperDevice, HopperDraft, paged_kv
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.plain import PlainDevice
from halfbyte.engine.runner import Runner
from halfbyte.engine.workers import Workers, check_device, check_devices, config_of, found_device
from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.kernels.cuda.library import KernelLibrary, unavailable
from halfbyte.log import logger
from halfbyte.machine import use_huge_pages
from halfbyte.model.cuda.launches import CudaModel, SharedBuffers
from halfbyte.model.cuda.load import (
    load_cuda_draft,
    load_cuda_weights,
    reason_against,
    reason_against_draft,
)
from halfbyte.model.cuda.weights import CudaWeights, KvCache, make_cache
from halfbyte.model.decoder import Decoder
from halfbyte.model.eagle import EagleHead
from halfbyte.model.load import load_decoder, load_eagle, load_vision
from halfbyte.model.parallel import Communicator, Solo, check_size, shard_of
from halfbyte.model.rope import RotaryTable
from halfbyte.model.saturation import SaturationCounts

# Kept free beside the cache: what captured graphs hold for themselves, and the libraries.
_RESERVED_BYTES = 512 * 2**20
# Weights of a CPU from this size on are laid on huge pages: less lies in the processors' caches.
_MANY_BYTES = 64 * 2**20

# Decides the configuration, given the architecture (or the rank's part of it), the bytes that are
# free for the cache and those that a draft model keeps of each position.
Settle = Callable[[TextConfig, int, int], EngineConfig]


@dataclass(frozen=True, slots=True)
class PlainPart:
    """A rank's weights for a `PlainDevice`, before there is a cache."""

    config: EngineConfig
    decoder: Decoder
    eagle: EagleHead | None = None

    @property
    def num_weight_bytes(self) -> int:
        draft = 0 if self.eagle is None else self.eagle.num_weight_bytes
        return self.decoder.num_weight_bytes + draft

    def build(self, settle: Settle) -> tuple[PlainDevice, EngineConfig]:
        """Make the device; returns it and the configuration that `settle` gave for it."""
        draft_bytes = 0 if self.eagle is None else bytes_per_token(self.eagle.config, "bf16")
        free_bytes = free_cache_bytes(self.config)
        resolved = settle(self.decoder.config, free_bytes, draft_bytes)
        return PlainDevice(self.decoder, resolved, self.eagle), resolved


@dataclass(frozen=True, slots=True)
class HopperPart:
    """A rank's kernels and weights for a `HopperDevice`, before there is a cache.

    communicator  connected when `build` is called
    """

    config: EngineConfig
    library: KernelLibrary
    weights: CudaWeights
    draft: CudaWeights | None = None
    communicator: Communicator | None = None

    @property
    def num_weight_bytes(self) -> int:
        draft = 0 if self.draft is None else self.draft.num_bytes
        return self.weights.num_bytes + draft

    def build(self, settle: Settle) -> tuple[HopperDevice, EngineConfig]:
        """Make the device; returns it and the configuration that `settle` gave for it.

        The memory that steps need is taken first; the cache is sized by what is left. Every rank
        builds at the same time, as steps are tried and captured.
        """
        config, weights, draft = self.config, self.weights, self.draft
        _free_what_is_gone()
        steps = _Steps(self)
        models = (weights,) if draft is None else (weights, draft)
        for model in models:
            compile_kernels(model, config.block_tokens, steps.sizes)
        for model in models:
            steps.try_out(model)
        longest = config.max_model_len or weights.config.max_positions
        tables = steps.table_rows * -(-longest // config.block_tokens) * 4 * len(models)
        free_bytes = max(0, free_cache_bytes(config) - _RESERVED_BYTES - tables)
        draft_bytes = 0 if draft is None else bytes_per_token(draft.config, "fp8")
        resolved = settle(weights.config, free_bytes, draft_bytes)
        cache = steps.paged_cache(weights, resolved.num_pages)
        final = steps.executor(weights, paged_kv(cache), steps.inputs(resolved.max_pages))
        final.capture()
        made = None
        if draft is not None:
            draft_cache = steps.paged_cache(draft, resolved.num_pages)
            beside = steps.executor(draft, paged_kv(draft_cache), final.inputs)
            beside.capture()
            made = HopperDraft(beside, draft_cache)
        return HopperDevice(final, cache, made), resolved


class _Steps:
    """What the steps of a model and of its draft model share while they are built."""

    def __init__(self, part: HopperPart) -> None:
        self._part = part
        self._device = part.library.device
        self._shared = SharedBuffers()
        config = part.config
        self.sizes = graph_sizes(config.max_sequences, deterministic=config.deterministic)
        self._saturation = SaturationCounts(self._device) if config.count_saturation else None

    @property
    def table_rows(self) -> int:
        """Rows of page tables that the steps of one model hold, in graphs and beside them."""
        return sum(self.sizes) * 2 + self._part.config.max_sequences + 1

    def executor(self, model: CudaWeights, cache: KvCache, inputs: RowInputs) -> HopperExecutor:
        part, communicator = self._part, self._part.communicator or Solo()
        base = CudaModel(
            part.library,
            model,
            cache,
            RotaryTable(model.config, self._device).at,
            self._shared,
            None if communicator.size == 1 else communicator.all_reduce,
            # What a draft model clips is not the model's.
            None if model is part.draft else self._saturation,
        )
        return HopperExecutor(
            base,
            inputs,
            communicator,
            sizes=self.sizes,
            max_batch_tokens=part.config.max_batch_tokens,
        )

    def inputs(self, num_pages: int) -> RowInputs:
        most = self._part.config.max_sequences
        return make_inputs(most + 1, num_pages, most, self._device)

    def try_out(self, model: CudaWeights) -> None:
        """Take everything that steps share, over a cache of one page; the cache gets the rest."""
        config, draft = self._part.config, self._part.draft
        cache = make_cache(model.config, 1, config.block_tokens, self._device)
        trial = self.executor(model, cache, self.inputs(1))
        trial.allocate()
        if config.max_batch_tokens > self.sizes[-1]:
            trial.warm_up(config.max_batch_tokens, gives_hidden=draft is not None)
            if trial.saturation is not None:
                trial.saturation.clear()

    def paged_cache(self, model: CudaWeights, num_pages: int) -> PagedCache:
        return PagedCache(
            model.config,
            format="fp8",
            num_pages=num_pages,
            block_tokens=self._part.config.block_tokens,
            kv_scales=[(layer.k_scale, layer.v_scale) for layer in model.layers],
            device=self._device,
        )


def resolve_alone(config: EngineConfig) -> Settle:
    """Decide the open values of a configuration for the kernels of one GPU."""

    def settle(text: TextConfig, free_bytes: int, draft_bytes: int) -> EngineConfig:
        return resolve(config, text, "fp8", free_bytes, draft_token_bytes=draft_bytes)

    return settle


def _free_what_is_gone() -> None:
    """Give back the memory of an engine that was here before: it is only gone once its cycles are,
    and two sets of weights may not fit at once.
    """
    gc.collect()
    torch.cuda.empty_cache()


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


def load_part(
    checkpoint: Checkpoint,
    config: EngineConfig,
    communicator: Communicator | None = None,
    *,
    uses_kernels: bool,
) -> PlainPart | HopperPart:
    """Load a rank's weights on its device, those of a draft model included."""
    if uses_kernels:
        return _load_hopper(checkpoint, config, communicator or Solo())
    assert config.mode != "auto"
    start = time.perf_counter()
    saturation = SaturationCounts(torch.device(config.device)) if config.count_saturation else None
    decoder = load_decoder(
        checkpoint,
        device=config.device,
        mode=config.mode,
        communicator=communicator,
        fp8_activations=config.fp8_activations,
        saturation=saturation,
    )
    directory, eagle = draft_directory(config), None
    if directory is not None:
        draft = Checkpoint.open_eagle(directory)
        eagle = load_eagle(
            draft,
            decoder.config,
            device=config.device,
            mode=config.mode,
            fp8_activations=config.fp8_activations,
        )
        _say_draft(directory, eagle.config.num_layers, eagle.num_weight_bytes)
    part = PlainPart(config, decoder, eagle)
    if torch.device(config.device).type == "cpu" and part.num_weight_bytes >= _MANY_BYTES:
        use_huge_pages(max(1.0, (time.perf_counter() - start) / 4))
    return part


def _load_hopper(
    checkpoint: Checkpoint, config: EngineConfig, communicator: Communicator
) -> HopperPart:
    device = torch.device(config.device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    _free_what_is_gone()
    library = KernelLibrary(device)
    # Images need rows of rank 0 alone.
    has_images = checkpoint.config.vision is not None and communicator.rank == 0
    shard = None
    if communicator.size > 1:
        shard = shard_of(checkpoint.config.text, communicator.rank, communicator.size)
    directory, draft = draft_directory(config), None
    with torch.inference_mode():
        weights = load_cuda_weights(
            checkpoint,
            device,
            num_spare_embeddings=MAX_ROWS if has_images else 0,
            shard=shard,
            mode=config.products,
            fp8_activations=config.fp8_activations,
        )
        if directory is not None:
            draft = load_cuda_draft(
                Checkpoint.open_eagle(directory),
                weights,
                mode=config.products,
                fp8_activations=config.fp8_activations,
            )
            _say_draft(directory, draft.config.num_layers, draft.num_bytes)
    return HopperPart(config, library, weights, draft, communicator)


def _say_draft(directory: str, num_layers: int, num_bytes: int) -> None:
    logger.info(
        "%s: draft model of %d layers, %.1f MB of weights",
        Path(directory).name,
        num_layers,
        num_bytes / 1e6,
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
        fp8_activations=config.fp8_activations,
    )
    directory = draft_directory(config)
    if reason is None and directory is not None:
        draft = Checkpoint.open_eagle(directory)
        reason = reason_against_draft(
            draft,
            config.block_tokens,
            products=config.products,
            fp8_activations=config.fp8_activations,
        )
    return reason


def load_runner(directory: str | Path, config: EngineConfig) -> tuple[Runner, EngineConfig]:
    """Load a checkpoint and make its cache; the configuration comes back resolved.

    With a tensor-parallel size above 1 the other ranks are processes, started here; `Runner.close`
    ends them. Raises CheckpointError, UsageError, CapacityError, each with what to do.
    """
    checkpoint = Checkpoint.open(directory)
    config = found_device(config)
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
        config = fit_to_graphs(replace(config, mode="fp8_declared", kv_cache="fp8"))
    elif torch.device(config.device).type == "cuda":
        logger.warning("CUDA kernels not used: %s; the model runs in plain torch", reason)
        if config.deterministic:
            raise UnsupportedError(f"deterministic needs the CUDA kernels: {reason}")
    config = with_mode(config)
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
) -> tuple[Runner, EngineConfig]:
    """Load rank 0; the other ranks, started and not yet joined, do the same at the same time."""
    start = time.perf_counter()
    communicator = None if workers is None else workers.join(uses_kernels=uses_kernels)
    local = config if workers is None else config_of(config, 0)
    part = load_part(checkpoint, local, communicator, uses_kernels=uses_kernels)
    with torch.inference_mode():
        vision = load_vision(checkpoint, device=local.device)
    if uses_kernels:
        torch.cuda.synchronize()
    weights_s = time.perf_counter() - start
    if workers is not None:
        workers.connect()

    def settle(text: TextConfig, free_bytes: int, draft_bytes: int) -> EngineConfig:
        """The cache is sized by the rank that has least room."""
        if workers is not None:
            free_bytes = min(free_bytes, workers.free_bytes())
        stored = checkpoint.quantization.kv_cache
        resolved = resolve(local, text, stored, free_bytes, draft_token_bytes=draft_bytes)
        if workers is not None:
            workers.make_caches(replace(resolved, device=config.device))
        return resolved

    device, resolved = part.build(settle)
    runner = Runner(device, resolved, None if vision is None else ImageEncoder(vision), workers)
    load_s = time.perf_counter() - start
    runner.add_facts({"load_weights_s": round(weights_s, 2), "load_s": round(load_s, 2)})
    logger.info(
        "%s: %.1f MB of weights in %.1f s (%.2f GB/s a rank), KV cache of %d tokens (%s, %.1f MB), "
        "sequences up to %d tokens%s, ready after %.1f s",
        checkpoint.directory.name,
        runner.weight_bytes / 1e6,
        weights_s,
        part.num_weight_bytes / 1e9 / weights_s,
        resolved.kv_cache_tokens,
        resolved.kv_cache,
        runner.cache_bytes / 1e6,
        resolved.max_model_len,
        "" if workers is None else f", spread over {config.tensor_parallel_size} ranks",
        load_s,
    )
    return runner, resolved
