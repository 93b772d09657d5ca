"""What is remembered of activations: maxima, percentiles. Order and grouping never matter.

`stream` shows every tensor that passes a tap point to one observer; `quantize.scales` turns the
results into scales.
"""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from halfbyte.formats.measure import largest_magnitude


class Observer(Protocol):
    """Collects one statistic of a stream of tensors.

    Any order and any grouping of the same elements must give the same result, bit for bit: scales
    may not depend on batch size. Results are maxima in the data's own dtype, 0-d, on the CPU.
    """

    def update(self, x: Tensor) -> None:
        """Observe every element of `x`, which is not modified and not kept."""

    def merge(self, other: Self) -> None:
        """Add everything that `other` has observed; `other` is not modified."""

    def result(self) -> Tensor:
        """The magnitude that the format's largest value should stand for; 0 before any update."""


MakeObserver = Callable[[], Observer]


class AmaxObserver:
    """The plain absolute maximum: Model Optimizer's "max" calibration. NaN once NaN was seen."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Observe every element of `x`; a NaN makes the result NaN."""
        largest = largest_magnitude(x)
        if self._largest is not None:
            largest = torch.maximum(self._largest, largest)
        self._largest = largest

    def merge(self, other: Self) -> None:
        """Take the larger of both maxima; `other` is not modified."""
        if other._largest is not None:
            self.update(other._largest)

    def result(self) -> Tensor:
        """The largest magnitude observed, 0-d on the CPU; 0 before any update."""
        return (
            torch.zeros((), dtype=torch.bfloat16) if self._largest is None else self._largest.cpu()
        )


# bf16 has 2**15 magnitudes; infinity begins at 0x7F80.
_NUM_MAGNITUDES = 1 << 15
_FIRST_NONFINITE = 0x7F80


class PercentileObserver:
    """The smallest magnitude that at least `share` of all elements do not exceed; exact for bf16.

    Counts each of bf16's 32,768 magnitudes (256 KB), so nothing is binned or sampled. Any NaN or
    infinity makes the result NaN.
    """

    def __init__(self, share: float) -> None:
        assert 0 < share <= 1, f"share {share} is not in (0, 1]"
        self._share = share
        self._counts = torch.zeros(_NUM_MAGNITUDES, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of `x`, which must be bf16."""
        assert x.dtype == torch.bfloat16, f"{x.dtype}: only bf16 is counted exactly"
        bits = x.reshape(-1).view(torch.int16).bitwise_and(0x7FFF).to(torch.int32)
        self._counts += torch.bincount(bits, minlength=_NUM_MAGNITUDES).cpu()

    def merge(self, other: Self) -> None:
        """Add the counts of `other`, which is not modified."""
        self._counts += other._counts

    def result(self) -> Tensor:
        """The percentile of the magnitudes observed, bf16 0-d; 0 before any update."""
        total = int(self._counts.sum())
        if total == 0:
            return torch.zeros((), dtype=torch.bfloat16)
        if int(self._counts[_FIRST_NONFINITE:].sum()):
            return torch.tensor(torch.nan, dtype=torch.bfloat16)
        wanted = max(1, -int(-self._share * total // 1))
        reached = int(torch.searchsorted(self._counts.cumsum(0), wanted))
        return torch.tensor(reached, dtype=torch.int16).view(torch.bfloat16)
