"""Runs planned work on a device, and with `workers` on all ranks at once.

Shapes: R rows with logits, T rows of a step, D model width, V vocabulary, I image tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.engine.config import EngineConfig
from halfbyte.engine.device import Device, Slices
from halfbyte.engine.draw import plan_draws
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.pinned import PendingTokens
from halfbyte.engine.plan.sequence import Work
from halfbyte.engine.plan.step import PageTable, PlannedStep, lay_out
from halfbyte.engine.workers import Workers


class Computed(NamedTuple):
    """What a step gave; logits and hidden states are the caller's to change.

    logits_RV  f32, of the rows that `lay_out` names
    hidden_TD  of every row, behind the final norm, if there is a draft model to read them
    """

    works: SequenceOf[Work]
    step: PlannedStep
    logits_RV: Tensor
    hidden_TD: Tensor | None


class SlicedPrompt(NamedTuple):
    """Prompts that are computed in slices, between the steps of running answers."""

    works: SequenceOf[Work]
    step: PlannedStep
    slices: Slices

    def advance(self, deadline: float) -> Computed | None:
        """Compute until about then, by `time.perf_counter`; the results once all is done."""
        results = self.slices.advance(deadline)
        return None if results is None else Computed(self.works, self.step, *results)


class Runner:
    """Lays works out as steps and has them computed: by its device, and by those of other ranks."""

    def __init__(
        self,
        device: Device,
        config: EngineConfig,
        images: ImageEncoder | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Take a resolved `config`; without `images` requests can show none."""
        self.device = device
        self.images = images
        self.table = PageTable(config.max_sequences, config.max_pages, config.block_tokens)
        self._workers = workers
        self._facts: dict[str, object] = {}

    @property
    def can_slice(self) -> bool:
        """Whether the device can stop within a step, so that `begin` works."""
        return self.device.slicer is not None

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Rows that the device pads steps to, ascending; () if it has no such sizes."""
        return self.device.step_sizes

    @property
    def can_run_ahead(self) -> bool:
        """Whether the device chooses tokens itself, so that `launch` works."""
        return self.device.ahead is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all ranks, a draft model's included."""
        others = 0 if self._workers is None else self._workers.weight_bytes
        return self.device.num_weight_bytes + others

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, summed over all ranks, a draft model's included."""
        draft = 0 if self.device.draft is None else self.device.draft.cache.num_bytes
        return self.device.cache.num_bytes * self.device.communicator.size + draft

    @property
    def failure(self) -> str | None:
        """Why no step can run any more: another rank has died."""
        return None if self._workers is None else self._workers.failure

    def saturation(self) -> tuple[tuple[str, str, int, int], ...]:
        """Clipped activations as `EngineStats` has them, of this rank; () if nobody counts."""
        counts = self.device.saturation
        return () if counts is None else counts.figures()

    def facts(self) -> dict[str, object]:
        """What runs the model and what memory it takes: facts by name, for people."""
        return {**self.device.facts(), **self._facts}

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Add facts by name that the loader alone knows, for people."""
        self._facts.update(facts)

    def run(self, works: SequenceOf[Work]) -> Computed:
        """Compute the tokens of `works`; return logits and hidden states of the wanted rows.

        What any device does with `work.proposals`, k of them behind the last known token: it
        computes them as the next k tokens of a prompt would be - positions, K and V included, all
        k + 1 rows causal - and gives logits for each of the k + 1 rows, in order. Blocks for them
        are there. The caller may drop the last of them: their K and V are then overwritten by a
        later step, before anything reads them.
        """
        step, vectors_ID = self._plan(works)
        with self._all_ranks(step):
            wants_hidden = self.device.draft is not None
            results = self.device.run(step, vectors_ID, wants_hidden=wants_hidden)
        return Computed(works, step, *results)

    @torch.inference_mode()
    def run_alone(self, work: Work) -> Tensor:
        """Logits f32 (R, V) of a sequence that has blocks but no slot, as it is not scheduled."""
        step, vectors_ID = self._plan([work])
        with self._all_ranks(step):
            return self.device.run(step, vectors_ID).logits_RV

    def launch(self, works: SequenceOf[Work]) -> PendingTokens:
        """Start a step and the choice of its tokens, without waiting for either.

        A token is chosen for each work that reaches the last known token, in order. Only where
        `can_run_ahead`, if every such sequence is choosable (`sampler.is_choosable`).
        """
        ahead = self.device.ahead
        assert ahead is not None
        chosen = [work.sequence for work in works if work.is_last]
        plan = plan_draws(chosen)
        bans = [sequence.request.params.banned_token_ids for sequence in chosen]
        step, vectors_ID = self._plan(works)
        step = replace(step, num_chosen=len(chosen))
        with self._all_ranks(step):
            return ahead.launch(step, vectors_ID, plan, bans)

    def wait(self, tokens: PendingTokens) -> list[int]:
        """The tokens of a launched step. WorkerError if a rank they depend on is lost."""
        with nullcontext() if self._workers is None else self._workers.awaiting():
            return tokens.wait()

    def begin(self, works: SequenceOf[Work]) -> SlicedPrompt:
        """Begin to compute the tokens of `works` in slices; only where `can_slice`."""
        slicer = self.device.slicer
        assert slicer is not None
        placing = None
        if self.images is not None:
            # A draft model makes the entry of a position of the token behind it.
            placing = self.images.begin(works, num_ahead=0 if self.device.draft is None else 1)
        step = lay_out(works, self.table)
        return SlicedPrompt(works, step, slicer.begin(step, placing))

    def lacks_images(self, works: SequenceOf[Work]) -> bool:
        """Whether any image that these works show is still to be encoded."""
        return self.images is not None and self.images.begin(works).has_missing

    def close(self) -> None:
        """End the processes of the other ranks, if there are any."""
        if self._workers is not None:
            self._workers.close()

    def _plan(self, works: SequenceOf[Work]) -> tuple[PlannedStep, Tensor | None]:
        """Lay out the step of these works; returns it and the vectors of its images."""
        placement = None if self.images is None else self.images.place(works)
        if placement is None:
            return lay_out(works, self.table), None
        return lay_out(works, self.table, placement.rows_I), placement.vectors_ID

    def _all_ranks(self, step: PlannedStep) -> AbstractContextManager[None]:
        """Context manager: the other ranks compute the step while the body computes our part."""
        return nullcontext() if self._workers is None else self._workers.running(step)
