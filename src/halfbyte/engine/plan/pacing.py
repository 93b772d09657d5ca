"""How many prompt tokens a step may carry while others generate. No torch.

People who read an answer see the gaps between its tokens, people who wait for one the rate at
which prompts are read. Both follow from what a step costs by its rows, which is no straight line: a
GPU pads the rows to sizes that its kernels have, and a few rows more can cost half as much again.
So a `GapPacer` knows the time of each size (`StepCosts`: measured when the engine is loaded,
refined by every step) and fills a step to a size whose time the answers bear. Where there are no
sizes, a `LinePacer` learns the line.

Where a chunk can stop anywhere (`slices`), a step has so much time for it instead of so many tokens
(`SlicePacer`), and what generating takes beside it is measured in every step.
"""

import bisect
import statistics
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

# Where nothing is measured yet.
_FIRST_TOKENS = 32
# The gap of "balanced" where steps have sizes: below 200 ms an answer still flows, and on the
# largest models a step that reads prompts well takes 100 to 180 ms.
BALANCED_GAP_S = 0.15
# Where more prompts wait than one, how much longer the gap may be: everybody behind waits for it.
_CROWDED = 1.3
# Part of the gap that is planned for; the rest is for steps that vary.
_PLANNED = 0.98
# Where nobody else waits, a smaller step that reads prompts at this share of the best rate is
# preferred for its gap.
_GOOD_RATE = 0.9
# Weight of the newest measurement.
_GAIN = 0.3
# Tokens of context from which on what a step takes longer than foretold is put down to it.
_DEEP = 4096
# While prompts keep coming, after how many steps beside answers one only generates: what generating
# alone takes stays true, and a prompt loses 6 % of its time.
_PROBE_EVERY = 16

# Of how many steps generating alone is the median.
_NUM_DECODES = 9
# Of how many the usual time beside no prompt is: more than go by while a long prompt is read into
# tokens, which takes processors from the steps.
_NUM_USUAL = 65
# Of a slice's allowance, the part that is planned for.
_SHARE = 0.8
# Part of the allowance that prompts keep where generating beside them takes longer than alone.
_LEAST_SHARE = 0.3
# How much longer than usual a step may take beside slices in "balanced".
_BALANCED_SLOWDOWN = 2.0


class Demand(NamedTuple):
    """What a step could do, in answers and prompt tokens.

    num_decodes        answers that get a token
    num_prompt_tokens  prompt tokens that could be computed beside them
    depth              tokens of the first of those prompts that are computed already
    num_prompts        prompts that are not yet read
    """

    num_decodes: int
    num_prompt_tokens: int
    depth: int = 0
    num_prompts: int = 1


