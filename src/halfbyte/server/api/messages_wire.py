"""Request types of /v1/messages (Anthropic's wire), and what they mean as a chat request.

Source: the public reference of the Messages API, and what its Python client and claude-code send.
What the model cannot see is left out and named in `warnings`, as that API's own servers do with
features of other models: hosted tools, redacted thoughts, results of hosted tools.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from halfbyte.server.api.messages_blocks import (
    AssistantTurn,
    DocumentBlock,
    HostedBlock,
    ImageBlock,
    SystemText,
    TextBlock,
    TextSource,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from halfbyte.server.api.paths import Origin, Paths
from halfbyte.server.api.reading import Wire


class SystemTurn(Wire):
    role: Literal["system"]
    content: SystemText


class ToolDefinition(Wire):
    """A tool of the client's; other types name tools that Anthropic's models were taught."""

    IGNORED = frozenset(
        {
            "cache_control",
            "eager_input_streaming",
            "defer_loading",
            "allowed_callers",
            "input_examples",
        }
    )
    type: Literal["custom"] = "custom"
    name: wire.ToolName
    description: str = ""
    input_schema: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class HostedDefinition(Wire):
    """A tool of another type: its name, so that a choice of it can be refused."""

    model_config = ConfigDict(extra="ignore")
    type: str
    name: str = ""


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return "custom" if kind in (None, "custom") else "hosted"


class MessagesToolChoice(Wire):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Wire):
    IGNORED = frozenset({"display"})
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    IGNORED = frozenset({"task_budget"})
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Wire):
    """Body of POST /v1/messages/count_tokens: the parts of a request that become the prompt."""

    # Where and how it is run and billed, and edits that only save tokens of long conversations.
    IGNORED = frozenset(
        {
            "metadata",
            "service_tier",
            "cache_control",
            "context_management",
            "inference_geo",
            "speed",
            "betas",
            "diagnostics",
        }
    )
    model: str
    messages: list[
        Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]
    ] = Field(min_length=1, max_length=reading.MOST_MESSAGES)
    system: SystemText | None = None
    tools: list[
        Annotated[
            Annotated[ToolDefinition, Tag("custom")] | Annotated[HostedDefinition, Tag("hosted")],
            Discriminator(_tool_tag),
        ]
    ] = Field(default_factory=list, max_length=reading.MOST_TOOLS)
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def may_think(self) -> bool:
        """Whether thoughts were asked for; without a word Anthropic's clients expect none."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat_request(self, efforts: tuple[str, ...]) -> tuple[wire.ChatRequest, tuple[str, ...]]:
        """The request in the form of /v1/chat/completions, and what of it was left out.

        efforts   the reasoning efforts that the model knows

        Raises RequestError, its paths those of this request where they can be.
        """
        warnings: list[str] = []
        body = {"model": self.model, **self._prompt(efforts, warnings), **self._sampling()}
        try:
            return reading.parse(wire.ChatRequest, body), tuple(warnings)
        except RequestError as error:
            raise paths_of(self).error(error) from error

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _prompt(self, efforts: tuple[str, ...], warnings: list[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": _chat_messages(self, warnings)[0]}
        tools = [tool for tool in self.tools if isinstance(tool, ToolDefinition)]
        hosted = [tool for tool in self.tools if isinstance(tool, HostedDefinition)]
        if hosted:
            kinds = ", ".join(sorted({tool.type for tool in hosted}))
            warnings.append(f"tools that this server does not have are left out: {kinds}")
        if tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                        "strict": tool.strict,
                    },
                }
                for tool in tools
            ]
        if self.tool_choice is not None:
            body |= _chat_choice(self.tool_choice, hosted, bool(tools))
        if efforts:
            effort = self.output_config.effort if self.output_config else None
            body["reasoning_effort"] = (effort or "high") if self.may_think else "none"
        if self.may_think and efforts and self.thinking and self.thinking.budget_tokens:
            body["max_reasoning_tokens"] = self.thinking.budget_tokens
        form = self.output_format or (self.output_config.format if self.output_config else None)
        if form is not None:
            schema = {"name": "answer", "schema": form.schema_, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages: a conversation and how to answer it."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=reading.MOST_STOPS
    )
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
        }


# The other way about: what chat requests call things that this wire has under other names.
_FIELDS = {
    "tool_call_id": "tool_use_id",
    "arguments": "input",
    "image_url": "source",
    "parameters": "input_schema",
}
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "max_reasoning_tokens": "thinking.budget_tokens",
    "max_completion_tokens": "max_tokens",
}


