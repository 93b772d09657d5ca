"""A request's answers in the making: engine events to pieces, and pieces to whole messages.

Streamed or not, an answer is made of the same pieces: a response that is not streamed is the sum of
its chunks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning, Router
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.engine.request import (
    FinishEvent,
    GenerationRequest,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.server.api import wire
from halfbyte.server.api.pieces import Piece, TokenEntry, Usage


@dataclass(slots=True)
class Choice:
    """One answer in the making: its router, and the tokens that it has so far.

    has_own_prompt   the first answer to its prompt, whose cached tokens count; further ones of the
                     same request find what that one computed
    want_entries     log-probs of the content's tokens are wanted
    is_plain         a plain continuation: each counted token has its entry and its piece, also one
                     without text and the one that ends the answer
    keeps_stop       a stop string, or a stop token with a text, is part of the content
    """

    index: int
    request: GenerationRequest
    router: Router
    has_own_prompt: bool = True
    want_entries: bool = False
    is_plain: bool = False
    keeps_stop: bool = False
    shown_chars: int = 0
    num_tokens: int = 0
    first_token_s: float | None = None
    reason: str = "abort"
    finish: FinishEvent | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    _entries: list[TokenEntry] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the answer: the engine's count, or up to the stop string that ended it."""
        if self.finish is None or self.router.stopped_by is not None:
            return self.num_tokens
        return self.finish.completion_tokens

    def feed(self, event: TokensEvent) -> list[Piece]:
        """Pieces that new tokens make of this answer; none after a stop string."""
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        deltas: list[Delta] = []
        for position, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            self._token_ids.append(token_id)
            is_wanted = self.is_plain or self.router.is_content(token_id)
            if self.want_entries and is_wanted and event.logprobs is not None:
                self._entries.append(TokenEntry(event.logprobs[position], self.shown_chars))
            deltas += self._count(self.router.feed(token_id))
            if self.router.stopped_by is not None:
                break
        if self.is_plain and not deltas and event.token_ids:
            deltas = [Content("")]
        return self._pieces(deltas)

    def end(self, reason: str) -> list[Piece]:
        """Return the last pieces of an answer, with its finish reason."""
        pieces = self._pieces([*self._ending(), *self._count(self.router.finish())])
        ended_by = self.finish.stop_logprobs if self.finish is not None else None
        if self.is_plain and self.want_entries and ended_by and self.router.stopped_by is None:
            self._entries.append(TokenEntry(ended_by, self.shown_chars))
        if self.router.num_calls and reason == "stop":
            reason = "tool_calls"
        last = Piece(self.index, None, self._take_entries(), reason, self._take_token_ids())
        return [*pieces, last]

    def _ending(self) -> list[Delta]:
        """What is shown of the token that ended the answer, which the engine hands out last."""
        token_id = self.finish.stop_token_id if self.finish is not None else None
        if token_id is None or self.router.stopped_by is not None:
            return []
        self._token_ids.append(token_id)
        if not self.keeps_stop or not self.router.is_content(token_id):
            return []
        ended_by = self.finish.stop_logprobs if self.finish is not None else None
        if self.want_entries and ended_by and not self.is_plain:
            self._entries.append(TokenEntry(ended_by, self.shown_chars))
        return self._count(self.router.feed(token_id))

    def _count(self, deltas: list[Delta]) -> list[Delta]:
        self.shown_chars += sum(len(delta.text) for delta in deltas if isinstance(delta, Content))
        return deltas

    def _pieces(self, deltas: list[Delta]) -> list[Piece]:
        return [
            Piece(
                self.index,
                delta,
                self._take_entries() if isinstance(delta, Content) else (),
                token_ids=self._take_token_ids(),
            )
            for delta in _joined(deltas)
        ]

    def _take_token_ids(self) -> tuple[int, ...]:
        token_ids, self._token_ids = tuple(self._token_ids), []
        return token_ids

    def _take_entries(self) -> tuple[TokenEntry, ...]:
        entries, self._entries = tuple(self._entries), []
        return entries


@dataclass(slots=True)
class Job:
    """A validated request, ready to run: its choices and the id of its answer.

    request     what the client asked for
    messages    of a conversation, images decoded; only for answers that are made of messages
    tool_names  of tools that the model knows by other names: its names, and the client's
    """

    answer_id: str
    created: int
    request: wire.ChatRequest | wire.CompletionRequest
    choices: list[Choice]
    usage: Usage
    warnings: tuple[str, ...] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    tool_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids under which the engine knows the answers of this request."""
        return tuple(choice.request.request_id for choice in self.choices)

    def facts(self) -> dict[str, Any]:
        """Facts by name that the access log says of this request."""
        started = [choice.first_token_s for choice in self.choices if choice.first_token_s]
        return {
            "answer_id": self.answer_id,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": sum(choice.num_completion_tokens for choice in self.choices),
            "finish_reasons": [choice.reason for choice in self.choices],
            "first_token_ms": round(min(started) * 1000, 1) if started else None,
        }


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbouring text of the same kind becomes one delta."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            joined.append(delta)
    return joined


@dataclass(slots=True)
class AnswerMessage:
    """One whole answer, put together from its pieces."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append what one more piece says to the message."""
        delta = piece.delta
        self.entries += piece.entries
        self.token_ids += piece.token_ids
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
        if isinstance(delta, Content):
            self.content += delta.text
        elif isinstance(delta, Reasoning):
            self.reasoning += delta.text
        elif isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            self.calls.append({"id": delta.call_id, "type": "function", "function": function})
        elif isinstance(delta, CallArguments):
            self.calls[delta.index]["function"]["arguments"] += delta.text


def token_text(vocabulary: Vocabulary, token_id: int) -> str:
    """A token's text as `logprobs` shows it; `<ID>` beyond the vocabulary."""
    return vocabulary.piece(token_id) if token_id < vocabulary.size else f"<{token_id}>"
