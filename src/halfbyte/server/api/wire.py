"""OpenAI request types, read strictly.

Types and ranges are checked, nothing is converted. A field we do not know is refused by name: its
sender expects it to change something. Fields known to change nothing here are listed in IGNORED,
with their reason in docs/api.md. A null means absent.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from halfbyte.errors import RequestError
from halfbyte.server.config import Limits

# The most that any configuration takes: token ids, texts, messages, parts of one, tools, stops.
MOST_IDS = 2**20
MOST_TEXTS = 4096
MOST_MESSAGES = 2**16
MOST_PARTS = 1024
MOST_TOOLS = 4096
MOST_STOPS = 1024


class Wire(BaseModel):
    """Base of everything a client sends: strict, closed, finite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True
    )
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        """Nulls are absent; fields that change nothing are taken out by name."""
        if not isinstance(value, dict):
            return value
        return {
            key: item for key, item in value.items() if item is not None and key not in cls.IGNORED
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """In the document, too: what may be absent may be null, what is ignored may be sent."""
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        required = found.get("required", ())
        found["properties"] = {
            name: said if name in required else {"anyOf": [said, {"type": "null"}]}
            for name, said in found.get("properties", {}).items()
        } | {name: {} for name in sorted(cls.IGNORED)}
        return schema


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


_TextParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[TextPart], Tag("parts"), Field(max_length=MOST_PARTS)],
    Discriminator(_content_form),
]
_UserParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Tag("parts"),
        Field(min_length=1, max_length=MOST_PARTS),
    ],
    Discriminator(_content_form),
]
# As a user's, but a tool may have nothing to say.
_ToolParts = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Tag("parts"),
        Field(max_length=MOST_PARTS),
    ],
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
    content: _TextParts


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
    """Fields that chat and plain completions share."""

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
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were sent."""
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
    """POST /v1/chat/completions."""

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
    """POST /v1/completions."""

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
        """The prompts, however they were sent."""
        if isinstance(self.prompt, str) or _prompt_form(self.prompt) == "tokens":
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(Wire):
    """POST /tokenize: a plain prompt, or a conversation as the model would see it."""

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
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MOST_IDS)


class RenderRequest(Wire):
    """POST /web/render: a block of Markdown that the page shows."""

    text: str


# --- reading --------------------------------------------------------------------------------

Request = TypeVar("Request", bound=Wire)


# A text with its quotation marks, as far as it is there; nothing of it is looked at twice.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Behind a piece: an open text swallows it.
_END = b"\x00"
# Numbers of more digits are slow to read, the slower the longer.
_LONG_NUMBER = 250
_MOST_LONG_NUMBERS = 4000
# Escapes and bytes beyond ASCII that are read whatever the context.
_ODD_BYTES = 1_000_000
_ODD = "escapes or bytes beyond ASCII"
_ASCII = bytes(range(128))


class Structure:
    """Counts of a body as it arrives; more than the limits of anything is refused unread.

    Brackets are counted everywhere, which costs nothing, the rest outside texts only.
    """

    def __init__(self, limits: Limits, most_text: int | None = None) -> None:
        """`most_text`: bytes of text that any request may have; None for no limit."""
        # Written with escapes or beyond ASCII, text takes long to read, and no picture is written
        # so. A byte of text may take two escapes at most, and much may stand in ignored fields.
        most_odd = 2**63 if most_text is None else 2 * most_text + _ODD_BYTES
        self._most = {
            "opening brackets, those in texts included": limits.body_brackets,
            "arrays and objects": limits.body_nodes,
            "commas between values": limits.body_values,
            "field names": limits.body_keys,
            "texts": limits.body_texts,
            "bytes outside texts": limits.body_plain_bytes,
            f"numbers of over {_LONG_NUMBER} digits": _MOST_LONG_NUMBERS,
            _ODD: most_odd,
        }
        self._counts = dict.fromkeys(self._most, 0)
        # What an open text has so far that the next piece may continue: its mark, half an escape.
        self._open = b""

    def add(self, chunk: bytes) -> None:
        """Count one more piece. RequestError beyond a limit."""
        num_brackets = _num(b"[", chunk) + _num(b"{", chunk)
        num_odd = _num(b"\\", chunk)
        if not chunk.isascii():
            num_odd += len(chunk.translate(None, _ASCII))
        was_open = bool(self._open)
        plain, num_texts = self._outside(chunk)
        blocks = range(0, len(plain) - _LONG_NUMBER + 1, _LONG_NUMBER)
        found = (
            num_brackets,
            plain.count(b"[") + plain.count(b"{"),
            plain.count(b","),
            plain.count(b":"),
            num_texts - was_open,
            len(plain),
            sum(plain[start : start + _LONG_NUMBER].isdigit() for start in blocks),
            num_odd,
        )
        for (what, most), count in zip(self._most.items(), found, strict=True):
            self._counts[what] += count
            if self._counts[what] > most:
                known = "any text for this model has" if what == _ODD else "are read"
                raise RequestError(
                    f"the body has more than {most:,} {what}: more than {known}",
                    code="context_length_exceeded" if what == _ODD else "limit_exceeded",
                )

    def _outside(self, chunk: bytes) -> tuple[bytes, int]:
        """A piece without its texts, and how many there were."""
        if self._open and chunk and b'"' not in chunk and b"\\" not in chunk:
            # Amid a long text: nothing to look for.
            self._open = b'"'
            return b"", 1
        whole = self._open + chunk
        plain, num_texts = _TEXT.subn(b" ", whole + _END)
        self._open = b""
        if plain.endswith(_END):
            return plain[:-1], num_texts
        self._open = b'"\\' if _ends_in_escape(whole) else b'"'
        return plain, num_texts


def _num(sign: bytes, chunk: bytes) -> int:
    """How often a sign is there. Finding none is much faster than counting."""
    return chunk.count(sign) if sign in chunk else 0


def _ends_in_escape(text: bytes) -> bool:
    """Whether a backslash at the end escapes what follows."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1