class StepCosts:
    """Seconds of steps by their rows, and by the context that a chunk's rows read besides."""

    def __init__(
        self,
        sizes: SequenceOf[int],
        measured_s: Mapping[int, float] | None = None,
        deep_s: Mapping[int, float] | None = None,
    ) -> None:
        """Start from steps measured beforehand, if any; rows are padded to `sizes`, ascending.

        measured_s  seconds of steps of these sizes without context
        deep_s      of steps of up to so many rows: more for each pair of a chunk's row and a token
                    of its context; small steps may read a context again for each row
        """
        self.sizes = tuple(sizes)
        self._known_s = dict(measured_s or {})
        self._measured_deep_s = dict(sorted((deep_s or {}).items()))
        # Refined size by size.
        self._deep_s: dict[int, float] = {}
        # What the answers' contexts add.
        self._answers_s = 0.0

    def size_for(self, num_rows: int) -> int:
        """The size that so many rows are padded to; beyond the last, the rows."""
        index = bisect.bisect_left(self.sizes, num_rows)
        return num_rows if index == len(self.sizes) else self.sizes[index]

    def seconds(self, num_rows: int, row_tokens: float = 0.0) -> float | None:
        """Seconds of a step of so many rows; None as long as no step was measured.

        row_tokens  pairs of a chunk's row and a token of its context
        """
        size = self.size_for(num_rows)
        base_s = self._base_s(size)
        if base_s is None:
            return None
        return base_s + self._answers_s + self._deep_of(size) * row_tokens

    def observe(self, seconds: float, num_rows: int, row_tokens: float, *, is_mixed: bool) -> None:
        """Learn from a step; `is_mixed`: it did more than generate."""
        size = self.size_for(num_rows)
        base_s = self._base_s(size)
        if base_s is None:
            self._known_s[size] = seconds
            return
        if not is_mixed:
            more_s = max(seconds - base_s, 0.0)
            self._answers_s += _GAIN * (more_s - self._answers_s)
            if seconds < base_s:
                self._known_s[size] = base_s + _GAIN * (seconds - base_s)
            return
        deep_s = self._deep_of(size)
        off_s = seconds - base_s - self._answers_s - deep_s * row_tokens
        if row_tokens > _DEEP * num_rows:
            self._deep_s[size] = max(deep_s + _GAIN * off_s / row_tokens, 0.0)
        else:
            self._known_s[size] = max(base_s + _GAIN * off_s, 0.1 * seconds)

    def table(self) -> dict[int, float]:
        """Seconds of a step by its number of rows, as known now."""
        return dict(sorted(self._known_s.items()))

    def _deep_of(self, size: int) -> float:
        """Seconds for a pair of a row and a token of context, in steps of this size."""
        if size in self._deep_s:
            return self._deep_s[size]
        measured = self._measured_deep_s
        known = [measured[up_to] for up_to in measured if up_to >= size]
        return known[0] if known else next(reversed(measured.values()), 0.0)

    def _base_s(self, size: int) -> float | None:
        known_s = self._known_s
        if not known_s:
            return None
        if size in known_s:
            return known_s[size]
        below = [other for other in known_s if other < size]
        above = [other for other in known_s if other > size]
        if not below:
            return known_s[min(above)]
        lower = max(below)
        if not above:
            return known_s[lower] * size / lower
        upper = min(above)
        share = (size - lower) / (upper - lower)
        return known_s[lower] + share * (known_s[upper] - known_s[lower])


class GapPacer:
    """Fills steps that generate with as many prompt tokens as their answers' gaps allow."""

    def __init__(self, target_gap_s: float, costs: StepCosts) -> None:
        """Keep `target_gap_s` seconds between an answer's tokens while prompts are read."""
        self._target_gap_s = target_gap_s
        self._costs = costs

    def prompt_tokens(self, demand: Demand) -> int | None:
        """Prompt tokens for a step beside answers; None = as many as fit.

        Of the steps within the target gap the one that reads prompts at the best rate if others
        wait, else the smallest that does so nearly; where none is within it, the quickest.
        """
        if demand.num_prompt_tokens == 0:
            return None
        is_crowded = demand.num_prompts > 1
        limit_s = self._target_gap_s * _PLANNED * (_CROWDED if is_crowded else 1.0)
        choices = []
        for rows in self._choices(demand):
            depth = demand.depth + rows / 2
            seconds = self._costs.seconds(demand.num_decodes + rows, rows * depth)
            if seconds is None:
                return _FIRST_TOKENS
            choices.append((rows, seconds))
        allowed = [(rows, seconds) for rows, seconds in choices if seconds <= limit_s]
        if not allowed:
            return min(choices, key=lambda choice: choice[1])[0]
        least = max(rows / seconds for rows, seconds in allowed)
        if not is_crowded:
            least *= _GOOD_RATE
        return next(rows for rows, seconds in allowed if rows / seconds >= least)

    def observe(
        self, seconds: float, num_decodes: int, num_prompt_tokens: int, row_tokens: float = 0.0
    ) -> None:
        """Learn from the time that a finished step took."""
        if num_decodes + num_prompt_tokens > 0:
            self._costs.observe(
                seconds,
                num_decodes + num_prompt_tokens,
                row_tokens,
                is_mixed=num_prompt_tokens > 0,
            )

    def table(self) -> dict[int, float]:
        """Seconds of a step by its number of rows, as known now."""
        return self._costs.table()

    def _choices(self, demand: Demand) -> list[int]:
        """Prompt tokens that fill a step to a size, ascending; the last may be all there are."""
        found = []
        for size in self._costs.sizes:
            rows = size - demand.num_decodes
            if rows >= demand.num_prompt_tokens:
                break
            if rows > 0:
                found.append(rows)
        return [*found, demand.num_prompt_tokens]


