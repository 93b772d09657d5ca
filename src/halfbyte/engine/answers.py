"""What a computed step makes of its answers: tokens chosen by the host, events, ends.

`core` decides what runs when; here is what comes of it for each request.

Shapes: T rows of a chunk, R rows with logits, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from torch import Tensor

from halfbyte.engine.draw import IMPOSSIBLE
from halfbyte.engine.plan.scheduler import Scheduler
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.plan.speculation import Speculator
from halfbyte.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.engine.runner import Computed
from halfbyte.engine.sampler import ChosenToken, Sampler, logprobs_of
from halfbyte.log import logger


class Answers:
    """The books of all requests that run or wait, and totals since the engine was loaded.

    request_ids                                      of requests that run or wait
    prompt_tokens, cached_tokens, generated_tokens   of requests that ended; tokens so far
    """

    def __init__(
        self,
        scheduler: Scheduler,
        sampler: Sampler,
        speculator: Speculator | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._scheduler = scheduler
        self._sampler = sampler
        self._speculator = speculator
        self._eos_token_ids = eos_token_ids
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.request_ids: set[str] = set()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    def conclude(self, computed: Computed, events: list[Event]) -> None:
        """Move every sequence on and choose tokens where the last known one was computed."""
        logits_RV = computed.logits_RV
        chosen: list[tuple[Work, int]] = []
        row = 0
        for work in computed.works:
            sequence = work.sequence
            if sequence.wants_prompt_logprobs:
                self._note_prompt_logprobs(work, logits_RV[row : row + work.count])
                row += work.count
            elif work.is_last:
                row += 1
            if work.is_last:
                chosen.append((work, row - 1))
                row += len(work.proposals)
            self._scheduler.advance(work)
        assert row == logits_RV.shape[0], f"{logits_RV.shape[0]} rows of logits, {row} used"
        num_checked = 0
        while chosen:
            chosen = self._choose(chosen, num_checked, logits_RV, events)
            num_checked += 1

    def _choose(
        self,
        works: SequenceOf[tuple[Work, int]],
        num_checked: int,
        logits_RV: Tensor,
        events: list[Event],
    ) -> list[tuple[Work, int]]:
        """Choose one token for each work; those whose next proposal it confirms.

        works        with the row of logits to choose from
        num_checked  proposals of each that are confirmed and appended already
        returns      works and rows to go on with: the sequence is as if the token had been computed
                     in a step of its own
        """
        rows = [row for _, row in works]
        sequences = [work.sequence for work, _ in works]
        if rows != list(range(len(logits_RV))):
            logits_RV = logits_RV[rows]
        confirmed = []
        choices = self._sampler.choose(logits_RV, sequences)
        for (work, row), choice in zip(works, choices, strict=True):
            sequence = work.sequence
            goes_on = self.accept(sequence, choice, events)
            proposals = work.proposals
            is_right = num_checked < len(proposals) and proposals[num_checked] == choice.token_id
            if goes_on and is_right:
                self._scheduler.advance(Work(sequence, sequence.num_computed, 1))
                confirmed.append((work, row + 1))
            elif proposals and self._speculator is not None:
                self._scheduler.trim(sequence)
                self._speculator.settle(work, num_checked + is_right)
        return confirmed

    def accept(self, sequence: Sequence, choice: ChosenToken, events: list[Event]) -> bool:
        """Append the chosen token, report it, and finish the sequence if it was the last.

        returns  whether the sequence goes on
        """
        request, params = sequence.request, sequence.request.params
        token_id, mask = choice.token_id, request.mask
        problem = None
        if token_id == IMPOSSIBLE:
            problem = "no token is possible: all are banned or masked, or the logits are NaN"
        elif mask is not None:
            problem = _accept_mask(request, token_id)
        prompt_logprobs = self._take_prompt_logprobs(sequence)
        if problem is not None:
            events.append(self.finish(sequence, "error", message=problem))
            return False
        if sequence.num_pending:
            sequence.settle(token_id)
        else:
            sequence.append(token_id)
        self.generated_tokens += 1
        is_end = token_id in sequence.stop_token_ids or (
            not params.ignore_eos and token_id in self._eos_token_ids
        )
        if not is_end or prompt_logprobs is not None:
            token_ids = () if is_end else (token_id,)
            logprobs = None
            if params.logprobs is not None:
                assert choice.logprobs is not None
                logprobs = () if is_end else (choice.logprobs,)
            events.append(TokensEvent(request.request_id, token_ids, logprobs, prompt_logprobs))
        if is_end:
            finish = self.finish(sequence, "stop", stop_token_id=token_id)
            if params.logprobs is not None:
                finish = replace(finish, stop_logprobs=choice.logprobs)
            events.append(finish)
        elif mask is not None and mask.is_finished():
            events.append(self.finish(sequence, "stop"))
        elif sequence.num_settled >= sequence.max_tokens:
            events.append(self.finish(sequence, "length"))
        return sequence.slot is not None

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        message: str | None = None,
    ) -> FinishEvent:
        """End an answer, in whatever state it is, and free its blocks."""
        self._scheduler.remove(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        sequence.is_finished = True
        request_id = sequence.request.request_id
        self.request_ids.remove(request_id)
        self._prompt_logprobs.pop(request_id, None)
        cached_tokens = sequence.cached_tokens or 0
        if sequence.cached_tokens is not None:
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += cached_tokens
        return FinishEvent(
            request_id,
            reason,
            stop_token_id,
            sequence.num_prompt,
            cached_tokens,
            sequence.num_settled,
            message,
        )

    def _note_prompt_logprobs(self, work: Work, logits_TV: Tensor) -> None:
        """Keep log-probs of the prompt tokens that follow the rows of this chunk."""
        sequence = work.sequence
        request = sequence.request
        if work.start == 0:
            self._prompt_logprobs[request.request_id] = []
        following = sequence.token_ids[work.start + 1 : work.start + work.count + 1]
        following = following[: sequence.num_prompt - 1 - work.start]
        if following:
            num_top = [request.params.prompt_logprobs or 0] * len(following)
            found = logprobs_of(logits_TV[: len(following)], following, num_top)
            self._prompt_logprobs[request.request_id] += found

    def _take_prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprobs, ...] | None:
        if not sequence.wants_prompt_logprobs:
            return None
        sequence.has_prompt_logprobs = True
        return tuple(self._prompt_logprobs.pop(sequence.request.request_id))

    def check(self) -> None:
        """Assert that the books and the scheduler's agree."""
        scheduled = (*self._scheduler.running, *self._scheduler.waiting)
        known = {sequence.request.request_id for sequence in scheduled}
        assert known == self.request_ids, f"known {self.request_ids}, scheduled {known}"
        assert set(self._prompt_logprobs) <= known


def _accept_mask(request: GenerationRequest, token_id: int) -> str | None:
    """Advance the request's mask; what went wrong, if anything did."""
    assert request.mask is not None
    try:
        request.mask.accept(token_id)
    # A mask is foreign code; its failure, a panic included, ends its own request and no other.
    except BaseException as error:
        logger.exception("the mask of request %s failed", request.request_id)
        return f"the token mask failed: {error}"
    return None
