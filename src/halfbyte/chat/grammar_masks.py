"""A compiled grammar, bits of tokens, and the mask that waits until a thought has ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.vocabulary import Vocabulary

Bitmask = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class CheckedGrammar:
    """A grammar that was compiled within the limits once, and can be compiled again.

    is_free    a client wrote the rules themselves, not a schema or a regex
    num_bytes  what it takes when compiled
    warnings   what a lenient schema does not enforce
    param      the field of the request that it comes from
    """

    lark: str
    is_free: bool
    num_bytes: int = field(compare=False)
    warnings: tuple[str, ...] = field(compare=False)
    param: str = field(compare=False)


class CompiledGrammar:
    """A compiled grammar, shared by the masks of all answers that it holds.

    num_bytes  what it takes; llguidance adds to it as answers come by places that are new
    problem    why it can no longer be followed; None while it can
    """

    def __init__(self, matcher: Any, num_bytes: int) -> None:
        self.matcher = matcher
        self.compiled_bytes = num_bytes
        self.grown_bytes = 0
        self.problem: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that the compiled grammar takes by now, tables of states included."""
        return self.compiled_bytes + max(0, self.grown_bytes)


class Mask(Protocol):
    """The engine's TokenMask (engine.request), which this room may not import."""

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next; False also where only `fill` can tell."""

    def fill(self, bitmask: Bitmask) -> None:
        """Write a bit for each token: 1 where it may come next."""

    def accept(self, token_id: int) -> None:
        """Note that this token was chosen to come next."""

    def is_finished(self) -> bool:
        """Whether nothing but an end of answer may follow."""

    @property
    def problem(self) -> str | None:
        """Why the grammar could not be followed to its end; None if it could."""


# What a mask holds on to after its grammar has failed.
NOTHING = CompiledGrammar(None, 0)


class ThoughtMask:
    """Lets one thought pass before `inner`, and closes it after a number of tokens.

    inner    rules of what follows the thought; None for no rules
    budget   most tokens inside a thought; None for no bound
    has_begun  the answer after the thought has; there is none any more

    The thought may also be left out: at the start [THINK] and whatever `inner` allows are open.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        control: ControlTokens,
        inner: Mask | None,
        budget: int | None,
        *,
        has_begun: bool = False,
    ) -> None:
        assert control.think is not None
        assert control.end_think is not None
        self._think, self._end_think = control.think, control.end_think
        self._inner = inner
        self._budget = budget
        self._num_words = -(-vocabulary.size // 32)
        # Nor is the padding of the model's head text.
        padding = range(vocabulary.size, self._num_words * 32)
        self._control = token_bits((*vocabulary.control_names, *padding), self._num_words)
        self._end = token_bits((self._end_think,), self._num_words)
        self._token_bytes = vocabulary.token_bytes
        self._num_thought_tokens = 0
        self._pending = b""
        self._state = "after" if has_begun else "start"

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next, in the thought or behind it."""
        if self._state != "thought":
            if self._state == "start" and token_id == self._think:
                return True
            return self._inner is None or self._inner.allows(token_id)
        if token_id == self._end_think:
            return True
        word, bit = divmod(token_id, 32)
        is_text = word < self._num_words and not self._control[word] >> bit & 1
        return is_text and not self._is_spent()

    def fill(self, bitmask: Bitmask) -> None:
        """Write a bit for each token: 1 where it may come next."""
        words = bitmask[: self._num_words]
        if self._state != "thought":
            if self._inner is None:
                bitmask[:] = 0xFFFFFFFF
            else:
                self._inner.fill(bitmask)
            if self._state == "start":
                words |= token_bits((self._think,), self._num_words)
            return
        bitmask[self._num_words :] = 0
        words[:] = self._end if self._is_spent() else ~self._control | self._end

    def accept(self, token_id: int) -> None:
        """Note that this token was chosen, in the thought or behind it."""
        if self._state == "thought":
            self._accept_thought(token_id)
        elif self._state == "start" and token_id == self._think:
            self._state = "thought"
        else:
            self._state = "after"
            if self._inner is not None:
                self._inner.accept(token_id)

    def is_finished(self) -> bool:
        """Whether nothing but an end of answer may follow."""
        return self._state != "thought" and self._inner is not None and self._inner.is_finished()

    @property
    def problem(self) -> str | None:
        """What went wrong in the mask that follows the thought; None if nothing did."""
        return None if self._inner is None else self._inner.problem

    def _is_spent(self) -> bool:
        """A character begun is a character finished: never close a thought inside one.

        Three tokens finish any; a model that only begins characters gets no more than those.
        """
        if self._budget is None:
            return False
        over = self._num_thought_tokens - self._budget
        return over >= 0 and (not self._pending or over >= 3)

    def _accept_thought(self, token_id: int) -> None:
        if token_id == self._end_think:
            self._state = "after"
            return
        self._num_thought_tokens += 1
        self._pending = unfinished_character(self._pending + self._token_bytes[token_id])


def unfinished_character(text: bytes) -> bytes:
    """The bytes at the end that begin a UTF-8 character and do not finish it."""
    for length in range(1, min(3, len(text)) + 1):
        lead = text[-length]
        if lead < 0x80:
            return b""
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[-length:] if length < needed else b""
    return b""


def token_bits(token_ids: Sequence[int], num_words: int) -> Bitmask:
    """A bitmask with these ids set; ids past its end are left out."""
    words = np.zeros(num_words, dtype=np.uint32)
    ids = np.asarray([i for i in token_ids if i < num_words * 32], dtype=np.uint32)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32))
    return words
