"""Stand-ins in plain ops for what computes beneath `HopperDevice`: for its logic, not for numerics.

Same inputs, same meaning of rows, pages and slots; nothing is launched on a device and no kernel
is tested by it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import TextConfig
from halfbyte.engine.cache import PagedAttend, PagedCache
from halfbyte.engine.config import EngineConfig, resolve
from halfbyte.engine.core import Engine
from halfbyte.engine.graphs import MAX_ROWS, RowInputs, graph_sizes, make_inputs, unpack
from halfbyte.engine.hopper import HopperDevice, HopperDraft
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.load import PlainPart, fit_to_graphs, load_part
from halfbyte.engine.runner import Runner
from halfbyte.engine.sampler import LogitsHook
from halfbyte.kernels import dispatch
from halfbyte.model.cuda.prefill_batch import PrefillBatch
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.eagle import EagleHead
from halfbyte.model.load import load_vision
from halfbyte.model.parallel import Communicator
from halfbyte.model.saturation import SaturationCounts
from halfbyte.modules import CacheFormat


class TwinExecutor:
    """`engine.graphs.Executor` over the ordinary decoder and cache."""

    def __init__(
        self, decoder: Decoder, cache: PagedCache, inputs: RowInputs, sizes: tuple[int, ...]
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._inputs = inputs
        self._sizes = sizes
        spare = torch.zeros(MAX_ROWS, decoder.config.width, dtype=decoder.embedding_VD.dtype)
        decoder.embedding_VD = nn.Buffer(torch.cat((decoder.embedding_VD, spare)))
        self._logits_TV = torch.full((MAX_ROWS, decoder.config.vocab_size), torch.nan)
        self._hidden_TD = torch.empty(0)
        self.replayed: list[int] = []

    @property
    def config(self) -> TextConfig:
        return self._decoder.config

    @property
    def num_weight_bytes(self) -> int:
        return self._decoder.num_weight_bytes

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def inputs(self) -> RowInputs:
        return self._inputs

    @property
    def spare_VD(self) -> Tensor:
        spare: Tensor = self._decoder.embedding_VD[-MAX_ROWS:]
        return spare

    @property
    def communicator(self) -> Communicator:
        return self._decoder.communicator

    @property
    def saturation(self) -> SaturationCounts | None:
        return self._decoder.saturation

    def replay(self, size: int) -> Tensor:
        self.replayed.append(size)
        step = row_step(self._inputs, size, self._cache)
        if self.communicator.size > 1:
            logits_TV: Tensor = self._decoder(step)
            if self.communicator.rank > 0:
                return logits_TV
        else:
            logits_TV, self._hidden_TD = self._decoder.forward_with_hidden(step)
        self._logits_TV[:size] = logits_TV
        return self._logits_TV[:size]

    def hidden(self, size: int) -> Tensor:
        assert len(self._hidden_TD) == size == self.replayed[-1]
        return self._hidden_TD.clone()

    def prefill(self, batch: PrefillBatch) -> Tensor:
        """Chunks and singles as the sequences of one ragged step."""
        attend = attend_ragged(self._cache, batch)
        decoder = self._decoder
        x_TD = decoder.embed(ragged_step(batch, attend))
        rotation = decoder.rotary.at(batch.positions_T)
        for index, layer in enumerate(decoder.layers):
            x_TD = layer(x_TD, index, attend, rotation)
        return x_TD

    def normed(self, residual_RD: Tensor) -> Tensor:
        decoder = self._decoder
        return dispatch.rms_norm(residual_RD, decoder.norm_D, decoder.config.norm_eps)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_RD)

    def facts(self) -> dict[str, object]:
        return {"decoder": "twin"}


class TwinDraft:
    """`engine.graphs.DraftExecutor` over an `EagleHead`; its K and V lie in a cache in bf16."""

    def __init__(
        self, head: EagleHead, target: TwinExecutor, decoder: Decoder, cache: PagedCache
    ) -> None:
        self._head = head
        self._target = target
        self._decoder = decoder
        self._cache = cache
        self.hidden_TD = torch.full((MAX_ROWS, decoder.config.width), 0.0, dtype=torch.bfloat16)
        self._guessed_TD = torch.empty(0)
        self.replayed: list[int] = []
        self.num_prefills = 0

    @property
    def config(self) -> TextConfig:
        return self._head.config

    @property
    def num_weight_bytes(self) -> int:
        return self._head.num_weight_bytes

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._target.sizes

    @property
    def inputs(self) -> RowInputs:
        return self._target.inputs

    @property
    def spare_VD(self) -> Tensor:
        return self._target.spare_VD

    def replay(self, size: int) -> Tensor:
        self.replayed.append(size)
        step = row_step(self.inputs, size, self._cache)
        self._guessed_TD = self._guess(step, self.hidden_TD[:size])
        return self._decoder.logits(self._guessed_TD)

    def hidden(self, size: int) -> Tensor:
        assert len(self._guessed_TD) == size == self.replayed[-1]
        return self._guessed_TD.clone()

    def prefill(self, batch: PrefillBatch) -> Tensor:
        """Behind the norm already, which `EagleHead` applies."""
        assert batch.hidden_TD is not None
        self.num_prefills += 1
        return self._guess(ragged_step(batch, attend_ragged(self._cache, batch)), batch.hidden_TD)

    def _guess(self, step: Step, hidden_TD: Tensor) -> Tensor:
        embedded_TD = self._decoder.embed(step)
        guessed_TD: Tensor = self._head(embedded_TD, hidden_TD, step.positions_T, step.attend)
        return guessed_TD

    def normed(self, residual_RD: Tensor) -> Tensor:
        return residual_RD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_RD)

    def facts(self) -> dict[str, object]:
        return {"decoder": "twin"}


def row_step(inputs: RowInputs, size: int, cache: PagedCache) -> Step:
    """Rows of a graph, each a sequence of its own."""
    rows = unpack(inputs, size)
    assert int(rows.block_table_TP.max()) < cache.num_pages
    attend = PagedAttend(
        cache,
        rows.slots_T,
        rows.block_table_TP,
        rows.context_lengths_T,
        torch.arange(size + 1, dtype=torch.int32),
    )
    return Step(rows.token_ids_T, rows.positions_T, attend)


def attend_ragged(cache: PagedCache, batch: PrefillBatch) -> PagedAttend:
    """Chunks and singles of a prefill as the sequences of one ragged step."""
    pages: list[Tensor] = []
    lengths: list[int] = []
    starts = [0]
    if batch.singles is not None:
        pages += list(batch.singles.block_table_SP)
        lengths += batch.singles.context_lengths_S.tolist()
        starts += range(1, len(lengths) + 1)
    for chunk in batch.chunks:
        assert starts[-1] == chunk.first_row
        pages.append(chunk.pages_P.int())
        lengths.append(chunk.start + chunk.num_rows)
        starts.append(chunk.first_row + chunk.num_rows)
    return PagedAttend(
        cache,
        batch.slots_T,
        torch.nn.utils.rnn.pad_sequence(pages, batch_first=True),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
    )


def ragged_step(batch: PrefillBatch, attend: PagedAttend) -> Step:
    """A prefill as a step of the ordinary decoder."""
    return Step(
        batch.token_ids_T,
        batch.positions_T,
        attend,
        None,
        batch.image_rows_I,
        batch.image_vectors_ID,
    )


def twin_engine(directory: Path, hook: LogitsHook | None = None, **options: Any) -> Engine:
    """An engine that takes the Hopper device's ways; defaults as `engine_driver.load`."""
    runner, config = twin_runner(directory, **options)
    return Engine(runner, config, logits_hook=hook)


