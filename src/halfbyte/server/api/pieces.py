"""What answers are made of on their way to the wire: deltas, log-probs, ends, and counts."""

from dataclasses import dataclass
from typing import Any

from halfbyte.chat.router import Delta
from halfbyte.engine.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token of the content with its log-probability, for `logprobs`."""

    logprobs: TokenLogprobs
    offset_chars: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Something new in one choice: a delta, log-probs of its tokens, or its end.

    token_ids  all tokens since the piece before, also those that nothing is shown of
    """

    index: int
    delta: Delta | None = None
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Usage:
    """Numbers of tokens of a request, the same whether streamed or not."""

    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def chat_body(self) -> dict[str, Any]:
        """The `usage` object of OpenAI's chat and text answers."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "image_tokens": self.image_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }
