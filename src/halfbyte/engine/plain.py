"""The device that calls the decoder's ops one by one: any torch device, one rank or several.

Prompts can be computed in slices on a CPU. On a GPU it runs what the CUDA kernels do not take.

Shapes: T rows, R rows with logits, D model width, V vocabulary, I image tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.engine.cache import PagedAttend, PagedCache
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.device import Guessed, Results
from halfbyte.engine.images import Placement, Placing
from halfbyte.engine.plan.step import PageTable, PlannedStep
from halfbyte.engine.slices import DecoderSlices
from halfbyte.engine.walk import Costs
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.eagle import EagleHead
from halfbyte.model.parallel import Communicator
from halfbyte.model.saturation import SaturationCounts


class PlainDevice:
    """A device that runs the decoder's modules over a paged cache, on a CPU or any GPU."""

    # Tokens are chosen by the host.
    ahead = None
    # Any number of rows costs what it is.
    step_sizes: tuple[int, ...] = ()

    def __init__(
        self, decoder: Decoder, config: EngineConfig, eagle: EagleHead | None = None
    ) -> None:
        """Take a resolved `config`; without `eagle` there is no draft model."""
        assert config.kv_cache != "auto"
        self.decoder = decoder
        self.cache = PagedCache(
            decoder.config,
            format=config.kv_cache,
            num_pages=config.num_pages,
            block_tokens=config.block_tokens,
            kv_scales=decoder.kv_scales,
            device=config.device,
        )
        self._device = torch.device(config.device)
        self._is_cpu = self._device.type == "cpu"
        self._table = PageTable(config.max_sequences, config.max_pages, config.block_tokens)
        self._costs = Costs()
        self.draft = None if eagle is None else PlainDraft(eagle, self)

    @property
    def config(self) -> TextConfig:
        return self.decoder.config

    @property
    def communicator(self) -> Communicator:
        return self.decoder.communicator

    @property
    def num_weight_bytes(self) -> int:
        draft = 0 if self.draft is None else self.draft.head.num_weight_bytes
        return self.decoder.num_weight_bytes + draft

    @property
    def slicer(self) -> "PlainDevice | None":
        """The device itself where steps can be cut: on a CPU and one rank alone; else None.

        Several ranks would have to stop at the same places, and on a GPU the clock says nothing
        about what has been computed. Clipped activations are counted for whole steps only.
        """
        is_alone = self.communicator.size == 1 and self.saturation is None
        return self if self._is_cpu and is_alone else None

    @property
    def saturation(self) -> SaturationCounts | None:
        return self.decoder.saturation

    def run(
        self, step: PlannedStep, vectors_ID: Tensor | None, *, wants_hidden: bool = False
    ) -> Results:
        made = self.step_of(step, self.attend_of(step, self.cache), vectors_ID)
        if self.saturation is not None:
            self.saturation.begin(step.num_rows, made.image_rows_I, made.logit_rows_R)
        if wants_hidden:
            return Results(*self.decoder.forward_with_hidden(made))
        return Results(self.decoder(made), None)

    def follow(self, step: PlannedStep) -> None:
        self.run(step, None)

    @torch.inference_mode()
    def begin(self, step: PlannedStep, placing: Placing | None) -> DecoderSlices:
        attend = self.attend_of(step, self.cache)

        def step_of(placement: Placement | None) -> Step:
            if placement is None:
                return self.step_of(step, attend, None)
            shown = replace(step, image_rows_I=placement.rows_I)
            return self.step_of(shown, attend, placement.vectors_ID)

        return DecoderSlices(self.decoder, step_of, attend, placing, self._costs)

    def facts(self) -> dict[str, object]:
        return {"decoder": "ops, one by one"}

    def attend_of(self, step: PlannedStep, cache: PagedCache) -> PagedAttend:
        """Attention of a step over the paged cache, whose page table is brought up to date."""
        self._table.apply(step.changes)
        return PagedAttend(
            cache,
            self._sent(step.packed_5T[3]),
            self._sent(self._table.pages_of(step)),
            self._sent(step.context_lengths_S),
            self._sent(step.query_starts_S1),
        )

    def step_of(self, step: PlannedStep, attend: PagedAttend, vectors_ID: Tensor | None) -> Step:
        """Turn the host's arrays of a step into the tensors that the decoder takes."""
        image_rows_I, logit_rows_R = step.image_rows_I, step.logit_rows_R
        return Step(
            self._sent(step.packed_5T[0]),
            self._sent(step.packed_5T[2]),
            attend,
            None if len(logit_rows_R) == step.num_rows else self._sent(logit_rows_R),
            None if image_rows_I is None else self._sent(image_rows_I),
            vectors_ID,
        )

    def _sent(self, array: NDArray[Any]) -> Tensor:
        """On a CPU it is the same memory, and even asking for that takes longer than this."""
        tensor = torch.from_numpy(array)
        return tensor if self._is_cpu else tensor.to(self._device)


class PlainDraft:
    """An `EagleHead` beside its target, whose embedding, head and pages it uses."""

    def __init__(self, head: EagleHead, target: PlainDevice) -> None:
        self.head = head
        self._target = target
        # bf16, whatever the target's: it is a small part of the whole, and has no scales.
        self.cache = PagedCache(
            head.config,
            format="bf16",
            num_pages=target.cache.num_pages,
            block_tokens=target.cache.block_tokens,
            kv_scales=(),
            device=target.decoder.embedding_VD.device,
        )

    def advance(self, step: PlannedStep, hidden_TD: Tensor, vectors_ID: Tensor | None) -> Guessed:
        target = self._target
        made = target.step_of(step, target.attend_of(step, self.cache), vectors_ID)
        embedded_TD = target.decoder.embed(made)
        guessed_TD: Tensor = self.head(embedded_TD, hidden_TD, made.positions_T, made.attend)
        return Guessed(guessed_TD[step.logit_rows_R.tolist()], None)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._target.decoder.logits(hidden_RD)
