"""How many prompt tokens a step may carry while others generate. No torch.

A step with n prompt tokens lasts about d + n * p, d being a step that only generates. Both are
measured as they come, so that one rule serves a laptop (p of a millisecond) and a GPU (p of a
third of one): with `max_slowdown` 2, running answers get their tokens at half their pace or better
while a prompt is worked in, however long the prompt.

d is a median, so that one step that waited for something else does not widen all that follow; and
while prompts keep coming, a step now and then only generates, so that d stays true.

Where a chunk can stop anywhere (`slices`), a step has so much time for it instead of so many tokens
(`SlicePacer`), and what generating takes beside it is measured in every step.
"""

import statistics
from collections import deque

# Where nothing is measured yet.
_FIRST_TOKENS = 32
# Weight of the newest measurement of p.
_GAIN = 0.2
# Part of the allowance that is planned for; the rest is for steps that vary.
_SHARE = 0.8
# Of how many steps d is the median, and after how many steps with prompts it is measured again:
# seldom enough to cost a prompt 3 % of its time, often enough to be right after a hundred steps.
_NUM_DECODES = 9
# Of how many the usual time beside no prompt is: more than go by while a long prompt is read into
# tokens, which takes processors from the steps.
_NUM_USUAL = 65
# Part of the allowance that prompts keep where generating beside them takes longer than alone.
_LEAST_SHARE = 0.3
_PROBE_EVERY = 16


class PrefillPacer:
    """Learns from the steps what a prompt token costs beside running answers."""

    def __init__(self, max_slowdown: float | None) -> None:
        """`max_slowdown` above 1; None never limits."""
        self._max_slowdown = max_slowdown
        self._decodes_s: deque[float] = deque(maxlen=_NUM_DECODES)
        self._decode_s: float | None = None
        self._prompt_token_s: float | None = None
        # Steps that did both, one after the other.
        self._num_mixed = 0

    def max_prefill_tokens(self) -> int | None:
        """Prompt tokens for the next step if it also generates; None = as many as fit, 0 = the
        step is to measure what generating alone takes.
        """
        if self._max_slowdown is None:
            return None
        if self._num_mixed >= _PROBE_EVERY:
            return 0
        if self._decode_s is None or not self._prompt_token_s:
            return _FIRST_TOKENS
        allowance_s = (self._max_slowdown - 1.0) * _SHARE * self._decode_s
        return max(int(allowance_s / self._prompt_token_s), 1)

    def observe(self, seconds: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """Learn from the time that a finished step took."""
        is_mixed = num_prompt_tokens > 0 and num_decodes > 0
        self._num_mixed = self._num_mixed + 1 if is_mixed else 0
        if num_prompt_tokens == 0:
            self._decodes_s.append(seconds)
            self._decode_s = statistics.median(self._decodes_s)
        elif num_decodes == 0:
            # A pure prompt step is cheaper a token than one beside answers; a start, no more.
            if self._prompt_token_s is None:
                self._prompt_token_s = seconds / num_prompt_tokens
        elif self._decode_s is not None:
            extra_s = max(seconds - self._decode_s, 0.05 * seconds)
            self._prompt_token_s = _smooth(self._prompt_token_s, extra_s / num_prompt_tokens)


class SlicePacer:
    """How long a step may work on prompts beside running answers."""

    def __init__(self, max_slowdown: float) -> None:
        """`max_slowdown` above 1."""
        self._max_slowdown = max_slowdown
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
        extra_s = (self._max_slowdown - 1.0) * usual_s
        return max(_SHARE * extra_s - (recent_s - usual_s), _LEAST_SHARE * extra_s)

    def observe(self, num_decodes: int, decode_s: float, prompt_s: float) -> None:
        """Learn from a step that generated for `decode_s` and worked on prompts for `prompt_s`."""
        self._recent_s.append(decode_s)
        if prompt_s == 0.0:
            usual_s = self._usual_s.setdefault(num_decodes, deque(maxlen=_NUM_USUAL))
            usual_s.append(decode_s)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _GAIN * (new - old)