class LinePacer:
    """A pacer for devices where the cost of a step grows with its rows, without sizes.

    A step with n prompt tokens lasts about d + n * p, d being a step that only generates. Both
    are learnt from steps as they come.
    """

    def __init__(self, target_gap_s: float | None) -> None:
        """Keep `target_gap_s` between an answer's tokens; None: twice the usual step."""
        self._target_gap_s = target_gap_s
        self._decodes_s: deque[float] = deque(maxlen=_NUM_DECODES)
        self._token_s: float | None = None
        # Steps that did both, one after the other.
        self._num_mixed = 0

    def prompt_tokens(self, demand: Demand) -> int | None:
        """Prompt tokens for a step beside answers; 0 = it is to measure what generating takes."""
        if self._num_mixed >= _PROBE_EVERY:
            return 0
        if not self._decodes_s or not self._token_s:
            return min(_FIRST_TOKENS, demand.num_prompt_tokens)
        usual_s = statistics.median(self._decodes_s)
        target_s = self._target_gap_s or _BALANCED_SLOWDOWN * usual_s
        allowance_s = max(_SHARE * (target_s - usual_s), _LEAST_SHARE * usual_s)
        return max(int(allowance_s / self._token_s), 1)

    def observe(
        self, seconds: float, num_decodes: int, num_prompt_tokens: int, row_tokens: float = 0.0
    ) -> None:
        """Learn from the time that a finished step took."""
        is_mixed = num_prompt_tokens > 0 and num_decodes > 0
        self._num_mixed = self._num_mixed + 1 if is_mixed else 0
        if num_prompt_tokens == 0:
            self._decodes_s.append(seconds)
        elif num_decodes == 0:
            # A pure prompt step is cheaper a token than one beside answers; a start, no more.
            if self._token_s is None:
                self._token_s = seconds / num_prompt_tokens
        elif self._decodes_s:
            extra_s = max(seconds - statistics.median(self._decodes_s), 0.05 * seconds)
            token_s = extra_s / num_prompt_tokens
            known_s = self._token_s
            self._token_s = token_s if known_s is None else known_s + _GAIN * (token_s - known_s)

    def table(self) -> dict[int, float]:
        """An empty table: a device without sizes has no seconds by size."""
        return {}


class FreePacer:
    """A pacer that never limits how many prompt tokens a step carries."""

    def prompt_tokens(self, demand: Demand) -> int | None:
        """None, which stands for as many prompt tokens as fit."""
        return None

    def observe(
        self, seconds: float, num_decodes: int, num_prompt_tokens: int, row_tokens: float = 0.0
    ) -> None:
        """Do nothing: a pacer that never limits has nothing to learn."""

    def table(self) -> dict[int, float]:
        """An empty table: no seconds of steps are kept."""
        return {}


class SlicePacer:
    """How long a step may work on prompts beside running answers."""

    def __init__(self, target_gap_s: float | None = None) -> None:
        """Keep `target_gap_s` between an answer's tokens; None: twice the usual step."""
        self._target_gap_s = target_gap_s
        # By number of running answers: steps that did nothing else, as they were before a prompt.
        self._usual_s: dict[int, deque[float]] = {}
        # What generating took in the last steps, prompts beside it or not.
        self._recent_s: deque[float] = deque(maxlen=_NUM_DECODES)

    def allowance_s(self, num_decodes: int) -> float:
        """Seconds for prompts in a step that generates for so many.

        A prompt pushes weights out of the processor's caches, so generating itself takes longer
        beside one; that counts against the prompt, but never takes all from it.
        """
        if not self._recent_s:
            return 0.0
        recent_s = statistics.median(self._recent_s)
        usual_s = recent_s
        if num_decodes in self._usual_s:
            # What was usual may be long ago, when contexts were longer.
            usual_s = min(statistics.median(self._usual_s[num_decodes]), recent_s)
        extra_s = (_BALANCED_SLOWDOWN - 1.0) * usual_s
        if self._target_gap_s is not None:
            extra_s = max(self._target_gap_s - usual_s, _LEAST_SHARE * usual_s)
        return max(_SHARE * extra_s - (recent_s - usual_s), _LEAST_SHARE * extra_s)

    def observe(self, num_decodes: int, decode_s: float, prompt_s: float) -> None:
        """Learn from a step that generated for `decode_s` and worked on prompts for `prompt_s`."""
        self._recent_s.append(decode_s)
        if prompt_s == 0.0:
            usual_s = self._usual_s.setdefault(num_decodes, deque(maxlen=_NUM_USUAL))
            usual_s.append(decode_s)
