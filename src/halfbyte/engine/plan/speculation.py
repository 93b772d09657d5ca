"""Speculation: guess some next tokens, let the model check them in one step, keep what it says.

Lossless by construction: at every position the sampler draws as it would without speculation, from
the same logits and the same random number, and a proposal stands if it is what was drawn. That is
rejection sampling against a guess that is certain of itself - accepted with the model's own
probability p of it, replaced by a draw from p without it - and more: the answer of a seed is the
same whatever was guessed, or whether at all (decision 0042).

    Lookup     guesses what followed the last tokens when they stood in the text before
    Pace       how many guesses are worth their time
    Speculator asks both, and keeps count

A step that checks k guesses writes K and V of k positions behind the known tokens. Those of guesses
that fell are never read: attention ends at the tokens of its step, and whatever token comes to
stand there writes its own first. Digests are made of known tokens only, so no block of a fallen
guess is ever shared. No torch here.
Sources: Leviathan et al., arXiv 2211.17192 (rejection sampling); Daliri et al., arXiv 2408.07978
(answers that do not depend on the drafter); Saxena, prompt lookup decoding (n-grams).
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

from halfbyte.engine.plan.scheduler import Scheduler
from halfbyte.engine.plan.sequence import Sequence, Work

# Tokens that must agree before a guess, candidates that are compared, tokens that are compared.
_LEAST_MATCH = 2
_MOST_CANDIDATES = 8
_MOST_MATCH = 16
# Classes of confidence: matches of at least so many tokens.
_MATCH_LEVELS = (8, 4, 3, 2)

# Acceptance that is assumed before anything is known, and how fast it is corrected.
_FIRST_RATE = 0.5
_OWN_MEMORY = 16
_SHARED_MEMORY = 256
# Weight of what others showed, for a sequence that begins.
_PRIOR = 2
# A class that does not pay is tried again after so many of its guesses were held back.
_PROBE = 32
# Cost of a guess as a share of a step's time per sequence, while nothing is measured.
_FIRST_COST = 0.1
# Less likely guesses are not made, however cheap.
_LEAST_CHANCE = 0.05
_GAIN = 0.2


class Guesser(Protocol):
    """Whoever proposes the tokens that a step checks (decision 0042)."""

    def confidence(self, sequence: Sequence) -> int | None:
        """Class of confidence in a guess for this sequence now; None if there is none."""

    def guess(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        """Up to so many next tokens for each sequence, all of which have blocks for them."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that has ended."""


class _Index:
    """Where each pair of tokens stood last, and before: chains through one sequence's tokens.

    Positions are those of the token behind the pair. Example, tokens a b c a b: pair ab -> 2; the
    guess behind the final ab is the token at 2, c.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = [0] * _LEAST_MATCH

    def find(self, token_ids: SequenceOf[int]) -> tuple[int, int]:
        """Longest match of the end of `token_ids` before it: (position behind it, its length).

        Among equal ones the latest; (0, 0) if there is none.
        """
        known = len(token_ids)
        for position in range(len(self._before), known):
            pair = token_ids[position - 2], token_ids[position - 1]
            self._before.append(self._last.get(pair, 0))
            self._last[pair] = position
        if known < _LEAST_MATCH:
            return 0, 0
        found = self._last.get((token_ids[-2], token_ids[-1]), 0)
        best = best_length = 0
        for _ in range(_MOST_CANDIDATES):
            if not found:
                break
            length = _LEAST_MATCH
            while (
                length < min(found, _MOST_MATCH)
                and token_ids[found - length - 1] == token_ids[known - length - 1]
            ):
                length += 1
            if length > best_length:
                best, best_length = found, length
            found = self._before[found]
        return best, best_length


class Lookup:
    """Guesses from the text itself: quotations, code that is edited, tables, repetition."""

    def __init__(self) -> None:
        self._indices: dict[int, _Index] = {}
        self._found: dict[int, int] = {}

    def confidence(self, sequence: Sequence) -> int | None:
        """The class of the longest match's length; 0 is the longest class."""
        index = self._indices.setdefault(sequence.arrival, _Index())
        position, length = index.find(sequence.token_ids)
        self._found[sequence.arrival] = position
        return next((i for i, least in enumerate(_MATCH_LEVELS) if length >= least), None)

    def guess(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        """Tokens that followed the match; past the end of the text, the guess itself repeated."""
        guesses = []
        for sequence, count in wanted:
            token_ids = sequence.token_ids
            start = self._found[sequence.arrival]
            period = len(token_ids) - start
            followed = token_ids[start : start + count]
            guesses.append([followed[i % period] for i in range(count)])
        return guesses

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.arrival, None)
        self._found.pop(sequence.arrival, None)


@dataclass(slots=True)
class _Rate:
    """A running mean of accepted guesses."""

    value: float = _FIRST_RATE
    weight: int = 1
    num_held_back: int = 0

    def note(self, outcome: bool, memory: int) -> None:
        self.weight = min(self.weight + 1, memory)
        self.value += (outcome - self.value) / self.weight


