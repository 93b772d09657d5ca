"""Logits -> the next token of each sequence, and log-probs.

In this order: logit bias, penalties, banned tokens and masks, temperature, top-k, top-p, min-p, one
draw. Log-probs are of the model's own distribution, before all of these. `draw` chooses; here is
what the host does to the logits around it.

A draw inverts the cumulative distribution at one uniform number made of the request's seed and the
index of the token, so a sequence's tokens do not depend on what else is in the batch.

Shapes: R rows (one a sequence), V vocabulary, C candidates.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.engine.draw import (
    IMPOSSIBLE,
    BanLists,
    best,
    choose_tokens,
    plan_draws,
    ranked,
)
from halfbyte.engine.masks import MaskFiller
from halfbyte.engine.plan.sequence import Sequence
from halfbyte.engine.request import GenerationRequest, SamplingParams, TokenLogprobs
from halfbyte.kernels import dispatch
from halfbyte.log import logger

# Changes the logits (V,) of one request in place before anything else does, given the tokens
# generated so far; for tests that need a model to say certain things.
LogitsHook = Callable[[GenerationRequest, SequenceOf[int], Tensor], None]

# Tokens that a mask leaves are drawn from alone if they are no more than this.
_FEW = 4096


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """The token chosen for one sequence, or IMPOSSIBLE, with its log-probs."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def is_choosable(sequence: Sequence) -> bool:
    """Whether the next token needs nothing of the host but the plan of a draw (`draw`)."""
    params = sequence.request.params
    return (
        params.logprobs is None
        and sequence.counts is None
        and sequence.request.mask is None
        and not sequence.wants_prompt_logprobs
        and not params.logit_bias
        and sequence.num_generated >= params.min_tokens
    )


