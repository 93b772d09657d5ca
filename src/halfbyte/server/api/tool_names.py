"""Names of tools that clients use and the model's format does not take, and the way back.

The format knows letters, digits, `_` and `-`, 64 of them at most, as OpenAI's API does. Clients of
MCP servers bring others: `files.read`, `github/create_issue`, names with a namespace in front. The
model sees such a name with `_` in the place of what it cannot hold and a digest behind it, which
depends on the name alone, so that a history says the same in every turn. Clients get their own
names back (decision 0087).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from halfbyte.server.api import wire

_MOST_CHARS = 64
_DIGEST_CHARS = 8
_PLAIN = re.compile(rf"[a-zA-Z0-9_-]{{1,{_MOST_CHARS}}}")
_ODD = re.compile(r"[^a-zA-Z0-9_-]")

Named = TypeVar("Named", wire.ChatRequest, wire.TokenizeRequest)


def model_name(name: str) -> str:
    """The name under which the model sees a tool.

    "get_weather" stays as it is; "files.read" becomes "files_read_" and eight hexadecimal digits.
    """
    if _PLAIN.fullmatch(name):
        return name
    # Written with escapes, so that every text has bytes.
    digest = hashlib.sha256(ascii(name).encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{_ODD.sub('_', name)[: _MOST_CHARS - _DIGEST_CHARS - 1]}_{digest}"


def client_names(tools: Iterable[wire.Tool]) -> dict[str, str]:
    """The client's name by the model's, for tools whose names differ."""
    names = [tool.function.name for tool in tools]
    return {model_name(name): name for name in names if model_name(name) != name}


def for_model(request: Named) -> Named:
    """The request with the model's names in tools, earlier calls and the choice of a tool.

    A choice that names no tool keeps its name, which the refusal then tells.
    """
    seen = {name: shown for shown, name in client_names(request.tools or ()).items()}
    updates: dict[str, Any] = {}
    if seen:
        updates["tools"] = [_tool(tool, seen) for tool in request.tools or ()]
    messages = request.messages or []
    renamed = [_message(message) for message in messages]
    if any(one is not other for one, other in zip(messages, renamed, strict=True)):
        updates["messages"] = renamed
    if seen and isinstance(request, wire.ChatRequest):
        updates["tool_choice"] = _choice(request.tool_choice, seen)
    return request.model_copy(update=updates) if updates else request


def _tool(tool: wire.Tool, seen: Mapping[str, str]) -> wire.Tool:
    name = tool.function.name
    if name not in seen:
        return tool
    return tool.model_copy(
        update={"function": tool.function.model_copy(update={"name": seen[name]})}
    )


def _message(message: Any) -> Any:
    calls = message.tool_calls if isinstance(message, wire.AssistantMessage) else None
    if not calls or all(_PLAIN.fullmatch(call.function.name) for call in calls):
        return message
    renamed = [
        call.model_copy(
            update={
                "function": call.function.model_copy(
                    update={"name": model_name(call.function.name)}
                )
            }
        )
        for call in calls
    ]
    return message.model_copy(update={"tool_calls": renamed})


def _choice(choice: Any, seen: Mapping[str, str]) -> Any:
    def named(one: wire.NamedTool) -> wire.NamedTool:
        name = seen.get(one.function.name, one.function.name)
        return one.model_copy(update={"function": wire.FunctionName(name=name)})

    if isinstance(choice, wire.NamedTool):
        return named(choice)
    if isinstance(choice, wire.AllowedTools):
        tools = [named(tool) for tool in choice.allowed_tools.tools]
        allowed = choice.allowed_tools.model_copy(update={"tools": tools})
        return choice.model_copy(update={"allowed_tools": allowed})
    return choice
