"""What formats cost a group of linears: the error that each makes, weighed by its gradient.

Called by `sensitivity`, with what enters the linears of one layer and what comes back (decision
0153). The head's cost is measured as it is: the divergence of its logits.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.calibrate.backward import Passed
from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.stream import READERS
from halfbyte.formats.fp8 import decode_fp8, round_to_fp8
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, round_to_nvfp4
from halfbyte.modules import Mode, WeightFormat
from halfbyte.quantize.encode import HEAD_ROWS, Inputs, SourceWeight, encode_weight
from halfbyte.quantize.scales import input_scale, shared_maxima
from halfbyte.recipe.plan import Plan

# In every block scale and code a method may choose better; who is sensitive stays the same.
_PLAN = Plan("sensitivity", {}, "fp8")


def losses_of(
    sources: Sequence[SourceWeight],
    tap: str,
    formats: Sequence[WeightFormat],
    passed: Sequence[Passed],
    observed: float,
    mode: Mode,
    budget: MemoryBudget,
) -> dict[WeightFormat, float]:
    """What each format of one group would cost a position, on average, in nats.

    sources   weights of the group, in the order of the tap's readers
    tap       where the group reads its inputs
    passed    of each row what its linears read and wrote, and the gradients of what they wrote
    observed  the largest magnitude of their inputs
    """
    names = [source.name for source in sources]
    maxima = {source.name: source.amax() for source in sources}
    count = sum(row.inputs[tap].shape[0] for row in passed)
    losses: dict[WeightFormat, float] = {}
    for chosen in formats:
        if chosen == "bf16":
            losses[chosen] = 0.0
            continue
        shared = shared_maxima(maxima, dict.fromkeys(names, chosen))
        decoded = [encoded_weight(source, chosen, shared[source.name]) for source in sources]
        rounded = rounder(names[0], chosen, observed, mode)
        total = 0.0
        for row in passed:
            budget.check()
            x_TI = rounded(row.inputs[tap])
            along_T = torch.zeros(x_TI.shape[0], dtype=torch.float64, device=x_TI.device)
            for short, w_OI in zip(READERS[tap], decoded, strict=True):
                error_TO = F.linear(x_TI, w_OI) - row.outputs[short]
                weighed_TO = error_TO.float() * row.gradients[short].float()
                along_T += weighed_TO.sum(-1, dtype=torch.float64)
            total += float(along_T.square().sum())
        losses[chosen] = total / 2 / count
    return losses


def encoded_weight(source: SourceWeight, chosen: WeightFormat, amax: Tensor) -> Tensor:
    """What a weight becomes under scales by maxima, decoded again: bf16 (O, I)."""
    tensors = encode_weight(
        source, chosen, amax, "ieee", _PLAN, Inputs(None, None, None), MemoryBudget(None)
    )
    codes, scale = tensors[f"{source.name}.weight"], tensors[f"{source.name}.weight_scale"]
    if chosen == "fp8":
        return decode_fp8(codes, scale)
    return decode_nvfp4(EncodedNVFP4(codes, scale, tensors[f"{source.name}.tensor_scale"]))


def rounder(
    name: str, chosen: WeightFormat, observed: float, mode: Mode
) -> Callable[[Tensor], Tensor]:
    """How inputs of a linear are rounded where it will run; not at all in `weight_only`."""
    if mode == "weight_only" or chosen == "bf16":
        return lambda x_TI: x_TI
    scale = input_scale(name, chosen, torch.tensor(observed), "ieee")
    rounding = {"fp8": round_to_fp8, "nvfp4": round_to_nvfp4}[chosen]
    return lambda x_TI: rounding(x_TI, scale.to(x_TI.device))


class HeadCost:
    """The KL divergence that each format of the head causes by itself.

    Rows of the head are encoded once each, a part at a time, and never all logits are held.
    """

    def __init__(
        self, head_VD: Tensor, formats: Sequence[WeightFormat], observed: float, mode: Mode
    ) -> None:
        self._head_VD = head_VD
        self._formats = formats
        self._rounders = {chosen: rounder("head", chosen, observed, mode) for chosen in formats}
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add(self, hidden_TD: Tensor, logits_TV: Tensor) -> None:
        """Keep one row: what the head reads, and the logarithm of its exponentials' sum."""
        self._rows.append((hidden_TD, torch.logsumexp(logits_TV, dim=-1)))

    def means(self) -> dict[WeightFormat, float]:
        """Format -> nats a token; rounding may leave a mean a hair below zero."""
        return {chosen: self._mean(chosen) for chosen in self._formats}

    def _mean(self, chosen: WeightFormat) -> float:
        if chosen == "bf16":
            return 0.0
        amax = SourceWeight("head", self._head_VD, None).amax()
        rounded = [self._rounders[chosen](hidden_TD) for hidden_TD, _ in self._rows]
        # KL = sum of p (z - z') + log sum exp z' - log sum exp z, z being logits.
        expected = [torch.zeros_like(sums_T, dtype=torch.float64) for _, sums_T in self._rows]
        others = [torch.full_like(sums_T, -torch.inf) for _, sums_T in self._rows]
        for part in torch.split(self._head_VD, HEAD_ROWS):
            narrow = encoded_weight(SourceWeight("head", part, None), chosen, amax)
            for row, (hidden_TD, sums_T) in enumerate(self._rows):
                was_TP = F.linear(hidden_TD, part).float()
                is_TP = F.linear(rounded[row], narrow).float()
                share_TP = (was_TP - sums_T[:, None]).exp()
                expected[row] += (share_TP * (was_TP - is_TP)).sum(-1, dtype=torch.float64)
                others[row] = torch.logaddexp(others[row], torch.logsumexp(is_TP, dim=-1))
        kl = [
            expected_T + others_T.double() - sums_T.double()
            for expected_T, others_T, (_, sums_T) in zip(expected, others, self._rows, strict=True)
        ]
        return max(float(torch.cat(kl).mean()), 0.0)