def parse_json(body: bytes | bytearray) -> Any:
    """JSON of a body. RequestError for what is not: NaN, lone surrogates, endless nesting."""
    try:
        # Values are kept once each only for names: looking texts up costs more than it saves.
        return pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


# Fields that are left out, one after the other, before a body counts as not meant for this route.
_MAX_LEFT_OUT = 200
_MAX_NAMED = 20
_MAX_NAME_CHARS = 100
_MISSING: Any = object()


def parse(
    kind: type[Request],
    value: Any,
    limits: Limits | None = None,
    left_out: list[str] | None = None,
) -> Request:
    """Validate a decoded body; the first problem becomes a RequestError with its path.

    limits     what lists may hold, looked at before any of them is read
    left_out   takes the paths of fields that nobody knows, which are then taken out of `value`, in
               place; None refuses them like any other problem
    """
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    if limits is not None:
        _check_lists(value, limits)
    num_left_out = 0
    while True:
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            unknown = [one for one in problems if one["type"] == "extra_forbidden"]
            num_left_out += len(unknown)
            wrong = [one for one in problems if one["type"] != "extra_forbidden"]
            if left_out is None or wrong or num_left_out > _MAX_LEFT_OUT:
                raise _refusal((wrong or problems)[0], value) from error
            for one in unknown:
                place = _place(one, value)
                _take_out(value, place)
                if len(left_out) < _MAX_NAMED:
                    left_out.append(_written(place))


def _check_lists(body: dict[str, Any], limits: Limits) -> None:
    """400 for more entries of something than a server takes."""
    prompt = body.get("prompt")
    is_one_prompt = not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int)
    for name, value, limit in (
        ("messages", body.get("messages"), limits.messages),
        ("input", body.get("input"), limits.messages),
        ("tools", body.get("tools"), limits.tools),
        ("prompt", None if is_one_prompt else prompt, limits.prompts),
        ("stop", body.get("stop"), limits.stops),
        ("stop_token_ids", body.get("stop_token_ids"), limits.stop_tokens),
        ("logit_bias", body.get("logit_bias"), limits.biased_tokens),
    ):
        if isinstance(value, (list, dict)):
            check_count(len(value), limit, name, what=_COUNTED.get(name))

    for name in ("messages", "input"):
        items = body.get(name)
        if isinstance(items, list):
            num_parts = sum(map(_num_parts, items))
            check_count(num_parts, limits.parts, name, what="parts and tool calls")


_COUNTED = {"prompt": "answers", "stop": "stop strings"}


def _num_parts(item: Any) -> int:
    """Parts and tool calls of a message or item."""
    if not isinstance(item, dict):
        return 0
    return sum(len(value) for value in item.values() if isinstance(value, list))


def check_count(count: int, limit: int, param: str, *, what: str | None = None) -> None:
    """400 for more of something than the limit."""
    if count > limit:
        raise RequestError(
            f"{param}: {count} {what or 'entries'}; the limit is {limit}",
            param=param,
            code="limit_exceeded",
        )


def _refusal(problem: Any, value: Any) -> RequestError:
    path = _written(_place(problem, value))
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        # In our words: pydantic names functions of ours, and tags for what is left out.
        known = problem["ctx"]["expected_tags"].replace(", 'hosted'", "")
        text = f"{problem['ctx']['tag']!r} is not known here; known are {known}"
    if problem["type"] == "extra_forbidden":
        return RequestError(f"unknown field: {path}", param=path, code="unknown_parameter")
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    return RequestError(f"{path}: {text}" if path else text, param=path or None, code=code)


def _place(problem: Any, value: Any) -> list[str | int]:
    """The steps into a body at which pydantic saw a problem; only a missing field's last is new."""
    return _found(problem["loc"], value, may_be_new=problem["type"] == "missing")[1]


def _found(
    location: tuple[str | int, ...], value: Any, *, may_be_new: bool
) -> tuple[int, list[str | int]]:
    """Steps of a location that enter `value`, and how sure they are (2, 1, 0).

    A location also names members of unions. Such a name may be a key as well, like a text part's
    `text`; of both readings the one counts whose last step is there.
    """
    if not location:
        return 0, []
    step, rest = location[0], location[1:]
    readings: list[tuple[int, list[str | int]]] = []
    entered = _MISSING
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        entered = value[step]
    elif isinstance(value, dict):
        entered = value.get(step, _MISSING)
    if entered is not _MISSING:
        sure, inside = _found(rest, entered, may_be_new=may_be_new)
        readings.append((sure if rest else 2, [step, *inside]))
    if isinstance(step, str):
        if rest:
            readings.append(_found(rest, value, may_be_new=may_be_new))
        elif may_be_new and isinstance(value, dict):
            readings.append((1, [step]))
    return max(readings, key=lambda reading: reading[0], default=(0, []))


def _written(place: list[str | int]) -> str:
    """`messages[0].content` from its steps."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            # A client may call its fields anything; none of it is left unseen, or fills a screen.
            name = step if step.strip() and step.isprintable() else repr(step)
            name = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."
            path += f".{name}" if path else name
    return path


def _take_out(value: Any, place: list[str | int]) -> None:
    for step in place[:-1]:
        value = value[step]
    del value[place[-1]]
