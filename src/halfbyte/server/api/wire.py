"""OpenAI request types, read strictly.

Types and ranges are checked, nothing is converted. A field we do not know is refused by name: its
sender expects it to change something. Fields known to change nothing here are listed in IGNORED,
with their reason in docs/api.md. A null means absent.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from halfbyte.server.api.reading import (
    MOST_IDS,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_STOPS,
    MOST_TEXTS,
    MOST_TOOLS,
    Wire,
)

# --- messages -------------------------------------------------------------------------------


class TextPart(Wire):
    IGNORED = frozenset({"cache_control", "annotations"})
    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


def _url_form(value: Any) -> str:
    return "string" if isinstance(value, str) else "object"


class ImagePart(Wire):
    IGNORED = frozenset({"cache_control"})
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("string")] | Annotated[ImageUrl, Tag("object")],
        Discriminator(_url_form),
    ]

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class RefusalPart(Wire):
    type: Literal["refusal"]
    refusal: str


class ThinkingText(Wire):
    type: Literal["text"]
    text: str


def _thinking_form(value: Any) -> str:
    return "string" if isinstance(value, str) else "list"


class ThinkingPart(Wire):
    IGNORED = frozenset({"closed", "signature"})
    type: Literal["thinking"]
    thinking: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[ThinkingText], Tag("list"), Field(max_length=MOST_PARTS)],
        Discriminator(_thinking_form),
    ]


def _content_form(value: Any) -> str:
    return "parts" if isinstance(value, list) else "string"


# Magistral's own system prompt shows how to think by a thought in it.
_SystemParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[
        list[Annotated[TextPart | ThinkingPart, Field(discriminator="type")]],
        Tag("parts"),
        Field(max_length=MOST_PARTS),
    ],
    Discriminator(_content_form),
]
_Parts = list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
_UserParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[_Parts, Tag("parts"), Field(min_length=1, max_length=MOST_PARTS)],
    Discriminator(_content_form),
]
# As a user's, but a tool may have nothing to say.
_ToolParts = Annotated[
    Annotated[str, Tag("string")] | Annotated[_Parts, Tag("parts"), Field(max_length=MOST_PARTS)],
    Discriminator(_content_form),
]
_AssistantParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[
        list[Annotated[TextPart | RefusalPart | ThinkingPart, Field(discriminator="type")]],
        Tag("parts"),
        Field(max_length=MOST_PARTS),
    ],
    Discriminator(_content_form),
]

# Fields that answers and other servers put into messages; none of them reaches a prompt.
_MESSAGE_IGNORED = frozenset(
    {"name", "cache_control", "annotations", "audio", "refusal", "id", "status", "metadata"}
)


class SystemMessage(Wire):
    IGNORED = _MESSAGE_IGNORED
    role: Literal["system", "developer"]
    content: _SystemParts


class UserMessage(Wire):
    IGNORED = _MESSAGE_IGNORED
    role: Literal["user"]
    content: _UserParts


# Of a tool. What of it the model sees is `tool_names`' matter.
ToolName = Annotated[str, Field(min_length=1, max_length=512)]


class CalledFunction(Wire):
    name: ToolName
    arguments: str


class ToolCall(Wire):
    IGNORED = frozenset({"index", "extra_content"})
    id: str = Field(min_length=1, max_length=512)
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Wire):
    IGNORED = _MESSAGE_IGNORED | {
        "reasoning_details",
        "provider_specific_fields",
        "thinking_blocks",
        "function_call",
    }
    role: Literal["assistant"]
    content: _AssistantParts | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool = False
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _one_thought(self) -> "AssistantMessage":
        both = self.reasoning is not None and self.reasoning_content is not None
        if both and self.reasoning != self.reasoning_content:
            raise ValueError("reasoning and reasoning_content differ; send one of them")
        return self


class ToolMessage(Wire):
    IGNORED = _MESSAGE_IGNORED
    role: Literal["tool"]
    tool_call_id: str = Field(min_length=1, max_length=512)
    content: _ToolParts


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


# --- tools and formats ----------------------------------------------------------------------


class Function(Wire):
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Wire):
    IGNORED = frozenset({"cache_control"})
    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


def _choice_form(value: Any) -> str:
    return "object" if isinstance(value, dict) else "string"


class AllowedToolNames(Wire):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=4096)


class AllowedTools(Wire):
    """All tools stay in the prompt, and only these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolNames


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")]
    | Annotated[
        Annotated[NamedTool | AllowedTools, Field(discriminator="type")],
        Tag("object"),
    ],
    Discriminator(_choice_form),
]


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = False


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Wire):
    type: Literal["regex"]
    regex: str = Field(min_length=1)


