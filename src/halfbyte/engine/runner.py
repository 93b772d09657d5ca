"""A decoder and its KV cache: runs planned work, gives logits. Loads both from a checkpoint.

Shapes: T tokens of a step, R rows with logits, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import require_trusted
from halfbyte.engine.batch import Batch, BlockTable, lay_out
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.config import EngineConfig, free_cache_bytes, resolve
from halfbyte.engine.images import ImageEncoder, Placement
from halfbyte.engine.scheduler import Work
from halfbyte.log import logger
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.model.vision import VisionModel


class Runner:
    """Runs steps on one device."""

    def __init__(
        self, decoder: Decoder, config: EngineConfig, vision: VisionModel | None = None
    ) -> None:
        """`config` is resolved; without `vision` requests have no images."""
        assert config.kv_cache_tokens is not None and config.kv_cache != "auto"
        num_blocks = config.kv_cache_tokens // config.block_tokens
        self.decoder = decoder
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

    def run(self, works: SequenceOf[Work]) -> Tensor:
        """Compute the tokens of `works`; f32 logits (R, V) of the rows that `lay_out` names.

        What any runner must do with `work.proposals`, k of them behind the last known token:
        compute them as the next k tokens of a prompt would be - positions, K and V included, all
        k + 1 rows causal - and give logits for each of the k + 1 rows, in order. Blocks for them
        are there. The caller may drop the last of them: their K and V are then overwritten by a
        later step, before anything reads them.
        """
        batch = lay_out(works, self._table.rows(works), self.cache, self.device)
        placement = None if self.images is None else self.images.place(works)
        return self._run(batch, placement)

    def run_alone(self, work: Work) -> Tensor:
        """As `run`, for a sequence that has blocks but no slot: it is not scheduled."""
        pages_1P = np.array([work.sequence.blocks], dtype=np.int32)
        return self._run(lay_out([work], pages_1P, self.cache, self.device))

    def _run(self, batch: Batch, placement: Placement | None = None) -> Tensor:
        step = Step(
            batch.token_ids_T,
            batch.positions_T,
            batch.attend,
            batch.logit_rows_R,
            None if placement is None else placement.rows_I,
            None if placement is None else placement.vectors_ID,
        )
        logits_RV: Tensor = self.decoder(step)
        return logits_RV


def load_runner(directory: str | Path, config: EngineConfig) -> tuple[Runner, EngineConfig]:
    """Load a checkpoint and make its cache; the configuration comes back resolved.

    Raises CheckpointError, UsageError, CapacityError, each with what to do.
    """
    checkpoint = Checkpoint.open(directory)
    require_trusted(checkpoint.config, config.accept)
    decoder = load_decoder(checkpoint, device=config.device, mode=config.mode)
    vision = load_vision(checkpoint, device=config.device)
    resolved = resolve(
        config, decoder.config, checkpoint.quantization.kv_cache, free_cache_bytes(config)
    )
    runner = Runner(decoder, resolved, vision)
    logger.info(
        "%s: %.1f MB of weights, KV cache of %d tokens (%s, %.1f MB), sequences up to %d tokens",
        Path(directory).name,
        decoder.num_weight_bytes / 1e6,
        resolved.kv_cache_tokens,
        resolved.kv_cache,
        runner.cache.num_bytes / 1e6,
        resolved.max_model_len,
    )
    return runner, resolved
