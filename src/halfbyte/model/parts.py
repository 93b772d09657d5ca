"""Long computations in parts, so that other work can come between.

How much of a part is computed next is decided by who watches the clock (`engine.walk`).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Part(NamedTuple):
    """A run of like units, to be computed in order, any number of them in one call.

    name, size  parts alike in both take about as long a unit
    num_units   at least one
    least       the fewest units that are worth a call
    compute     (start, stop): computes these units
    """

    name: str
    size: int
    num_units: int
    least: int
    compute: Callable[[int, int], None]


def compute_all(parts: Iterable[Part]) -> None:
    """Compute parts without a break; each may be made only when those before it are done."""
    for part in parts:
        part.compute(0, part.num_units)
