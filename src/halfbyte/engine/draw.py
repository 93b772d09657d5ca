"""One draw from logits: ranking, filters, inversion. The host's sampler and the device's share it.

Tokens are ranked by logit, equal ones by id, so that a rank names the same token however many
candidates are looked at and whatever else is in the batch. No value travels to the host here.

Shapes: R rows, V vocabulary, C candidates.
"""

import torch
from torch import Tensor

# Where no token is possible: all are banned or masked, or the logits are not finite.
IMPOSSIBLE = -1

# Most filters leave fewer tokens than this; sorting the whole vocabulary costs ten times as much.
NUM_CANDIDATES = 256


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
