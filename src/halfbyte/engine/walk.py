"""Through a long computation as far as the time allows, again and again until its end. No torch.

How much fits is known from what parts took before; what is computed when does not change what
comes of it (`model.parts`).
"""

import time
from collections.abc import Iterator

from halfbyte.model.parts import Part

# Weight of the newest measurement of a cost.
_GAIN = 0.3
_MANY = 2**30


class Costs:
    """Seconds that units of parts take, as measured; outlives the computations."""

    def __init__(self) -> None:
        self._unit_s: dict[tuple[str, int], float] = {}

    def num_fitting(self, part: Part, seconds: float) -> int | None:
        """Units of a part that take about so long; None where nothing is known."""
        unit_s = self._unit_s.get((part.name, part.size))
        return None if unit_s is None else int(min(seconds / unit_s, _MANY))

    def note(self, part: Part, count: int, seconds: float) -> None:
        """Learn from the time that `count` units of work took."""
        kind = part.name, part.size
        old = self._unit_s.get(kind)
        new = max(seconds / count, 1e-9)
        self._unit_s[kind] = new if old is None else old + _GAIN * (new - old)


class Walk:
    """How far a computation has come that runs in slices."""

    def __init__(self, parts: Iterator[Part], costs: Costs) -> None:
        self._parts = parts
        self._costs = costs
        self._part: Part | None = None
        self._num_done = 0

    def advance(self, deadline: float) -> bool:
        """Compute until about then, one unit at least; True once all is computed.

        deadline  by `time.perf_counter`
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
        """Some of the present part, as much as fits; False if the least of it does not."""
        started = time.perf_counter()
        left = part.num_units - self._num_done
        least = min(part.least, left)
        fitting = self._costs.num_fitting(part, deadline - started)
        # What is not known yet is tried while there is time at all.
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