class ChoiceFormat(Wire):
    type: Literal["choice"]
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=10_000)


class GrammarFormat(Wire):
    type: Literal["grammar"]
    grammar: str = Field(min_length=1)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat,
    Field(discriminator="type"),
]


# --- requests -------------------------------------------------------------------------------


class StreamOptions(Wire):
    IGNORED = frozenset({"include_obfuscation"})
    include_usage: bool = False
    continuous_usage_stats: bool = False
    # Whether tool calls come in pieces; None: as the client's dialect has it.
    stream_tool_calls: bool | None = None


def _stop_form(value: Any) -> str:
    return "list" if isinstance(value, list) else "string"


Stop = Annotated[
    Annotated[str, Tag("string"), Field(min_length=1)]
    | Annotated[
        list[Annotated[str, Field(min_length=1)]], Tag("list"), Field(max_length=MOST_STOPS)
    ],
    Discriminator(_stop_form),
]

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _continues(flag: bool, messages: list[Message] | None) -> bool:
    """Whether the last message is a beginning, said by a flag of the request or by itself."""
    last = messages[-1] if messages else None
    return flag or (isinstance(last, AssistantMessage) and last.prefix)


class Sampling(Wire):
    """Fields that chat and plain completions share: the model, sampling, ends, streaming."""

    model: str
    n: int = Field(default=1, ge=1)
    # None: as the checkpoint recommends (`defaults`).
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    seed: Int64 | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MOST_IDS)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=MOST_IDS)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    # The larger, the later; below 0 there is nothing, or whoever asks would be first.
    priority: int = Field(default=0, ge=0, le=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple, whether one or a list was sent."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @field_validator("logit_bias")
    @classmethod
    def _bias_of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key, bias in (value or {}).items():
            if not key.isascii() or not key.isdigit() or len(key) > 9:
                raise ValueError(f"{key!r} is not a token id")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {key} must be in [-100, 100]")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs come with a whole answer; send stream: false")
        return self


# Accounting, routing and storage of a hosted service; none of them changes an answer.
_REQUEST_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions: a conversation and how to answer it."""

    IGNORED = _REQUEST_IGNORED
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    max_reasoning_tokens: int | None = Field(default=None, ge=0)
    include_reasoning: bool = True
    continue_final_message: bool = False
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=8)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def continues_final(self) -> bool:
        """Whether the assistant's last message is to be continued."""
        return _continues(self.continue_final_message, self.messages)


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return "string"
    first = value[0] if value else 0
    if isinstance(first, str):
        return "strings"
    return "lists of tokens" if isinstance(first, list) else "tokens"


_Tokens = Annotated[list[int], Field(min_length=1, max_length=MOST_IDS)]
Prompt = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[str], Tag("strings"), Field(max_length=MOST_TEXTS)]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], Tag("lists of tokens"), Field(max_length=MOST_TEXTS)],
    Discriminator(_prompt_form),
]


class CompletionRequest(Sampling):
    """Body of POST /v1/completions: prompts and how to continue them."""

    IGNORED = _REQUEST_IGNORED
    prompt: Prompt
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is supported only when it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens may be 0 only together with echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whether one or several were sent."""
        if isinstance(self.prompt, str) or _prompt_form(self.prompt) == "tokens":
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(Wire):
    """Body of POST /tokenize: a plain prompt, or a conversation as the model sees it."""

    IGNORED = frozenset({"add_generation_prompt"})
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MOST_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    reasoning_effort: str | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self

    @property
    def continues_final(self) -> bool:
        """Whether the assistant's last message is to be continued."""
        return _continues(self.continue_final_message, self.messages)


class DetokenizeRequest(Wire):
    """Body of POST /detokenize: token ids to turn into text."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MOST_IDS)


class RenderRequest(Wire):
    """Body of POST /web/render: a block of Markdown that the page shows."""

    text: str


# --- reading --------------------------------------------------------------------------------