class Sampler:
    """Chooses tokens; remembers only index tensors of recurring lists of banned tokens."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device | str = "cpu",
        logits_hook: LogitsHook | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._hook = logits_hook
        self._masks = MaskFiller(vocab_size)
        self._bans = BanLists(device)

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Start filling masks before the model runs, where another thread can do it."""
        self._masks.forget()
        if torch.device(self._device).type != "cpu":
            self._masks.begin(sequence.request for sequence in sequences)

    def close(self) -> None:
        """End the thread that fills masks; begun masks are finished first."""
        self._masks.close()

    def choose(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> list[ChosenToken]:
        """Choose one token for each row; `logits_RV` (f32) is changed in place.

        A token is drawn as if there were no mask, and stands if the mask allows it; if not, one is
        drawn from what the mask leaves, so that most masks need never be filled. Greedily that is
        the same token, and without filters the same distribution (decision 0014). The caller tells
        masks which token was accepted.
        """
        if self._hook is None and all(map(_is_plain, sequences)):
            self._ban(logits_RV, sequences)
            return [ChosenToken(token_id) for token_id in best(logits_RV).tolist()]
        for row, sequence in enumerate(sequences):
            if self._hook is not None:
                generated = sequence.token_ids[sequence.num_prompt :]
                self._hook(sequence.request, generated, logits_RV[row])
        reported = [row for row, s in enumerate(sequences) if s.request.params.logprobs is not None]
        raw_RV = logits_RV[reported] if reported else None
        for row, sequence in enumerate(sequences):
            self._adjust(logits_RV[row], sequence)
        self._ban(logits_RV, sequences)
        token_ids = self._draw(logits_RV, sequences)
        for row, sequence in enumerate(sequences):
            request = sequence.request
            if request.mask is not None and not self._allows(request, token_ids[row]):
                self._mask(logits_RV[row], request)
                # Row by row, as a view: torch would copy several with all of its threads (0028).
                token_ids[row] = self._draw_again(logits_RV[row : row + 1], sequence)
        choices = [ChosenToken(token_id) for token_id in token_ids]
        if raw_RV is not None:
            num_top = [sequences[row].request.params.logprobs or 0 for row in reported]
            chosen = [max(token_ids[row], 0) for row in reported]
            for row, found in zip(reported, logprobs_of(raw_RV, chosen, num_top), strict=True):
                choices[row] = ChosenToken(token_ids[row], found)
        return choices

    def guess(
        self, logits_RV: Tensor, sequences: SequenceOf[Sequence], num_ahead: int
    ) -> list[int]:
        """What `choose` would draw if these were its logits, `num_ahead` tokens further on.

        By the same random number, so that a draft model that is right is right about the draw, too.
        Masks, bias and penalties are left out; `logits_RV` is changed in place.
        """
        self._ban(logits_RV, sequences)
        return [max(token_id, 0) for token_id in self._draw(logits_RV, sequences, num_ahead)]

    def _ban(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> None:
        self._bans.apply(logits_RV, [one.request.params.banned_token_ids for one in sequences])

    def _adjust(self, logits_V: Tensor, sequence: Sequence) -> None:
        """Bias, penalties and minimum length of one sequence, in place."""
        params = sequence.request.params
        if params.logit_bias:
            ids = self._ids(params.logit_bias)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=self._device)
        if sequence.counts is not None:
            self._penalize(logits_V, sequence, params)
        if sequence.num_generated < params.min_tokens:
            ends = {*sequence.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
            if ends:
                logits_V[self._ids(ends)] = -torch.inf

    def _allows(self, request: GenerationRequest, token_id: int) -> bool:
        """Whether a token drawn without the mask stands."""
        try:
            return token_id == IMPOSSIBLE or self._masks.allows(request, token_id)
        # `_mask` asks again and says so. A panic of foreign code is no Exception.
        except BaseException:
            return False

    def _mask(self, logits_V: Tensor, request: GenerationRequest) -> None:
        try:
            words = self._masks.words(request)
        # A mask is foreign code; its failure ends its own request and no other.
        except BaseException:
            logger.exception("the mask of request %s failed", request.request_id)
            logits_V.fill_(-torch.inf)
            return
        dispatch.mask_logits(logits_V, words)

    def _penalize(self, logits_V: Tensor, sequence: Sequence, params: SamplingParams) -> None:
        counts = sequence.counts
        assert counts is not None
        if params.repetition_penalty != 1.0:
            ids = self._ids(set(sequence.token_ids))
            values = logits_V[ids]
            factor = params.repetition_penalty
            logits_V[ids] = torch.where(values > 0, values / factor, values * factor)
        if counts:
            ids = self._ids(counts)
            occurrences = torch.tensor(list(counts.values()), device=self._device)
            logits_V[ids] -= params.frequency_penalty * occurrences + params.presence_penalty

    def _ids(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)

    def _draw_again(self, logits_1V: Tensor, sequence: Sequence) -> int:
        """From what a mask has left."""
        if logits_1V.device.type == "cpu":
            # Mostly that is a few tokens, which are drawn from faster alone.
            ids = np.flatnonzero(logits_1V.numpy()[0] > -np.inf)
            if 0 < len(ids) <= _FEW:
                few_1C = torch.from_numpy(logits_1V.numpy()[:, ids])
                (place,) = self._draw(few_1C, [sequence], attempt=1)
                return place if place == IMPOSSIBLE else int(ids[place])
        (token_id,) = self._draw(logits_1V, [sequence], attempt=1)
        return token_id

    def _draw(
        self,
        logits_RV: Tensor,
        sequences: SequenceOf[Sequence],
        num_ahead: int = 0,
        attempt: int = 0,
    ) -> list[int]:
        plan = plan_draws(sequences, num_ahead=num_ahead, attempt=attempt)
        sent: list[Tensor] = []
        if plan.draws:
            sent = [torch.from_numpy(array).to(logits_RV.device) for array in plan.arrays]
        token_ids: list[int] = choose_tokens(logits_RV, plan, sent, may_look=True).tolist()
        return token_ids


def logprobs_of(
    logits_RV: Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]
) -> list[TokenLogprobs]:
    """Log-probs of one token a row and of the `num_top[row]` most likely ones, best first."""
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    ids_R1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_RV.device)[:, None]
    own = logprobs_RV.gather(1, ids_R1)[:, 0].tolist()
    most = max(num_top)
    if most == 0:
        return [TokenLogprobs(i, value) for i, value in zip(token_ids, own, strict=True)]
    values_RC, top_RC = ranked(logprobs_RV, most)
    return [
        TokenLogprobs(token_id, value, tuple(zip(top[:wanted], values[:wanted], strict=True)))
        for token_id, value, wanted, top, values in zip(
            token_ids, own, num_top, top_RC.tolist(), values_RC.tolist(), strict=True
        )
    ]


def _is_plain(sequence: Sequence) -> bool:
    """Greedy and nothing else asked: one argmax serves all such rows."""
    return sequence.request.params.is_greedy and is_choosable(sequence)
