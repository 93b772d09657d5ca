"""Conversations made up for tests, in the form of each API, and answers read back from them."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from PIL import Image

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
MAX_TOKENS = 100


def _png(shade: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (shade, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURES = [_png(shade) for shade in (0, 200)]


@dataclass(frozen=True)
class Part:
    """A text, or the number of a picture."""

    text: str = ""
    picture: int | None = None


@dataclass(frozen=True)
class Use:
    """A call of a tool with its result."""

    call_id: str
    name: str
    arguments: dict[str, Any]
    result: tuple[Part, ...]


@dataclass(frozen=True)
class Turn:
    """What a user says, nothing behind results of tools perhaps, and what the assistant did."""

    user: tuple[Part, ...]
    thought: str | None
    text: str | None
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns, and a last message of the user's."""

    system: str | None
    turns: tuple[Turn, ...]
    last: tuple[Part, ...]

    @property
    def num_images(self) -> int:
        """Pictures in all of it."""
        return sum(part.picture is not None for part in self._parts())

    def _parts(self) -> Iterator[Part]:
        for turn in self.turns:
            yield from turn.user
            for use in turn.uses:
                yield from use.result
        yield from self.last


@dataclass(frozen=True)
class Answer:
    """What an answer says, whatever API it came over."""

    thought: str | None = None
    text: str | None = None
    calls: tuple[tuple[str, str], ...] = ()

    def tokens(self, think: int, end_think: int, calls: int, args: int) -> list[str | int]:
        """The answer as the model writes it: control tokens by id, and text."""
        from halfbyte.server.api.tool_names import model_name

        said: list[str | int] = []
        if self.thought:
            said += [think, self.thought, end_think]
        if self.text:
            said += [self.text]
        for name, arguments in self.calls:
            said += [calls, model_name(name), args, arguments]
        return said


_TEXTS = st.text("ab é{}\n😀", min_size=1, max_size=8).filter(lambda text: text.strip())
_PARTS = st.lists(
    st.one_of(
        _TEXTS.map(lambda text: Part(text)),
        st.integers(0, len(PICTURES) - 1).map(lambda number: Part(picture=number)),
    ),
    min_size=1,
    max_size=2,
).map(tuple)
_ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | _TEXTS, max_size=2)
_TURNS = st.builds(
    Turn,
    user=_PARTS,
    thought=st.none() | _TEXTS,
    text=st.none() | _TEXTS,
    uses=st.lists(
        st.builds(
            Use,
            call_id=st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True),
            name=st.sampled_from(["f", "g.h"]),
            arguments=_ARGUMENTS,
            result=_PARTS,
        ),
        max_size=2,
        unique_by=lambda use: use.call_id,
    ).map(tuple),
).filter(lambda turn: bool(turn.text or turn.uses))


def _conversation(
    system: str | None, turns: list[Turn], last: tuple[Part, ...], silent: list[bool]
) -> Conversation:
    """Where the turn before has results to answer, the user may be silent."""
    follows_uses = [False, *(bool(turn.uses) for turn in turns)]
    said = [
        () if is_silent and follows else parts
        for is_silent, follows, parts in zip(
            silent, follows_uses, [*(turn.user for turn in turns), last], strict=False
        )
    ]
    *users, last = said
    turns = [replace(turn, user=user) for turn, user in zip(turns, users, strict=True)]
    return Conversation(system, tuple(turns), last)


CONVERSATIONS = st.builds(
    _conversation,
    system=st.none() | _TEXTS,
    turns=st.lists(_TURNS, max_size=3),
    last=_PARTS,
    silent=st.lists(st.booleans(), min_size=4, max_size=4),
)

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTIONS = [
    {"name": name, "description": "Does it.", "parameters": _SCHEMA} for name in ("f", "g.h")
]


def asked(conversation: Conversation) -> dict[str, dict[str, Any]]:
    """The bodies of the three APIs, which all mean the same."""
    return {
        CHAT: _chat(conversation),
        RESPONSES: _responses(conversation),
        MESSAGES: _messages(conversation),
    }


def _chat(conversation: Conversation) -> dict[str, Any]:
    def parts(found: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": part.text}
            if part.picture is None
            else {"type": "image_url", "image_url": {"url": _url(part.picture)}}
            for part in found
        ]

    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        if turn.user:
            messages.append({"role": "user", "content": parts(turn.user)})
        said: dict[str, Any] = {"role": "assistant", "content": turn.text}
        if turn.thought:
            said["reasoning_content"] = turn.thought
        if turn.uses:
            said["tool_calls"] = [
                {
                    "id": use.call_id,
                    "type": "function",
                    "function": {"name": use.name, "arguments": _written(use)},
                }
                for use in turn.uses
            ]
        messages.append(said)
        messages += [
            {"role": "tool", "tool_call_id": use.call_id, "content": parts(use.result)}
            for use in turn.uses
        ]
    if conversation.last:
        messages.append({"role": "user", "content": parts(conversation.last)})
    tools = [{"type": "function", "function": function} for function in _FUNCTIONS]
    return {
        "messages": messages,
        "tools": tools,
        "reasoning_effort": "high",
        "max_tokens": MAX_TOKENS,
    }


