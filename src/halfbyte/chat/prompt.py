"""What both chat formats give back, and the control tokens that the router and grammars need."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.chat.images import ImageLayout
from halfbyte.chat.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Ids of the control tokens that structure an answer; None where the model has no such token.

    think, end_think   around the thought
    tool_calls, args   a call is tool_calls NAME args JSON
    call_id            where calls have an id: tool_calls NAME call_id ID args JSON
    """

    think: int | None = None
    end_think: int | None = None
    tool_calls: int | None = None
    args: int | None = None
    call_id: int | None = None

    @property
    def has_thinking(self) -> bool:
        """Whether the model has tokens that begin and end a thought."""
        return self.think is not None and self.end_think is not None

    @property
    def has_tools(self) -> bool:
        """Whether the model has a token that begins a tool call."""
        return self.tool_calls is not None and self.args is not None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image of a prompt as pixels, with the tokens that stand for it.

    pixels      uint8 (3, height, width); height and width are multiples of the merged patch
    offset      index in the prompt of the image's first token
    num_tokens  its tokens, row breaks and the end included
    """

    pixels: NDArray[np.uint8]
    offset: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a whole prompt, and its images in order."""

    token_ids: tuple[int, ...]
    images: tuple[EncodedImage, ...] = ()


def banned_control_ids(
    vocabulary: Vocabulary, tokens: ControlTokens, *, thinking: bool, tools: bool
) -> tuple[int, ...]:
    """Control ids that an answer may not contain: all but its ends and the allowed structure."""
    allowed: set[int | None] = set(vocabulary.eos_token_ids)
    if thinking:
        allowed |= {tokens.think, tokens.end_think}
    if tools:
        allowed |= {tokens.tool_calls, tokens.args, tokens.call_id}
    return tuple(sorted(set(vocabulary.control_names) - allowed))


def banned_in_text(
    vocabulary: Vocabulary, layout: ImageLayout | None, num_rows: int
) -> tuple[int, ...]:
    """Ids that a plain continuation may not contain: rows of the head without a token, and images.

    num_rows  rows of the model's head, which may be more than the vocabulary has tokens
    """
    padding = tuple(range(vocabulary.size, num_rows))
    if layout is None:
        return padding
    return (*padding, layout.image_token_id, layout.break_token_id, layout.end_token_id)
