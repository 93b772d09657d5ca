"""Tokens to text while they arrive: incremental UTF-8, and stop strings that span tokens.

Both are lossless: joined pieces equal the text of all tokens, wherever the stream was split.
"""

import codecs
from typing import NamedTuple

from halfbyte.chat.vocabulary import Vocabulary


class TextStream:
    """Text of one stream of tokens. A token may hold part of a character; it waits for the rest."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; control tokens add none."""
        return self._decoder.decode(self._vocabulary.token_bytes[token_id])

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopResult(NamedTuple):
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None


class StopStrings:
    """Cuts a text at the first stop string; holds back only what may still become one.

    "ab" + "cd" with stop "bc" gives "a" (the "b" waits), then "" and stop "bc".
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> StopResult:
        """Add text; once a stop was found, nothing more may be fed."""
        if not self._stops:
            return StopResult(text, None)
        buffer = self._held + text
        starts = [(buffer.find(stop), stop) for stop in self._stops if stop in buffer]
        if starts:
            # The one that ends first wins (else the answer would depend on how the text was
            # split), and of two that end together the longer.
            position, stop = min(starts, key=lambda found: (found[0] + len(found[1]), found[0]))
            self._held = ""
            return StopResult(buffer[:position], stop)
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return StopResult(buffer[: len(buffer) - keep], None)

    def flush(self) -> str:
        """What was held back, now known not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
