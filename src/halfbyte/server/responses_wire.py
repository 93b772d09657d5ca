"""Request types of /v1/responses, and what they mean as a chat request.

Nothing is stored here: `previous_response_id`, `conversation` and `background` are refused by name.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from halfbyte.errors import RequestError
from halfbyte.server import wire
from halfbyte.server.wire import Wire


class InputText(Wire):
    type: Literal["input_text"]
    text: str


class InputImage(Wire):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


class OutputText(Wire):
    IGNORED = frozenset({"annotations", "logprobs"})
    type: Literal["output_text"]
    text: str


class Refusal(Wire):
    type: Literal["refusal"]
    refusal: str


def _form(value: Any) -> str:
    return "list" if isinstance(value, list) else "string"


_Part = Annotated[InputText | InputImage | OutputText | Refusal, Field(discriminator="type")]
_Parts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[_Part], Tag("list"), Field(max_length=wire.MOST_PARTS)],
    Discriminator(_form),
]


class InputMessage(Wire):
    IGNORED = frozenset({"id", "status", "phase"})
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Parts


class FunctionCall(Wire):
    IGNORED = frozenset({"id", "status"})
    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=512)
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    arguments: str


class FunctionOutput(Wire):
    IGNORED = frozenset({"id", "status"})
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=512)
    output: _Parts


class ReasoningText(Wire):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Wire):
    IGNORED = frozenset({"id", "status", "encrypted_content"})
    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list, max_length=wire.MOST_PARTS)
    content: list[ReasoningText] = Field(default_factory=list, max_length=wire.MOST_PARTS)


def _item_form(value: Any) -> str:
    return str(value.get("type") or "message") if isinstance(value, dict) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_form),
]


class FunctionTool(Wire):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class NamedFunction(Wire):
    type: Literal["function"]
    name: str


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")]
    | Annotated[NamedFunction, Tag("object")],
    Discriminator(lambda value: "object" if isinstance(value, dict) else "string"),
]


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class TextSettings(Wire):
    format: (
        Annotated[
            wire.TextFormat | wire.JsonObjectFormat | SchemaFormat, Field(discriminator="type")
        ]
        | None
    ) = None


class ReasoningSettings(Wire):
    IGNORED = frozenset({"summary", "generate_summary"})
    effort: str | None = None


class ResponsesRequest(Wire):
    """POST /v1/responses."""

    IGNORED = frozenset(
        {
            "user",
            "metadata",
            "store",
            "include",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        }
    )
    model: str
    input: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[Item], Tag("list"), Field(min_length=1, max_length=wire.MOST_MESSAGES)],
        Discriminator(_form),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=wire.MOST_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningSettings | None = None
    text: TextSettings | None = None
    # "auto" drops the oldest items of what is too long; nothing is dropped here, so that such a
    # conversation is refused under either name.
    truncation: Literal["auto", "disabled"] = "disabled"
    stream: bool = False
    stream_options: wire.StreamOptions | None = None

    def chat_request(self) -> wire.ChatRequest:
        """The same request in the form of /v1/chat/completions."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(self),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _response_format(self.text),
        }
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedFunction):
            named = {"name": self.tool_choice.name}
            body["tool_choice"] = {"type": "function", "function": named}
        elif self.tools or self.tool_choice == "required":
            body["tool_choice"] = self.tool_choice
        return wire.parse(wire.ChatRequest, body)


def as_input_error(error: RequestError, request: ResponsesRequest) -> RequestError:
    """An error about messages, in the words of what the client of this route has sent."""
    origins = _converted(request)[1]
    text = _MESSAGE_PATH.sub(lambda match: _in_input(match, origins), str(error))
    param = error.param
    if param is not None and param.startswith("messages"):
        param = _MESSAGE_PATH.sub(lambda match: _in_input(match, origins), param)
        param = "input" if param.startswith("messages") else param
    return RequestError(text, param=param, code=error.code, status=error.status)


# The start of a path into messages, as far as items of the input are named otherwise.
_MESSAGE_PATH = re.compile(
    r"messages\[(?P<index>\d+)\](?P<field>\.tool_calls\[(?P<call>\d+)\](?:\.function)?|\.content)?"
)


@dataclass(slots=True)
class _Origin:
    """Where a message comes from: paths of its content, its thought and its calls."""

    whole: str
    content: str = ""
    calls: list[str] = field(default_factory=list)


def _in_input(match: re.Match[str], origins: list[_Origin]) -> str:
    index = int(match["index"])
    if index >= len(origins):
        return "input"
    origin = origins[index]
    if match["call"] is not None and int(match["call"]) < len(origin.calls):
        return origin.calls[int(match["call"])]
    if match["field"] == ".content" and origin.content:
        return origin.content
    return origin.whole + (match["field"] or "")


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    return _converted(request)[0]


def _converted(request: ResponsesRequest) -> tuple[list[dict[str, Any]], list[_Origin]]:
    """Items to messages, and where each comes from.

    Thoughts and calls join the assistant's message they belong to.
    """
    messages: list[dict[str, Any]] = []
    origins: list[_Origin] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        origins.append(_Origin("instructions", "instructions"))
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
        return messages, [*origins, _Origin("input", "input")]
    for number, item in enumerate(request.input):
        path = f"input[{number}]"
        if isinstance(item, InputMessage):
            content = _content(item.content)
            if item.role != "assistant":
                messages.append({"role": item.role, "content": content})
            else:
                _assistant(messages, can_have_content=True)["content"] = content
        elif isinstance(item, ReasoningItem):
            texts = item.content or item.summary
            thought = "".join(part.text for part in texts)
            if thought:
                messages.append({"role": "assistant", "reasoning_content": thought})
        elif isinstance(item, FunctionCall):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages, can_have_content=False).setdefault("tool_calls", []).append(call)
        else:
            output = _content(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        if len(messages) > len(origins):
            origins.append(_Origin(path))
        if isinstance(item, InputMessage):
            origins[-1].content = f"{path}.content"
        elif isinstance(item, FunctionOutput):
            origins[-1].content = f"{path}.output"
        elif isinstance(item, FunctionCall):
            origins[-1].calls.append(path)
    return messages, origins


def _assistant(messages: list[dict[str, Any]], *, can_have_content: bool) -> dict[str, Any]:
    """The assistant's message that the next item belongs to: the last one, if it still may."""
    last = messages[-1] if messages else {}
    is_open = last.get("role") == "assistant" and not (
        can_have_content and ("content" in last or "tool_calls" in last)
    )
    if not is_open:
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(content: str | list[Any]) -> Any:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, InputImage):
            url = {"url": part.image_url, "detail": part.detail}
            parts.append({"type": "image_url", "image_url": url})
        elif isinstance(part, Refusal):
            parts.append({"type": "text", "text": part.refusal})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts


def _response_format(text: TextSettings | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if isinstance(text.format, SchemaFormat):
        schema = {
            "name": text.format.name,
            "schema": text.format.schema_,
            "strict": text.format.strict,
        }
        return {"type": "json_schema", "json_schema": schema}
    return {"type": text.format.type}
