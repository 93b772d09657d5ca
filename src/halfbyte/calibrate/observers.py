"""What is remembered of activations: the largest magnitude. Order and grouping never matter.

`stream` shows every tensor that passes a tap point to one observer; `quantize.scales` turns the
results into scales.
"""

import torch
from torch import Tensor

from halfbyte.formats.measure import largest_magnitude


class AmaxObserver:
    """The plain absolute maximum: Model Optimizer's "max" calibration. NaN once NaN was seen.

    Any order and any grouping of the same elements give the same result, bit for bit: scales may
    not depend on batch size.
    """

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Observe every element of `x`; a NaN makes the result NaN."""
        largest = largest_magnitude(x)
        if self._largest is not None:
            largest = torch.maximum(self._largest, largest)
        self._largest = largest

    def result(self) -> Tensor:
        """The largest magnitude, 0-d on the CPU in the data's own dtype; 0 before any update."""
        return (
            torch.zeros((), dtype=torch.bfloat16) if self._largest is None else self._largest.cpu()
        )


_NUM_MAGNITUDES = 1 << 15  # of bf16


class MagnitudeCounts:
    """How often each of bf16's 32,768 magnitudes was seen (256 KB): nothing is binned or sampled.

    Whatever is asked of it may be asked later: a limit need not be known while data runs.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_NUM_MAGNITUDES, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of `x`, which must be bf16."""
        assert x.dtype == torch.bfloat16, f"{x.dtype}: only bf16 is counted exactly"
        bits = x.reshape(-1).view(torch.int16).bitwise_and(0x7FFF).to(torch.int32)
        self._counts += torch.bincount(bits, minlength=_NUM_MAGNITUDES).cpu()

    @property
    def total(self) -> int:
        """The number of elements that were counted so far."""
        return int(self._counts.sum())

    def largest(self) -> Tensor:
        """The largest magnitude seen, bf16 0-d; 0 before any update. NaN is larger than all."""
        seen = torch.nonzero(self._counts)[:, 0]
        bits = int(seen[-1]) if len(seen) else 0
        return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)

    def share_above(self, limit: float) -> float:
        """The share of all elements whose magnitude is larger than `limit`; 0 for none."""
        magnitudes = torch.arange(_NUM_MAGNITUDES, dtype=torch.int32).to(torch.int16)
        # NaN compares as false, so count what is not within.
        is_within = magnitudes.view(torch.bfloat16).to(torch.float64) <= limit
        return int(self._counts[~is_within].sum()) / max(self.total, 1)