def _responses(conversation: Conversation) -> dict[str, Any]:
    def parts(found: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [
            {"type": "input_text", "text": part.text}
            if part.picture is None
            else {"type": "input_image", "image_url": _url(part.picture)}
            for part in found
        ]

    items: list[dict[str, Any]] = []
    for turn in conversation.turns:
        if turn.user:
            items.append({"role": "user", "content": parts(turn.user)})
        if turn.thought:
            text = [{"type": "reasoning_text", "text": turn.thought}]
            items.append({"type": "reasoning", "summary": [], "content": text})
        if turn.text:
            text = [{"type": "output_text", "text": turn.text}]
            items.append({"type": "message", "role": "assistant", "content": text})
        for use in turn.uses:
            items.append(
                {
                    "type": "function_call",
                    "call_id": use.call_id,
                    "name": use.name,
                    "arguments": _written(use),
                }
            )
        for use in turn.uses:
            items.append(
                {
                    "type": "function_call_output",
                    "call_id": use.call_id,
                    "output": parts(use.result),
                }
            )
    if conversation.last:
        items.append({"role": "user", "content": parts(conversation.last)})
    return {
        "instructions": conversation.system,
        "input": items,
        "tools": [{"type": "function", **function} for function in _FUNCTIONS],
        "reasoning": {"effort": "high"},
        "max_output_tokens": MAX_TOKENS,
    }


def _messages(conversation: Conversation) -> dict[str, Any]:
    def parts(found: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": part.text}
            if part.picture is None
            else {
                "type": "image",
                "source": {
                    "type": "base64",
                    "media_type": "image/png",
                    "data": PICTURES[part.picture],
                },
            }
            for part in found
        ]

    turns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for turn in conversation.turns:
        turns.append({"role": "user", "content": [*results, *parts(turn.user)]})
        blocks: list[dict[str, Any]] = []
        if turn.thought:
            blocks.append({"type": "thinking", "thinking": turn.thought, "signature": ""})
        if turn.text:
            blocks.append({"type": "text", "text": turn.text})
        for use in turn.uses:
            blocks.append(
                {
                    "type": "tool_use",
                    "id": use.call_id,
                    "name": use.name,
                    "input": use.arguments,
                }
            )
        turns.append({"role": "assistant", "content": blocks})
        results = [
            {"type": "tool_result", "tool_use_id": use.call_id, "content": parts(use.result)}
            for use in turn.uses
        ]
    turns.append({"role": "user", "content": [*results, *parts(conversation.last)]})
    tools = [
        {"name": one["name"], "description": one["description"], "input_schema": _SCHEMA}
        for one in _FUNCTIONS
    ]
    return {
        "system": conversation.system,
        "messages": turns,
        "tools": tools,
        "thinking": {"type": "adaptive"},
        "max_tokens": MAX_TOKENS,
    }


def _url(picture: int) -> str:
    return "data:image/png;base64," + PICTURES[picture]


def _written(use: Use) -> str:
    return json.dumps(use.arguments, ensure_ascii=False)


# --- answers --------------------------------------------------------------------------------


def read_whole(path: str, body: dict[str, Any]) -> Answer:
    """The answer of a response that came whole."""
    if path == CHAT:
        message = body["choices"][0]["message"]
        calls = [one["function"] for one in message.get("tool_calls", ())]
        return Answer(
            message.get("reasoning_content"),
            message["content"] or None,
            tuple((call["name"], call["arguments"]) for call in calls),
        )
    items = body["output"] if path == RESPONSES else body["content"]
    thought, text = "", ""
    calls = []
    for item in items:
        if item["type"] in ("function_call", "tool_use"):
            arguments = item.get("arguments", None) or json.dumps(item.get("input"))
            calls.append((item["name"], arguments))
        elif item["type"] in ("reasoning", "thinking"):
            thought += item["content"][0]["text"] if path == RESPONSES else item["thinking"]
        else:
            text += item["content"][0]["text"] if path == RESPONSES else item["text"]
    return Answer(thought or None, text or None, tuple(calls))


def read_stream(path: str, text: str) -> Answer:
    """The answer that the pieces of a stream add up to."""
    thought, said = "", ""
    calls: list[list[str]] = []
    for line in text.split("\n"):
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        if path == CHAT:
            delta = event["choices"][0]["delta"]
            thought += delta.get("reasoning_content") or ""
            said += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append([call["function"]["name"], ""])
                calls[-1][1] += call["function"]["arguments"]
        elif path == "/v1/completions":
            said += event["choices"][0]["text"]
        elif path == RESPONSES:
            kind = event["type"]
            if kind == "response.output_item.added" and event["item"]["type"] == "function_call":
                calls.append([event["item"]["name"], ""])
            elif kind == "response.function_call_arguments.delta":
                calls[-1][1] += event["delta"]
            elif kind == "response.reasoning_text.delta":
                thought += event["delta"]
            elif kind == "response.output_text.delta":
                said += event["delta"]
        elif event["type"] == "content_block_start":
            if event["content_block"]["type"] == "tool_use":
                calls.append([event["content_block"]["name"], ""])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            thought += delta.get("thinking", "")
            said += delta.get("text", "")
            if delta["type"] == "input_json_delta":
                calls[-1][1] += delta["partial_json"]
    return Answer(thought or None, said or None, tuple((name, args) for name, args in calls))
