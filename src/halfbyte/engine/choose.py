"""Choosing tokens on the device without waiting for it: what `sampler` does, for plain requests.

Temperature, top-k, top-p, min-p, banned tokens and seeds; the same draw from the same logits as
`sampler` makes. What needs the host between two tokens (masks, penalties, biases, log-probs) is
not for here: `is_choosable` says which sequences are. The host decides how much work the step's
rows need (`ChoicePlan`), the device does it; no value travels back before the tokens do.

Shapes: R rows, V vocabulary, C candidates.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.draw import (
    IMPOSSIBLE,
    NUM_CANDIDATES,
    filtered,
    invert,
    ranked,
    tempered,
)
from halfbyte.engine.sampler import uniform
from halfbyte.engine.sequence import Sequence

MAX_BAN_LISTS = 64
# No vocabulary has more tokens; a larger top-k is none.
MAX_TOP_K = 2**31


def is_choosable(sequence: Sequence) -> bool:
    """Whether the next token needs nothing of the host."""
    params = sequence.request.params
    return (
        params.logprobs is None
        and sequence.counts is None
        and sequence.request.mask is None
        and not sequence.wants_prompt_logprobs
        and not params.logit_bias
        and sequence.num_generated >= params.min_tokens
    )


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """How the tokens of R rows are chosen, as the host knows it.

    open_rows, filtered_rows  rows that draw: from everything, and from what filters leave; all
                              other rows are greedy
    num_candidates            most likely tokens looked at for filtered rows; 0 = all, sorted
    numbers                   f64 (5, R): temperature, top_p, min_p, top_k, uniform number
    bans                      each row's list of banned tokens
    """

    open_rows: tuple[int, ...]
    filtered_rows: tuple[int, ...]
    num_candidates: int
    numbers: NDArray[np.float64]
    bans: tuple[tuple[int, ...], ...]

    @property
    def draws(self) -> bool:
        return bool(self.open_rows or self.filtered_rows)


def plan_choice(sequences: SequenceOf[Sequence]) -> ChoicePlan:
    """Decide for the next token of each sequence; call before a place for it is reserved."""
    open_rows, filtered_rows, top_ks = [], [], []
    numbers = np.ones((5, len(sequences)))
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.is_greedy:
            continue
        if params.top_p == 1.0 and params.top_k == 0 and params.min_p == 0.0:
            open_rows.append(row)
        else:
            filtered_rows.append(row)
            top_ks.append(min(params.top_k, MAX_TOP_K))
        drawn = uniform(sequence.seed, sequence.num_generated)
        top_k = min(params.top_k, MAX_TOP_K)
        numbers[:, row] = (params.temperature, params.top_p, params.min_p, top_k, drawn)
    # Without a top-k nobody knows here how far top-p and min-p reach.
    is_bounded = bool(top_ks) and min(top_ks) > 0
    return ChoicePlan(
        tuple(open_rows),
        tuple(filtered_rows),
        max(NUM_CANDIDATES, *top_ks) if is_bounded else 0,
        numbers,
        tuple(sequence.request.params.banned_token_ids for sequence in sequences),
    )


class BanTable:
    """Recurring lists of banned tokens as rows of one mask on the device; row 0 bans nothing."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._rows: dict[tuple[int, ...], int] = {(): 0}
        self._mask_BV = torch.zeros(
            MAX_BAN_LISTS, vocab_size, dtype=torch.bool, device=torch.device(device)
        )

    def rows_of(self, bans: SequenceOf[tuple[int, ...]]) -> list[int]:
        """The row of each list. A new list waits for the device, a known one does not."""
        new = {banned for banned in bans if banned not in self._rows}
        if len(self._rows) + len(new) > MAX_BAN_LISTS:
            self._rows = {(): 0}
            self._mask_BV.zero_()
            new = set(bans) - {()}
        assert len(new) < MAX_BAN_LISTS, "see can_hold"
        for banned in sorted(new):
            row = len(self._rows)
            self._mask_BV[row, torch.tensor(banned, device=self._mask_BV.device)] = True
            self._rows[banned] = row
        return [self._rows[banned] for banned in bans]

    def apply(self, logits_RV: Tensor, rows_R: Tensor) -> None:
        """Make banned tokens impossible, in place."""
        logits_RV.masked_fill_(self._mask_BV.index_select(0, rows_R), -torch.inf)


def can_hold(bans: SequenceOf[tuple[int, ...]]) -> bool:
    """Whether a `BanTable` serves a step with these lists."""
    return len({*bans, ()}) <= MAX_BAN_LISTS


def choose_tokens(
    logits_RV: Tensor,
    plan: ChoicePlan,
    numbers_5R: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The token of each row, int64 (R,), IMPOSSIBLE where none is.

    logits_RV   f32, banned tokens at -inf
    numbers_5R  f64, `plan.numbers` on the device; None if nothing is drawn
    rows        the plan's open and filtered rows, int64 on the device; None likewise
    """
    best_R, tokens_R = logits_RV.max(dim=-1)
    # A row of -inf has no token, an infinite one no distribution; NaN compares false, too.
    is_possible_R = (best_R > -torch.inf) & (best_R < torch.inf)
    if plan.draws:
        assert numbers_5R is not None and rows is not None
        tokens_R = tokens_R.clone()
        for numbers, rows_X, is_open in (
            (plan.open_rows, rows[0], True),
            (plan.filtered_rows, rows[1], False),
        ):
            if numbers:
                drawn_X = _draw(
                    logits_RV.index_select(0, rows_X),
                    numbers_5R.index_select(1, rows_X),
                    None if is_open else plan.num_candidates,
                )
                tokens_R.index_copy_(0, rows_X, drawn_X)
    return torch.where(is_possible_R, tokens_R, IMPOSSIBLE)


def _draw(logits_XV: Tensor, numbers_5X: Tensor, num_candidates: int | None) -> Tensor:
    """One token a row; `num_candidates` None draws from everything."""
    temperature, top_p, min_p, top_k, uniform_X1 = numbers_5X[:, :, None].unbind()
    tempered_XV = tempered(logits_XV, temperature.float())
    if num_candidates is None:
        return invert(tempered_XV.exp().double(), uniform_X1)[:, 0]
    total_X1 = tempered_XV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    values_XC, ids_XC = ranked(tempered_XV, num_candidates or tempered_XV.shape[-1])
    kept_XC = filtered(values_XC.double().exp(), total_X1, top_k, top_p, min_p)
    places_X1 = invert(kept_XC, uniform_X1)
    ids_X1 = ids_XC.gather(1, places_X1.clamp(min=0))
    return torch.where(places_X1 < 0, IMPOSSIBLE, ids_X1)[:, 0]
