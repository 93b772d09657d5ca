"""Request types of /v1/responses, and what they mean as a chat request.

Nothing is stored here: `previous_response_id`, `conversation` and `background` are refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from halfbyte.server.api.paths import Origin, Paths
from halfbyte.server.api.reading import Wire

# Tools and items that the service's own servers run and make. They are left out by name: clients
# send them unasked and have no switch for it.
_HOSTED_ITEMS = (
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "code_interpreter_call",
    "mcp_list_tools",
    "mcp_call",
    "mcp_approval_request",
    "tool_search_call",
    "tool_search_output",
    "compaction",
)
_Name = Annotated[str, Field(min_length=1, max_length=255)]


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
    | Annotated[list[_Part], Tag("list"), Field(max_length=reading.MOST_PARTS)],
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
    name: _Name
    namespace: _Name | None = None
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
    summary: list[ReasoningText] = Field(default_factory=list, max_length=reading.MOST_PARTS)
    content: list[ReasoningText] = Field(default_factory=list, max_length=reading.MOST_PARTS)


class HostedItem(Wire):
    """An item that is left out of the prompt, whatever it holds."""

    model_config = ConfigDict(extra="ignore")
    type: str


def _item_form(value: Any) -> str:
    kind = str(value.get("type") or "message") if isinstance(value, dict) else "message"
    return "hosted" if kind in _HOSTED_ITEMS else kind


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[HostedItem, Tag("hosted")],
    Discriminator(_item_form),
]


class FunctionTool(Wire):
    IGNORED = frozenset({"output_schema", "defer_loading"})
    type: Literal["function"]
    name: _Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class HostedTool(Wire):
    """A tool of another type, which no server of ours runs."""

    model_config = ConfigDict(extra="ignore")
    type: str


def _tool_form(value: Any) -> str:
    """Which kind of tool this is, read or about to be written."""
    if isinstance(value, HostedTool):
        return "hosted"
    if isinstance(value, (FunctionTool, NamespaceTool)):
        return value.type
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if kind in ("function", "namespace") else "hosted"


def _inner_form(value: Any) -> str:
    return "function" if _tool_form(value) == "function" else "hosted"


class NamespaceTool(Wire):
    """Functions under a common name, such as those of one MCP server."""

    type: Literal["namespace"]
    name: _Name
    description: str = ""
    tools: list[
        Annotated[
            Annotated[FunctionTool, Tag("function")] | Annotated[HostedTool, Tag("hosted")],
            Discriminator(_inner_form),
        ]
    ] = Field(default_factory=list, max_length=reading.MOST_TOOLS)


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_tool_form),
]


class NamedFunction(Wire):
    type: Literal["function"]
    name: str
    namespace: _Name | None = None


class AllowedFunctions(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=reading.MOST_TOOLS)


def _choice_form(value: Any) -> str:
    if not isinstance(value, dict):
        return "string"
    kind = value.get("type")
    return kind if kind in ("function", "allowed_tools") else "hosted"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[AllowedFunctions, Tag("allowed_tools")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_choice_form),
]


def joined_name(namespace: str | None, name: str) -> str:
    """The one name under which the model sees a function of a namespace.

    "mcp__files__" and "read" are "mcp__files__read"; "files" and "read" are "files__read".
    """
    if namespace is None:
        return name
    return namespace + name if namespace.endswith("_") else f"{namespace}__{name}"


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
    """Body of POST /v1/responses: input items, instructions, and how to answer."""

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
        | Annotated[list[Item], Tag("list"), Field(min_length=1, max_length=reading.MOST_MESSAGES)],
        Discriminator(_form),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: list[Tool] = Field(default_factory=list, max_length=reading.MOST_TOOLS)
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
        """The request in the form of /v1/chat/completions, without what is left out."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _converted(self)[0],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _response_format(self.text),
        }
        functions = [(namespace, tool) for _, namespace, tool in self.functions()]
        if functions:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        **tool.model_dump(exclude={"type"}),
                        "name": joined_name(namespace, tool.name),
                    },
                }
                for namespace, tool in functions
            ]
        choice = self.tool_choice
        if isinstance(choice, HostedTool):
            raise RequestError(
                f"tool_choice: this server has no tool of type {choice.type!r}",
                param="tool_choice",
                code="unsupported_parameter",
            )
        if isinstance(choice, NamedFunction):
            body["tool_choice"] = _named(choice)
        elif isinstance(choice, AllowedFunctions):
            tools = [_named(tool) for tool in choice.tools]
            allowed = {"mode": choice.mode, "tools": tools}
            body["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        elif functions or choice == "required":
            body["tool_choice"] = choice
        return reading.parse(wire.ChatRequest, body)

    def functions(self) -> list[tuple[str, str | None, FunctionTool]]:
        """The functions among the tools, each with its path and the namespace it came in."""
        found: list[tuple[str, str | None, FunctionTool]] = []
        for number, tool in enumerate(self.tools):
            path = f"tools[{number}]"
            if isinstance(tool, FunctionTool):
                found.append((path, None, tool))
            elif isinstance(tool, NamespaceTool):
                found += [
                    (f"{path}.tools[{index}]", tool.name, one)
                    for index, one in enumerate(tool.tools)
                    if isinstance(one, FunctionTool)
                ]
        return found

    def called(self, name: str) -> dict[str, str]:
        """The client's name of what the model called: its `name`, and its `namespace` if any."""
        for _, namespace, tool in self.functions():
            if namespace is not None and joined_name(namespace, tool.name) == name:
                return {"name": tool.name, "namespace": namespace}
        return {"name": name}

    def left_out(self) -> tuple[str, ...]:
        """Sentences about what of the request the model does not see."""
        tools = {
            one.type
            for tool in self.tools
            for one in (tool.tools if isinstance(tool, NamespaceTool) else [tool])
            if isinstance(one, HostedTool)
        }
        items = set()
        if not isinstance(self.input, str):
            items = {item.type for item in self.input if isinstance(item, HostedItem)}
        said = []
        if tools:
            names = ", ".join(sorted(tools))
            said.append(f"tools that this server does not have are left out: {names}")
        if items:
            said.append(f"items of hosted tools are left out: {', '.join(sorted(items))}")
        return tuple(said)


def _named(choice: NamedFunction) -> dict[str, Any]:
    name = joined_name(choice.namespace, choice.name)
    return {"type": "function", "function": {"name": name}}


# What the chat request calls things that this wire has under other names.
_FIELDS = {"tool_call_id": "call_id", "id": "call_id"}
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}


