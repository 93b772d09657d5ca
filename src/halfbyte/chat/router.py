"""Splits a stream of token ids into reasoning, content and tool calls.

Only control tokens switch state; the characters "[THINK]" in a text are text. Whatever the model
does - a lone [/THINK], a thought in a thought, a call without arguments, a cut anywhere - what it
said is kept and the answer stays usable. Fed token by token, so that how the stream was cut into
events cannot matter. Rules: docs/reference/chat.md#reading-an-answer.

    state      token           next       what comes out
    content    text            content    Content (through the stop strings)
    any        [THINK]         thought
    thought    text            thought    Reasoning
    thought    [/THINK]        content
    any        [TOOL_CALLS]    name       (the call before is finished)
    name       text            name       nothing yet
    name       [CALL_ID]       id         nothing; models of some versions write one
    id         text            id         nothing yet
    name, id   [ARGS]          arguments  CallStart if the name is known
    arguments  text            arguments  CallArguments, from what follows the opening brace on
    any        end of answer              what was held back
"""

import json
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from halfbyte.chat.detokenize import StopStrings, TextStream
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.tools import OpeningBrace, is_call_id, new_call_id
from halfbyte.chat.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the text that the user is shown."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought that precedes an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a tool call, whose arguments follow in pieces."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the arguments of call number `index`, in JSON."""

    index: int
    text: str


Delta: TypeAlias = Content | Reasoning | CallStart | CallArguments


class _State(Enum):
    CONTENT = 1
    THOUGHT = 2
    NAME = 3
    ARGUMENTS = 4
    CALL_ID = 5


class Router:
    """The state of one answer while its tokens are split into pieces.

    keeps_stop     a stop string that ends the answer is shown
    tool_names     names that a call may have; others reach the client as text
    live_calls     a grammar guarantees the arguments: stream them as they come. Otherwise a call is
                   held until it is whole, and becomes text if it is not a JSON object
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        control: ControlTokens,
        *,
        stops: tuple[str, ...] = (),
        keeps_stop: bool = False,
        tool_names: frozenset[str] = frozenset(),
        live_calls: bool = True,
    ) -> None:
        self._vocabulary = vocabulary
        self._control = control
        self._tool_names = tool_names
        self._live_calls = live_calls
        self._stops = StopStrings(stops)
        self._keeps_stop = keeps_stop
        self._state = _State.CONTENT
        self._stream = TextStream(vocabulary)
        self._name = ""
        self._call_id = ""
        self._arguments = ""
        self._brace = OpeningBrace()
        self._is_open = False
        self._used_ids: set[str] = set()
        self.num_calls = 0
        self.num_reasoning_tokens = 0
        self.stopped_by: str | None = None

    def is_content(self, token_id: int) -> bool:
        """Whether this token, if it comes next, is part of the content."""
        return self._state is _State.CONTENT and not self._vocabulary.is_control(token_id)

    def is_mark(self, token_id: int) -> bool:
        """Whether this token begins or ends a thought or a part of a call."""
        c = self._control
        return token_id in (c.think, c.end_think, c.tool_calls, c.args)

    def feed(self, token_id: int) -> list[Delta]:
        """Pieces that became certain with this token; feed nothing once `stopped_by` is set."""
        assert self.stopped_by is None, "fed after a stop string"
        if self._state is _State.THOUGHT or token_id == self._control.think:
            self.num_reasoning_tokens += 1
        if self._vocabulary.is_control(token_id):
            return self._switch(token_id)
        return self._text(self._stream.feed(token_id))

    def finish(self) -> list[Delta]:
        """Pieces that were held back, now that the answer has ended."""
        if self.stopped_by is not None:
            return []
        deltas = self._leave()
        held = self._stops.flush()
        return [*deltas, Content(held)] if held else deltas

    def _switch(self, token_id: int) -> list[Delta]:
        control = self._control
        state = self._state
        if token_id == control.think and state is not _State.THOUGHT:
            return self._enter(_State.THOUGHT)
        if token_id == control.end_think and state is _State.THOUGHT:
            return self._enter(_State.CONTENT)
        if token_id == control.tool_calls:
            return self._enter(_State.NAME)
        if token_id == control.call_id and state is _State.NAME:
            self._name += self._stream.flush()
            self._stream = TextStream(self._vocabulary)
            self._state = _State.CALL_ID
            return []
        if token_id == control.args and state in (_State.NAME, _State.CALL_ID):
            return self._open_call()
        # Any other control token says nothing here: an end of answer, a lone [/THINK].
        return []

    def _enter(self, state: _State) -> list[Delta]:
        deltas = self._leave()
        self._state = state
        return deltas

    def _leave(self) -> list[Delta]:
        """End the current state: flush its text, decide about an unfinished call."""
        deltas = self._text(self._stream.flush())
        self._stream = TextStream(self._vocabulary)
        if self._state in (_State.NAME, _State.CALL_ID):
            deltas += self._content(f"[TOOL_CALLS]{self._name}{self._shown_id()}")
        elif self._state is _State.ARGUMENTS and not self._is_open:
            deltas += self._close_held_call()
        self._state = _State.CONTENT
        self._name = self._call_id = self._arguments = ""
        self._is_open = False
        return deltas

    def _text(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._state is _State.CONTENT:
            return self._content(text)
        if self._state is _State.THOUGHT:
            return [Reasoning(text)]
        if self._state is _State.NAME:
            self._name += text
            return []
        if self._state is _State.CALL_ID:
            self._call_id += text
            return []
        if self._is_open:
            shown = self._brace.feed(text)
            return [CallArguments(self.num_calls - 1, shown)] if shown else []
        self._arguments += text
        return []

    def _content(self, text: str) -> list[Delta]:
        shown, self.stopped_by = self._stops.feed(text)
        if self._keeps_stop and self.stopped_by is not None:
            shown += self.stopped_by
        return [Content(shown)] if shown else []

    def _open_call(self) -> list[Delta]:
        rest = self._stream.flush()
        if self._state is _State.CALL_ID:
            self._call_id += rest
        else:
            self._name += rest
        self._stream = TextStream(self._vocabulary)
        self._state = _State.ARGUMENTS
        if not self._live_calls or self._name.strip() not in self._tool_names:
            return []
        self._is_open = True
        self._brace = OpeningBrace()
        return [self._start_call()]

    def _start_call(self) -> CallStart:
        self.num_calls += 1
        # The model's own id, which it has seen when the result comes back; never one twice.
        call_id = self._call_id.strip()
        if not is_call_id(call_id) or call_id in self._used_ids:
            call_id = new_call_id()
        self._used_ids.add(call_id)
        return CallStart(self.num_calls - 1, call_id, self._name.strip())

    def _shown_id(self) -> str:
        return f"[CALL_ID]{self._call_id}" if self._call_id else ""

    def _close_held_call(self) -> list[Delta]:
        if self._name.strip() in self._tool_names and _is_json_object(self._arguments):
            start = self._start_call()
            return [start, CallArguments(start.index, self._arguments)]
        return self._content(f"[TOOL_CALLS]{self._name}{self._shown_id()}[ARGS]{self._arguments}")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
