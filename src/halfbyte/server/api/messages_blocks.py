"""Blocks of content in Anthropic's requests."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from halfbyte.server.api import reading, wire
from halfbyte.server.api.reading import Wire

# Blocks that only Anthropic's own servers make and read. An answer of ours never holds one.
_HOSTED_BLOCKS = (
    "redacted_thinking",
    "server_tool_use",
    "web_search_tool_result",
    "web_fetch_tool_result",
    "code_execution_tool_result",
    "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result",
    "tool_search_tool_result",
    "mcp_tool_use",
    "mcp_tool_result",
    "container_upload",
    "compaction",
    "tool_reference",
)


class Block(Wire):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations"})


class TextBlock(Block):
    type: Literal["text"]
    text: str


class Base64Source(Wire):
    type: Literal["base64"]
    media_type: str = Field(pattern=r"^[\w.+-]+/[\w.+-]+$")
    data: str


class UrlSource(Wire):
    type: Literal["url"]
    url: str


class TextSource(Wire):
    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


class ImageBlock(Block):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    @property
    def url(self) -> str:
        """The picture as a URL that `chat.images` reads."""
        if isinstance(self.source, UrlSource):
            return self.source.url
        return f"data:{self.source.media_type};base64,{self.source.data}"


class DocumentBlock(Block):
    """A document. Plain text only: the model has no reader for PDF files."""

    IGNORED = Block.IGNORED | {"context"}
    type: Literal["document"]
    title: str | None = None
    source: Annotated[TextSource | Base64Source | UrlSource, Field(discriminator="type")]


class ThinkingBlock(Block):
    IGNORED = Block.IGNORED | {"signature"}
    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Block):
    IGNORED = Block.IGNORED | {"caller"}
    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=512)
    name: wire.ToolName
    input: dict[str, Any] = Field(default_factory=dict)


class HostedBlock(Wire):
    """A block that is left out of the prompt, whatever it holds."""

    model_config = ConfigDict(extra="ignore")
    type: str


def _block_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _HOSTED_BLOCKS:
        return "hosted"
    return kind if isinstance(kind, str) else None


_Hosted = Annotated[HostedBlock, Tag("hosted")]


_Text = Annotated[TextBlock, Tag("text")]


_Image = Annotated[ImageBlock, Tag("image")]


_Document = Annotated[DocumentBlock, Tag("document")]


def _form(value: Any) -> str:
    return "list" if isinstance(value, list) else "string"


class ToolResultBlock(Block):
    IGNORED = Block.IGNORED | {"is_error"}
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=512)
    content: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[
            list[Annotated[_Text | _Image | _Document | _Hosted, Discriminator(_block_tag)]],
            Tag("list"),
            Field(max_length=reading.MOST_PARTS),
        ],
        Discriminator(_form),
    ] = ""


_UserBlock = Annotated[
    _Text | _Image | _Document | _Hosted | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(_block_tag),
]


_AssistantBlock = Annotated[
    _Text
    | _Hosted
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")],
    Discriminator(_block_tag),
]


class UserTurn(Wire):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[_UserBlock], Tag("list"), Field(max_length=reading.MOST_PARTS)],
        Discriminator(_form),
    ]


class AssistantTurn(Wire):
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[_AssistantBlock], Tag("list"), Field(max_length=reading.MOST_PARTS)],
        Discriminator(_form),
    ]


SystemText = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[TextBlock], Tag("list"), Field(max_length=reading.MOST_PARTS)],
    Discriminator(_form),
]
