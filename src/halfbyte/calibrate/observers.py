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