def paths_of(request: CountRequest) -> Paths:
    """Where the parts of the chat request stand in the client's own request."""
    tools = [
        f"tools[{number}]"
        for number, tool in enumerate(request.tools)
        if isinstance(tool, ToolDefinition)
    ]
    names = _NAMES
    if request.output_format is not None:
        form = dict.fromkeys(("response_format", "response_format.json_schema"), "output_format")
        names = _NAMES | form
    return Paths(_chat_messages(request, [])[1], tools, _FIELDS, names)


def _chat_choice(
    choice: MessagesToolChoice, hosted: list[HostedDefinition], has_tools: bool
) -> dict[str, Any]:
    body: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name: Field required", param="tool_choice.name")
        if choice.name in [tool.name for tool in hosted]:
            raise RequestError(
                f"tool_choice: {choice.name!r} is a tool that this server does not have",
                param="tool_choice",
                code="unsupported_parameter",
            )
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif has_tools or choice.type == "any":
        body["tool_choice"] = "required" if choice.type == "any" else choice.type
    return body


def _chat_messages(
    request: CountRequest, warnings: list[str]
) -> tuple[list[dict[str, Any]], list[Origin]]:
    """Turns to messages, and where each comes from.

    Results of tools become messages of their own, ahead of their turn.
    """
    messages: list[dict[str, Any]] = []
    origins: list[Origin] = []
    if request.system is not None and (system := _joined_text(request.system)):
        messages.append({"role": "system", "content": system})
        origins.append(Origin("system", "system"))
    for index, turn in enumerate(request.messages):
        whole = f"messages[{index}]"
        origin = Origin(whole, f"{whole}.content")
        if isinstance(turn, SystemTurn):
            messages.append({"role": "system", "content": _joined_text(turn.content)})
            origins.append(origin)
        elif isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
            origins.append(origin)
        elif isinstance(turn, AssistantTurn):
            messages.append(_assistant_message(turn.content, origin, warnings))
            origins.append(origin)
        else:
            for message, found in _user_messages(turn.content, origin, warnings):
                messages.append(message)
                origins.append(found)
    if messages and messages[-1]["role"] == "assistant":
        # A last turn of the assistant's is the beginning of its answer.
        messages[-1]["prefix"] = True
    return messages, origins


def _joined_text(content: str | list[TextBlock]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(block.text for block in content if block.text)


def _user_messages(
    blocks: list[Any], origin: Origin, warnings: list[str]
) -> list[tuple[dict[str, Any], Origin]]:
    """Results of tools, each a message, and what else the turn has; where each comes from."""
    results: list[tuple[dict[str, Any], Origin]] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        path = f"{origin.content}[{number}]"
        if isinstance(block, ToolResultBlock):
            found = Origin(path, f"{path}.content")
            content: Any = block.content
            if not isinstance(content, str):
                content = _parts(content, found, warnings)
            message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
            results.append((message, found))
        else:
            parts += _parts([block], origin, warnings, first=number)
    if parts or not results:
        results.append(({"role": "user", "content": parts or ""}, origin))
    return results


def _parts(
    blocks: list[Any], origin: Origin, warnings: list[str], *, first: int = 0
) -> list[dict[str, Any]]:
    """Blocks as parts of a content; `first` is the place of the first in the client's list."""
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(blocks, first):
        path = f"{origin.content}[{number}]"
        if isinstance(block, HostedBlock):
            warnings.append(f"{path} is left out: {block.type}")
            continue
        origin.parts.append(path)
        if isinstance(block, ImageBlock):
            parts.append({"type": "image_url", "image_url": {"url": block.url}})
        elif isinstance(block, DocumentBlock):
            if not isinstance(block.source, TextSource):
                raise RequestError(
                    f"{path}.source: documents are read as plain text only (a source of "
                    "type text); send the text of the file",
                    param=f"{path}.source",
                    code="unsupported_content",
                )
            title = f"{block.title}\n\n" if block.title else ""
            parts.append({"type": "text", "text": title + block.source.data})
        else:
            parts.append({"type": "text", "text": block.text})
    return parts


def _assistant_message(blocks: list[Any], origin: Origin, warnings: list[str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    thoughts, texts, calls = [], [], []
    for number, block in enumerate(blocks):
        path = f"{origin.content}[{number}]"
        if isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": function})
            origin.calls.append(path)
        elif isinstance(block, HostedBlock):
            warnings.append(f"{path} is left out: {block.type}")
        else:
            texts.append(block.text)
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    if texts or not calls:
        message["content"] = "".join(texts)
    if calls:
        message["tool_calls"] = calls
    return message
