"""Takes a long computation (`model.parts`) on by as much as the time allows, call after call.

How much fits is known from what such parts took before. Where the calls divide the computation does
not change its result. No torch.
"""

import time
from collections.abc import Iterator

from halfbyte.model.parts import Part

# Weight of the newest measurement in the average of a cost.
_GAIN = 0.3
# More units than any part has: what a cost near zero seems to allow.
_MANY = 2**30


class Costs:
    """Seconds that a unit of each kind of part takes, as measured over all computations."""

    def __init__(self) -> None:
        self._unit_s: dict[tuple[str, int], float] = {}

    def num_fitting(self, part: Part, seconds: float) -> int | None:
        """Number of units of a part that take so many seconds; None if none was measured."""
        unit_s = self._unit_s.get((part.name, part.size))
        return None if unit_s is None else int(min(seconds / unit_s, _MANY))

    def note(self, part: Part, count: int, seconds: float) -> None:
        """Learn from the seconds that `count` units of a part took."""
        kind = part.name, part.size
        old = self._unit_s.get(kind)
        new = max(seconds / count, 1e-9)
        self._unit_s[kind] = new if old is None else old + _GAIN * (new - old)


class Walk:
    """A computation that runs in slices, and how far it has come."""

    def __init__(self, parts: Iterator[Part], costs: Costs) -> None:
        self._parts = parts
        self._costs = costs
        self._part: Part | None = None
        self._num_done = 0

    def advance(self, deadline: float) -> bool:
        """Compute until about the deadline, one unit at least; True once everything is computed.

        deadline  a time of `time.perf_counter`, in seconds
        """
        is_first = True
        while True:
            if self._part is None:
                self._part = next(self._parts, None)
                self._num_done = 0
            if self._part is None:
                return True
            if not self._advance_part(self._part, deadline, is_first=is_first):
                return False
            is_first = False

    def _advance_part(self, part: Part, deadline: float, *, is_first: bool) -> bool:
        """Compute as much of the present part as fits; False if not even its least does."""
        started = time.perf_counter()
        left = part.num_units - self._num_done
        least = min(part.least, left)
        fitting = self._costs.num_fitting(part, deadline - started)
        # A part that was never measured is tried while there is any time left.
        is_over = started >= deadline if fitting is None else fitting < least
        if is_over and not is_first:
            return False
        count = min(max(fitting or 0, least), left)
        part.compute(self._num_done, self._num_done + count)
        self._costs.note(part, count, time.perf_counter() - started)
        self._num_done += count
        if count == left:
            self._part = None
        return True