class Pace:
    """How many guesses pay: learns acceptance by class and sequence, and what a guess costs.

    A step of S sequences without guesses takes d and gives S tokens; each guess adds c. The i-th
    guess of a sequence is accepted with probability r**i, so it pays while r**i >= c * S / d. On a
    machine that waits for memory c is next to nothing, on one that computes it is d / S: there
    nothing pays but certainty.
    """

    def __init__(self, max_proposals: int, *, is_adaptive: bool = True) -> None:
        """Without `is_adaptive` every guess is as long as allowed."""
        self.max_proposals = max_proposals
        self._is_adaptive = is_adaptive
        self._rates: dict[tuple[int, int], _Rate] = {}
        self._shared: dict[int, _Rate] = {}
        self._levels: dict[int, set[int]] = {}
        # d by S; c.
        self._plain_s: dict[int, float] = {}
        self._guess_s: float | None = None

    def num_wanted(self, arrival: int, level: int, num_sequences: int) -> int:
        """Guesses worth checking for a sequence, beside so many generating ones."""
        if not self._is_adaptive:
            return self.max_proposals
        plain_s = self._plain_s.get(num_sequences)
        if plain_s is None:
            # One step without guesses first, to know what a step costs.
            return 0
        threshold = _FIRST_COST
        if self._guess_s is not None:
            threshold = max(self._guess_s * num_sequences / plain_s, _LEAST_CHANCE)
        rate = self._rate(arrival, level)
        wanted, chance = 0, rate.value
        while wanted < self.max_proposals and chance >= threshold:
            wanted += 1
            chance *= rate.value
        if wanted == 0:
            rate.num_held_back += 1
            wanted = int(rate.num_held_back >= _PROBE)
        if wanted:
            rate.num_held_back = 0
        return wanted

    def note(self, arrival: int, level: int, num_proposed: int, num_accepted: int) -> None:
        """Learn from checked guesses: those before the first wrong one, and that one."""
        for rate, memory in (
            # None: the sequence ended with this step.
            (self._rates.get((arrival, level)), _OWN_MEMORY),
            (self._shared.setdefault(level, _Rate()), _SHARED_MEMORY),
        ):
            if rate is None:
                continue
            for _ in range(num_accepted):
                rate.note(True, memory)
            if num_accepted < num_proposed:
                rate.note(False, memory)

    def observe(self, seconds: float, num_sequences: int, num_proposed: int) -> None:
        """Learn from a step that computed nothing but generating sequences and guesses."""
        plain_s = self._plain_s.get(num_sequences)
        if num_proposed == 0:
            gain = 1.0 if plain_s is None else _GAIN
            self._plain_s[num_sequences] = (plain_s or 0.0) * (1 - gain) + gain * seconds
        elif plain_s is not None:
            # Never free: a fast step by chance must not invite guesses without end.
            extra_s = max(seconds - plain_s, 0.01 * plain_s) / num_proposed
            gain = 1.0 if self._guess_s is None else _GAIN
            self._guess_s = (self._guess_s or 0.0) * (1 - gain) + gain * extra_s

    def forget(self, arrival: int) -> None:
        for level in self._levels.pop(arrival, ()):
            del self._rates[arrival, level]

    def _rate(self, arrival: int, level: int) -> _Rate:
        rate = self._rates.get((arrival, level))
        if rate is None:
            shared = self._shared.get(level, _Rate())
            rate = self._rates[arrival, level] = _Rate(shared.value, _PRIOR)
            self._levels.setdefault(arrival, set()).add(level)
        return rate


class Speculator:
    """Adds proposals to the works of a step and learns what became of them."""

    def __init__(self, guesser: Guesser, pace: Pace) -> None:
        self._guesser = guesser
        self._pace = pace
        # Class of the proposals in flight, by the arrival of their sequence.
        self._level_of: dict[int, int] = {}
        self.num_proposed = 0
        self.num_accepted = 0

    def propose(self, works: SequenceOf[Work], scheduler: Scheduler) -> list[Work]:
        """The works with proposals for generating sequences, as tokens and blocks allow."""
        works = list(works)
        budget = scheduler.max_batch_tokens - sum(work.count for work in works)
        num_sequences = sum(map(_is_generating, works))
        self._level_of.clear()
        chosen: list[int] = []
        wanted: list[tuple[Sequence, int]] = []
        for index, work in enumerate(works):
            if budget > 0 and _is_generating(work):
                count = self._num_granted(work.sequence, num_sequences, budget, scheduler)
                if count > 0:
                    chosen.append(index)
                    wanted.append((work.sequence, count))
                    budget -= count
        if wanted:
            for index, guess in zip(chosen, self._guesser.guess(wanted), strict=True):
                works[index] = replace(works[index], proposals=tuple(guess))
        return works

    def settle(self, work: Work, num_accepted: int) -> None:
        """Learn how many of a work's proposed tokens were accepted."""
        if work.proposals:
            arrival = work.sequence.arrival
            self.num_proposed += len(work.proposals)
            self.num_accepted += num_accepted
            self._pace.note(arrival, self._level_of[arrival], len(work.proposals), num_accepted)

    def observe(self, seconds: float, works: SequenceOf[Work]) -> None:
        """Learn from the time of a step, given its works as planned."""
        if all(work.count == 1 for work in works):
            num_proposed = sum(len(work.proposals) for work in works)
            self._pace.observe(seconds, len(works), num_proposed)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._guesser.forget(sequence)
        self._pace.forget(sequence.arrival)

    def _num_granted(
        self, sequence: Sequence, num_sequences: int, budget: int, scheduler: Scheduler
    ) -> int:
        """Proposals for one sequence, blocks for them reserved."""
        # The step gives one token in any case.
        room = min(sequence.max_tokens - sequence.num_generated - 1, budget)
        if room <= 0:
            return 0
        level = self._guesser.confidence(sequence)
        if level is None:
            return 0
        self._level_of[sequence.arrival] = level
        count = min(self._pace.num_wanted(sequence.arrival, level, num_sequences), room)
        return scheduler.reserve(sequence, count) if count > 0 else 0


def _is_generating(work: Work) -> bool:
    """The work computes the newest token of an answer."""
    return work.count == 1 and work.is_last and work.sequence.num_generated > 0
