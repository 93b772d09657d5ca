"""Choosing one token a row from logits: ranking, filters, inversion of a uniform number.

This is the one statement of it. The host decides what a step's rows need (`plan_draws`), and
`choose_tokens` does it wherever the logits lie; an engine that runs ahead calls it without ever
looking at a value, others let it look at fewer candidates first. The tokens are the same.

Tokens are ranked by logit, equal ones by id, so that a rank names the same token however many
candidates are looked at and whatever else is in the batch.

Shapes: R rows, X some of them, V vocabulary, C candidates.
"""

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.plan.sequence import Sequence

# Where no token is possible: all are banned or masked, or the logits are not finite.
IMPOSSIBLE = -1

# Most filters leave fewer tokens than this; sorting the whole vocabulary costs ten times as much.
NUM_CANDIDATES = 256
# No vocabulary has more tokens; a larger top-k is none.
MAX_TOP_K = 2**31
# Index tensors of so many lists of banned tokens are kept.
_MAX_BAN_LISTS = 64


def uniform(seed: int, index: int, attempt: int = 0) -> float:
    """A number in [0, 1) that depends on the seed, the token's index and the attempt alone.

    `attempt` counts the draws of one token.
    """
    digest = hashlib.blake2b(
        (seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little"),
        digest_size=8,
        salt=bytes([attempt]) if attempt else b"",
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """How the tokens of R rows are chosen, as the host knows it.

    open_rows, filtered_rows  int64, rows that draw: from everything, and from what filters leave;
                              all other rows are greedy
    num_candidates            most likely tokens that top-k can keep in the filtered rows, or more
    is_bounded                top-k bounds every filtered row, so that those candidates suffice
    numbers_5R                f64: temperature, top_p, min_p, top_k, uniform number
    """

    open_rows: NDArray[np.int64]
    filtered_rows: NDArray[np.int64]
    num_candidates: int
    is_bounded: bool
    numbers_5R: NDArray[np.float64]

    @property
    def draws(self) -> bool:
        """Whether the token of any row is drawn at random."""
        return bool(len(self.open_rows) or len(self.filtered_rows))

    @property
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Arrays that `choose_tokens` needs beside the logits; none if no row draws."""
        return self.numbers_5R, self.open_rows, self.filtered_rows


def plan_draws(
    sequences: SequenceOf[Sequence], *, num_ahead: int = 0, attempt: int = 0
) -> DrawPlan:
    """Decide for one token of each sequence: the next one, or one `num_ahead` tokens further on."""
    open_rows: list[int] = []
    filtered_rows: list[int] = []
    top_ks: list[int] = []
    numbers_5R = np.ones((5, len(sequences)))
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.is_greedy:
            continue
        top_k = min(params.top_k, MAX_TOP_K)
        if params.top_p == 1.0 and top_k == 0 and params.min_p == 0.0:
            open_rows.append(row)
        else:
            filtered_rows.append(row)
            top_ks.append(top_k)
        drawn = uniform(sequence.seed, sequence.num_generated + num_ahead, attempt)
        numbers_5R[:, row] = (params.temperature, params.top_p, params.min_p, top_k, drawn)
    return DrawPlan(
        np.array(open_rows, dtype=np.int64),
        np.array(filtered_rows, dtype=np.int64),
        max(NUM_CANDIDATES, *top_ks) if top_ks else 0,
        # Without a top-k nobody knows here how far top-p and min-p reach.
        bool(top_ks) and min(top_ks) > 0,
        numbers_5R,
    )


def choose_tokens(
    logits_RV: Tensor, plan: DrawPlan, sent: SequenceOf[Tensor], *, may_look: bool
) -> Tensor:
    """The token of each row, int64 (R,), IMPOSSIBLE where none is.

    logits_RV  f32, banned tokens at -inf; not modified
    sent       `plan.arrays` on the device of the logits; empty if nothing is drawn
    may_look   the host may wait for values, to look at fewer candidates; no token depends on it
    """
    best_R = best(logits_RV)
    if not plan.draws:
        return best_R
    numbers_5R, open_rows, filtered_rows = sent
    tokens_R = best_R.clone()
    for rows_X, is_open in ((open_rows, True), (filtered_rows, False)):
        if not len(rows_X):
            continue
        is_all = len(rows_X) == len(logits_RV)
        logits_XV = logits_RV if is_all else logits_RV.index_select(0, rows_X)
        numbers_5X = numbers_5R if is_all else numbers_5R.index_select(1, rows_X)
        temperature_X1, *filters, uniform_X1 = numbers_5X[:, :, None].unbind()
        tempered_XV = tempered(logits_XV, temperature_X1.float())
        if is_open:
            drawn_X = invert(tempered_XV.exp().double(), uniform_X1)[:, 0]
        else:
            count = _num_candidates(plan, may_look)
            drawn_X = _draw_filtered(tempered_XV, filters, uniform_X1, count, may_look)
        tokens_R = drawn_X if is_all else tokens_R.index_copy_(0, rows_X, drawn_X)
    return torch.where(best_R == IMPOSSIBLE, IMPOSSIBLE, tokens_R)


def best(logits_RV: Tensor) -> Tensor:
    """The most likely token of each row, int64 (R,), or IMPOSSIBLE where there is none.

    A row of -inf has no token; a row with an infinite value or NaN has no distribution.
    """
    if logits_RV.device.type == "cpu":
        # Ten times as fast as torch's, which also wakes its threads for it.
        values_RV = logits_RV.numpy()
        best_R = values_RV.argmax(-1)
        is_possible_R = np.isfinite(values_RV[np.arange(len(best_R)), best_R])
        return torch.from_numpy(np.where(is_possible_R, best_R, IMPOSSIBLE))
    values_R, ids_R = logits_RV.max(dim=-1)
    return torch.where(torch.isfinite(values_R), ids_R, IMPOSSIBLE)


def _num_candidates(plan: DrawPlan, may_look: bool) -> int | None:
    """Most likely tokens to look at (first) in filtered rows; None = all."""
    return plan.num_candidates if plan.is_bounded or may_look else None


def _draw_filtered(
    tempered_XV: Tensor,
    filters: SequenceOf[Tensor],
    uniform_X1: Tensor,
    num_candidates: int | None,
    may_look: bool,
) -> Tensor:
    """Draw from the tokens that top-p, min-p and top-k, the `filters`, leave: int64 (X,)."""
    top_p_X1, min_p_X1, top_k_X1 = filters
    size = tempered_XV.shape[-1]
    count = size if num_candidates is None else min(num_candidates, size)
    total_X1 = tempered_XV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    values_XC, ids_XC = ranked(tempered_XV, count)
    weights_XC = values_XC.double().exp()
    while may_look and count < size:
        # Whether no filter keeps a token beyond the candidates.
        last_X1 = weights_XC[:, -1:] / weights_XC[:, :1]
        reached_X1 = weights_XC.sum(-1, keepdim=True) / total_X1
        is_covered_X1 = (top_k_X1 > 0) | (last_X1 < min_p_X1) | (last_X1 == 0.0)
        is_covered_X1 |= (top_p_X1 < 1.0) & (reached_X1 >= top_p_X1)
        if bool(is_covered_X1.all()):
            break
        # What a mask leaves may be flat; even then sorting all of it is rarely needed.
        count = min(count * 8, size)
        values_XC, ids_XC = ranked(tempered_XV, count)
        weights_XC = values_XC.double().exp()
    kept_XC = filtered(weights_XC, total_X1, top_k_X1, top_p_X1, min_p_X1)
    places_X1 = invert(kept_XC, uniform_X1)
    ids_X1 = ids_XC.gather(1, places_X1.clamp(min=0))
    return torch.where(places_X1 < 0, IMPOSSIBLE, ids_X1)[:, 0]


class BanLists:
    """Makes banned tokens impossible; keeps the index tensors of recurring lists on the device."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        # A server sends one of very few lists, again and again.
        self._ids: dict[tuple[int, ...], Tensor] = {}

    def apply(self, logits_RV: Tensor, bans: SequenceOf[tuple[int, ...]]) -> None:
        """Set each row's banned tokens to -inf, in place.

        A list that was never seen before waits for the device, a known one does not.
        """
        start = 0
        for stop in range(1, len(bans) + 1):
            if stop < len(bans) and bans[stop] == bans[start]:
                continue
            if bans[start]:
                logits_RV[start:stop].index_fill_(1, self._ids_of(bans[start]), -torch.inf)
            start = stop

    def _ids_of(self, banned: tuple[int, ...]) -> Tensor:
        ids = self._ids.get(banned)
        if ids is None:
            if len(self._ids) >= _MAX_BAN_LISTS:
                self._ids.clear()
            ids = torch.tensor(banned, dtype=torch.int64, device=self._device)
            self._ids[banned] = ids
        return ids


def tempered(logits_RV: Tensor, temperature_R1: Tensor) -> Tensor:
    """Logits over the temperature, the best one at 0; the temperature is above 0 in f32."""
    # Shifted first: a small temperature must not overflow to inf - inf.
    return (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1


def ranked(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best logits of each row and their ids, best first, equal ones by id."""
    size = logits_RV.shape[-1]
    if count >= size:
        values_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
        return values_RV, ids_RV
    if logits_RV.device.type == "cpu":
        # `topk` orders equal values as it likes, and cuts among them as it likes. Where the cut
        # falls between unequal ones only the order is to be mended.
        values_RC, ids_RC = logits_RV.topk(count, dim=-1)
        is_split = (logits_RV >= values_RC[:, -1:]).sum(-1) > count
        if not bool(is_split.any()):
            ids_RC = ids_RC.sort(dim=-1).values
            values_RC, order_RC = logits_RV.gather(-1, ids_RC).sort(
                dim=-1, descending=True, stable=True
            )
            return values_RC, ids_RC.gather(-1, order_RC)
    ids_RC = ranked_by_key(logits_RV, count)
    return logits_RV.gather(-1, ids_RC), ids_RC


def ranked_by_key(logits_RV: Tensor, count: int) -> Tensor:
    """The ids of `ranked` without a look at a value: for a device, and where the cut splits.

    The id becomes the low half of a key that no other token has. Bits of f32 are in order but for
    negative numbers, whose lower bits run backwards; adding 0 makes one zero of two.
    """
    size = logits_RV.shape[-1]
    bits_RV = (logits_RV + 0.0).view(torch.int32)
    bits_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFF_FFFF)
    low_V = torch.arange(size - 1, -1, -1, device=logits_RV.device)
    keys_RC = ((bits_RV.long() << 32) | low_V).topk(count, dim=-1).values
    return size - 1 - (keys_RC & 0xFFFF_FFFF)


def filtered(
    weights_RC: Tensor, total_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor, min_p_R1: Tensor
) -> Tensor:
    """Zero the weights that top-k, then top-p, then min-p drop; the best token always stays.

    weights_RC   f64, best first
    total_R1     f64, weight of all tokens, also of those that are no candidates
    top_k_R1     0 = off; top_p_R1 1.0 = off; min_p_R1 0.0 = off
    """
    rank_C = torch.arange(weights_RC.shape[-1], device=weights_RC.device)
    has_top_k_R1 = top_k_R1 > 0
    kept_RC = weights_RC * ((rank_C < top_k_R1) | ~has_top_k_R1)
    # What top-p refers to: everything, or what top-k left. A running sum does not depend on how
    # many zeros follow.
    running_RC = kept_RC.cumsum(-1)
    whole_R1 = torch.where(has_top_k_R1, running_RC[:, -1:], total_R1)
    # 1.0 keeps all; its product with a rounded sum might not.
    is_inside_RC = (running_RC - kept_RC < top_p_R1 * whole_R1) | (top_p_R1 == 1.0)
    kept_RC = kept_RC * (is_inside_RC | (rank_C == 0))
    return kept_RC * (weights_RC >= min_p_R1 * weights_RC[:, :1])


def invert(weights_RC: Tensor, uniform_R1: Tensor) -> Tensor:
    """Index in each row, drawn by f64 weights that need not sum to one: int64 (R, 1).

    It has a weight above zero. IMPOSSIBLE where no index has one, or where the sum is no number.
    """
    running_RC = weights_RC.cumsum(-1)
    total_R1 = running_RC[:, -1:]
    drawn_R1 = torch.searchsorted(running_RC, uniform_R1 * total_R1, right=True)
    drawn_R1 = drawn_R1.clamp_(max=weights_RC.shape[-1] - 1)
    # The first index whose running sum exceeds the target has a weight, unless rounding made the
    # target the whole sum, or a parallel sum is out of order by its last bits.
    best_R1 = weights_RC.argmax(-1, keepdim=True)
    drawn_R1 = torch.where(weights_RC.gather(-1, drawn_R1) > 0, drawn_R1, best_R1)
    is_possible_R1 = (total_R1 > 0) & (total_R1 < torch.inf)
    return torch.where(is_possible_R1, drawn_R1, IMPOSSIBLE)
