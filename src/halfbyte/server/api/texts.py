"""How much text a request may bring, told before it is encoded.

No tokenizer makes fewer tokens of a text than its bytes over those of the longest token: what is
over the context even so is refused unread. The rest is counted piece by piece as far as twice the
context before it is encoded as a whole, so that no request costs more than one that fits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from halfbyte.server.api.messages_blocks import Base64Source
from halfbyte.server.api.messages_wire import CountRequest
from halfbyte.server.api.responses_wire import InputImage, ResponsesRequest

# Characters counted at once. A cut may split a token in two or, rarely, move those behind it; with
# this many between two cuts that is far from a factor of two.
_PIECE = 65_536
# Parts whose strings are no text.
_PICTURES = (wire.ImagePart, InputImage, Base64Source)
# Earlier thoughts: templates may leave them out of a prompt, so that they do not count as text.
_THOUGHTS = frozenset({"reasoning", "reasoning_content", "thinking"})


class Texts:
    """How much text one model's context allows, in bytes and tokens."""

    def __init__(self, vocabulary: Vocabulary, context: int) -> None:
        self._encode = vocabulary.encode_text
        self._context = context
        self._longest = max(map(len, vocabulary.token_bytes), default=1) or 1

    @property
    def most_bytes(self) -> int:
        """Bytes of text that no prompt of this context can exceed."""
        return self._context * self._longest

    def check_request(self, request: reading.Wire) -> None:
        """Refuse text, or token ids, that no context of this size holds; nothing is encoded."""
        if isinstance(request, wire.CompletionRequest):
            # Each prompt has the context to itself.
            for prompt in request.prompts:
                self._check_prompt(prompt)
        elif isinstance(request, wire.DetokenizeRequest):
            reading.check_count(len(request.tokens), self._context, "tokens", what="token ids")
        elif isinstance(request, wire.TokenizeRequest) and request.prompt is not None:
            self._check_prompt(request.prompt)
        elif isinstance(request, wire.RenderRequest):
            # A part of an answer, which the context held.
            self._check_bytes((request.text,), "text")
        elif isinstance(request, ResponsesRequest):
            parts = (request.input, request.instructions, request.tools)
            self._check_bytes(_strings(parts), "input")
        elif isinstance(request, CountRequest):
            said = (request.messages, request.system, request.tools)
            self._check_bytes(_strings(said), "messages")
        elif isinstance(request, (wire.ChatRequest, wire.TokenizeRequest)):
            self._check_bytes(_strings((request.messages, request.tools)), "messages")

    def check_tokens(self, texts: Iterable[str], param: str) -> None:
        """Refuse texts of clearly more tokens than the context; long ones take a while."""
        texts = tuple(texts)
        # No text has more tokens than bytes.
        if sum(map(_num_bytes, texts)) <= 2 * self._context:
            return
        left = 2 * self._context
        for text in texts:
            for start in range(0, len(text), _PIECE):
                left -= len(self._encode(text[start : start + _PIECE]))
                if left < 0:
                    raise RequestError(
                        f"{param}: this model's context is {self._context} tokens; the text has "
                        "more than twice as many",
                        param=param,
                        code="context_length_exceeded",
                    )

    def _check_prompt(self, prompt: str | Sequence[int]) -> None:
        if isinstance(prompt, str):
            self._check_bytes((prompt,), "prompt")
        elif len(prompt) > self._context:
            raise RequestError(
                f"prompt: {len(prompt)} token ids; this model's context is {self._context} tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    def _check_bytes(self, texts: Iterable[str], param: str) -> None:
        total = sum(map(_num_bytes, texts))
        if total > self.most_bytes:
            raise RequestError(
                f"{param}: {total:,} bytes of text do not fit this model's context of "
                f"{self._context} tokens, none of which has more than {self._longest} bytes",
                param=param,
                code="context_length_exceeded",
            )


def prompt_texts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """The texts of a conversation that its prompt is sure to hold."""
    for message in messages:
        yield from _strings({key: part for key, part in message.items() if key not in _THOUGHTS})
    yield from _strings(tools)


def _strings(value: Any) -> Iterator[str]:
    """Every text within a value; images and thoughts among parts have none."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            if item.get("type") not in ("thinking", "image_url"):
                left.extend(item)
                left.extend(item.values())
        elif isinstance(item, (list, tuple)):
            left.extend(item)
        elif isinstance(item, BaseModel) and not isinstance(item, _PICTURES):
            left.extend(item.__dict__.values())


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
