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
_CROWDED = 4 / 3
# In "balanced", up to how many gaps long a step may be where those within one read prompts at less
# than this share of its rate, and what is left of a prompt would take longer than so many seconds.
_STRETCHED = 2.0
_POOR_RATE = 0.8
_PATIENCE_S = 20.0
# Part of the gap that is planned for; the rest is for steps that vary.
_PLANNED = 0.98
# A smaller step that reads prompts at this share of the best rate is preferred for its gap, where
# nobody else waits and in a crowd. What a crowd's steps read faster, its answers wait for.
_GOOD_RATE = 0.9
_CROWD_RATE = 0.93
# Weight of the newest measurement.
_GAIN = 0.3
# How far one step may be off, of what was expected, to be taken at its word.
_MOST_NEW = 0.25
# In a step, how far what is known of another size moves to what is usual.
_AGEING = 0.005
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
    num_left           tokens of the first of them that are still to be computed
    """

    num_decodes: int
    num_prompt_tokens: int
    depth: int = 0
    num_prompts: int = 1
    num_left: int = 0


class _Ratios:
    """By size, times over those measured beforehand; a size that has none has what is usual."""

    def __init__(self) -> None:
        self._usual = 1.0
        self.known: dict[int, float] = {}

    def of(self, size: int) -> float:
        return self.known.get(size, self._usual)

    def learn(self, size: int, ratio: float) -> None:
        """Note the ratio that a size has now."""
        self.known[size] = ratio
        self._usual += _GAIN * (ratio - self._usual)

    def age(self, size: int) -> None:
        """What is known of all but this size grows old, so that one too slow is tried again."""
        for other, ratio in self.known.items():
            if other != size:
                self.known[other] = ratio + _AGEING * (self._usual - ratio)


class StepCosts:
    """Seconds of steps by their rows, and by the context that a chunk's rows read besides.

    A busy device is slower than it was when it was measured, and nearly as much everywhere: each
    step also tells something of the sizes that are not in use.
    """

    def __init__(
        self,
        sizes: SequenceOf[int],
        measured_s: Mapping[int, float] | None = None,
        deep_s: Mapping[int, float] | None = None,
        shared_s: float | None = None,
    ) -> None:
        """Start from steps measured beforehand, if any; rows are padded to `sizes`, ascending.

        measured_s  seconds of steps of these sizes without context
        deep_s      of steps of up to so many rows: more for each pair of a chunk's row and a token
                    of its context. Those of the first entry, the small ones, read a context again
                    for each row
        shared_s    what a small step takes whose rows share what they read, as the large ones' do:
                    quicker where the context is long; None if there is no such thing
        """
        self.sizes = tuple(sizes)
        self._measured_s = dict(measured_s or {})
        self._measured_deep_s = dict(sorted((deep_s or {}).items()))
        self._shared_s = shared_s
        few = len(self._measured_deep_s) < 2
        self._small = 0 if few else next(iter(self._measured_deep_s))
        # Of steps without context, and for a row and a token of it: small steps, large ones, and
        # small ones whose rows share what they read.
        self._base = {True: _Ratios(), False: _Ratios()}
        self._deep = {True: _Ratios(), False: _Ratios()}
        self._shared = _Ratios()
        # What the answers' contexts add, in the last steps that did nothing else, and as a rule:
        # steps just ahead of a long prompt are held up by its reading, and none follows them until
        # it is computed.
        self._last_answers_s: deque[float] = deque(maxlen=_NUM_USUAL)
        self._answers_s = 0.0

    def size_for(self, num_rows: int) -> int:
        """The size that so many rows are padded to; beyond the last, the rows."""
        index = bisect.bisect_left(self.sizes, num_rows)
        return num_rows if index == len(self.sizes) else self.sizes[index]

    def seconds(self, num_rows: int, row_tokens: float = 0.0) -> float | None:
        """Seconds of a step of so many rows; None as long as no step was measured.

        row_tokens  pairs of a chunk's row and a token of its context
        """
        if not self._measured_s:
            return None
        size = self.size_for(num_rows)
        return self._answers_s + self._expected(size, row_tokens)[0]

    def observe(self, seconds: float, num_rows: int, row_tokens: float, *, is_mixed: bool) -> None:
        """Learn from a step; `is_mixed`: it did more than generate."""
        size = self.size_for(num_rows)
        if not self._measured_s:
            self._measured_s[size] = seconds
            return
        is_small = size <= self._small
        base, measured_s = self._base[is_small], self._measured(size)
        base_s = measured_s * base.of(size)
        if not is_mixed:
            self._last_answers_s.append(max(seconds - base_s, 0.0))
            self._answers_s = statistics.median(self._last_answers_s)
            if seconds < base_s:
                off_s = max(seconds - base_s, -_MOST_NEW * base_s)
                base.known[size] = (base_s + _GAIN * off_s) / measured_s
            return
        expected_s, is_shared = self._expected(size, row_tokens)
        # One step that something held up says little about the next.
        most_s = _MOST_NEW * expected_s
        off_s = _GAIN * min(max(seconds - self._answers_s - expected_s, -most_s), most_s)
        deep_s = self._measured_deep(size, is_shared) * row_tokens
        if row_tokens > _DEEP * num_rows and deep_s > 0:
            deep = self._shared if is_shared else self._deep[is_small]
            deep.learn(size, max(deep.of(size) + off_s / deep_s, 0.0))
        else:
            base.learn(size, max(base.of(size) + off_s / measured_s, 0.1))
        for ratios in (*self._base.values(), *self._deep.values(), self._shared):
            ratios.age(size)

    def table(self) -> dict[int, float]:
        """Seconds of a step by its number of rows, as known now."""
        sizes = {*self._measured_s}
        for ratios in self._base.values():
            sizes |= ratios.known.keys()
        return {size: self._base_s(size) for size in sorted(sizes)}

    def _expected(self, size: int, row_tokens: float) -> tuple[float, bool]:
        """Seconds of a step beside its answers' contexts, and whether its rows share theirs."""
        base_s, deep = self._base_s(size), self._deep[size <= self._small]
        alone_s = base_s + self._measured_deep(size, False) * deep.of(size) * row_tokens
        if self._shared_s is None or size > self._small:
            return alone_s, False
        deep_s = self._measured_deep(size, True) * self._shared.of(size)
        return min((alone_s, False), (max(base_s, self._shared_s) + deep_s * row_tokens, True))

    def _base_s(self, size: int) -> float:
        return self._measured(size) * self._base[size <= self._small].of(size)

    def _measured_deep(self, size: int, is_shared: bool) -> float:
        """Seconds measured for a pair of a row and a token of context, in steps of this size."""
        measured = self._measured_deep_s
        last = next(reversed(measured.values()), 0.0)
        if is_shared:
            return last
        return next((measured[up_to] for up_to in measured if up_to >= size), last)

    def _measured(self, size: int) -> float:
        """Seconds measured for this size, or between those of its neighbours."""
        known_s = self._measured_s
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