def twin_runner(
    directory: Path,
    communicator: Communicator | None = None,
    workers: Any = None,
    **options: Any,
) -> tuple[Runner, EngineConfig]:
    """The runner of such an engine, or of one rank of several."""
    defaults: dict[str, Any] = {"max_model_len": 160, "kv_cache_tokens": 640, "kv_cache": "fp8"}
    config = replace(EngineConfig(mode="fp8_declared"), **(defaults | options))
    config = fit_to_graphs(config)
    checkpoint = Checkpoint.open(directory)
    part = load_part(checkpoint, config, communicator, uses_kernels=False)
    assert isinstance(part, PlainPart)
    config = resolve(config, part.decoder.config, "fp8", 1 << 30)

    def make_paged(text: TextConfig, format: CacheFormat) -> PagedCache:
        return PagedCache(
            text,
            format=format,
            num_pages=config.num_pages,
            block_tokens=config.block_tokens,
            kv_scales=part.decoder.kv_scales,
        )

    cache = make_paged(part.decoder.config, "fp8")
    most = config.max_sequences
    inputs = make_inputs(most + 1, config.max_pages, most, torch.device("cpu"))
    sizes = graph_sizes(most, deterministic=config.deterministic)
    executor = TwinExecutor(part.decoder, cache, inputs, sizes)
    draft = None
    if part.eagle is not None:
        draft_cache = make_paged(part.eagle.config, "bf16")
        twin = TwinDraft(part.eagle, executor, part.decoder, draft_cache)
        draft = HopperDraft(twin, draft_cache)
    device = HopperDevice(executor, cache, draft)
    vision = load_vision(checkpoint)
    images = None if vision is None else ImageEncoder(vision)
    return Runner(device, config, images, workers), config