def paths_of(request: ResponsesRequest) -> Paths:
    """Where the parts of the chat request stand in the client's own request."""
    tools = [place for place, _, _ in request.functions()]
    return Paths(_converted(request)[1], tools, _FIELDS, _NAMES)


def _converted(request: ResponsesRequest) -> tuple[list[dict[str, Any]], list[Origin]]:
    """Items to messages, and where each comes from.

    Thoughts and calls join the assistant's message they belong to. So does whatever else the
    assistant said while a call of that message waits for an output that comes later.
    """
    messages: list[dict[str, Any]] = []
    origins: list[Origin] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        origins.append(Origin("instructions", "instructions"))
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
        return messages, [*origins, Origin("input", "input")]
    outputs = [
        (number, item.call_id)
        for number, item in enumerate(request.input)
        if isinstance(item, FunctionOutput)
    ]
    last_output = {call_id: number for number, call_id in outputs}
    for number, item in enumerate(request.input):
        path = f"input[{number}]"
        waiting = _calls_waiting(messages, last_output, number)
        if isinstance(item, InputMessage):
            content = _content(item.content)
            if item.role != "assistant":
                messages.append({"role": item.role, "content": content})
            elif waiting and "content" not in messages[-1]:
                messages[-1]["content"] = content
            else:
                _assistant(messages, can_have_content=True)["content"] = content
        elif isinstance(item, ReasoningItem):
            texts = item.content or item.summary
            thought = "".join(part.text for part in texts)
            if thought and waiting:
                thought = messages[-1].get("reasoning_content", "") + thought
                messages[-1]["reasoning_content"] = thought
            elif thought:
                messages.append({"role": "assistant", "reasoning_content": thought})
        elif isinstance(item, FunctionCall):
            name = joined_name(item.namespace, item.name)
            function = {"name": name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages, can_have_content=False).setdefault("tool_calls", []).append(call)
        elif isinstance(item, FunctionOutput):
            output = _content(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        if len(messages) > len(origins):
            origins.append(Origin(path))
        if isinstance(item, InputMessage):
            origins[-1].content = f"{path}.content"
        elif isinstance(item, FunctionOutput):
            origins[-1].content = f"{path}.output"
        elif isinstance(item, FunctionCall):
            origins[-1].calls.append(path)
    return messages, origins


def _calls_waiting(
    messages: list[dict[str, Any]], last_output: dict[str, int], number: int
) -> bool:
    """Whether the last message has called something whose output comes after an item."""
    calls = messages[-1].get("tool_calls", ()) if messages else ()
    return any(last_output.get(call["id"], -1) > number for call in calls)


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