class _Choice(NamedTuple):
    """A step that a pacer may take: its prompt tokens, and how long it is expected to be."""

    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        """Prompt tokens a second."""
        return self.rows / self.seconds


class GapPacer:
    """Fills steps that generate with as many prompt tokens as their answers' gaps allow."""

    def __init__(self, target_gap_s: float, costs: StepCosts, *, is_balanced: bool = False) -> None:
        """Keep `target_gap_s` seconds between an answer's tokens while prompts are read.

        is_balanced  nobody asked for this very gap: where it would keep a prompt from being read,
                     as deep in a long one, it grows
        """
        self._target_gap_s = target_gap_s
        self._costs = costs
        self._is_balanced = is_balanced

    def prompt_tokens(self, demand: Demand) -> int | None:
        """Prompt tokens for a step beside answers; None = as many as fit.

        Of the steps within the target gap the smallest that reads prompts nearly at the best rate;
        where none is within it, the quickest.
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
            choices.append(_Choice(rows, seconds))
        allowed = [choice for choice in choices if choice.seconds <= limit_s]
        if self._is_balanced:
            longer = [choice for choice in choices if choice.seconds <= _STRETCHED * limit_s]
            most = max((choice.rate for choice in longer), default=0.0)
            best = max((choice.rate for choice in allowed), default=0.0)
            is_long = is_crowded or demand.num_left > _PATIENCE_S * best
            if is_long and best < _POOR_RATE * most:
                # Each is worth its rate, less by as much as its gap is longer.
                worth = lambda choice: choice.rate * min(limit_s / choice.seconds, 1.0)
                return max(longer or choices, key=worth).rows
        if not allowed:
            return min(choices, key=lambda choice: choice.seconds).rows
        share = _CROWD_RATE if is_crowded else _GOOD_RATE
        least = share * max(choice.rate for choice in allowed)
        return next(choice.rows for choice in allowed if choice.rate >= least)

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
