"""Reading requests and making prompts of them: whatever takes long in step with a client's bytes.

Nothing here knows the event loop, the engine or other requests, so that it can be done in a thread
or in another process (`aside`); a result hangs on the arguments alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from halfbyte.chat.images import ImageLimits
from halfbyte.chat.prompt import EncodedImage, EncodedPrompt
from halfbyte.chat.tokens import ChatFormat
from halfbyte.errors import RequestError
from halfbyte.server.api import foreign, markdown, reading, wire
from halfbyte.server.api.held import Held, take_out
from halfbyte.server.api.texts import Texts, prompt_texts
from halfbyte.server.config import ServerConfig
from halfbyte.server.dialect import Dialect, dialect_of

Asked = TypeVar("Asked", bound=reading.Wire)

# Bytes of a body that are counted at once.
_PIECE = 262_144
# Values that a body may hold beside a whole context of token ids.
_FEW_VALUES = 1000


@dataclass(frozen=True, slots=True)
class Read(Generic[Asked]):
    """A body as it was understood; `notes` are warnings for the client.

    pictures  long ones, which are taken out of `asked`
    """

    asked: Asked
    dialect: Dialect
    notes: list[str]
    pictures: list[Held]


@dataclass(frozen=True, slots=True)
class Shape:
    """Stands for the pixels of a picture, which take no part in encoding."""

    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a conversation's prompt is made of, pictures as shapes; see `MistralFormat.encode`."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    reasoning_effort: str | None
    json_schema: Mapping[str, Any] | None
    continue_final: bool

    def texts(self, chat: ChatFormat) -> tuple[str, ...]:
        """The texts that this conversation's prompt is sure to hold."""
        # Tools that the model's format has no place for are in no prompt.
        return tuple(prompt_texts(self.messages, self.tools if chat.control.has_tools else ()))


class Reader:
    """Reads and encodes the texts of one model; several threads may use it."""

    def __init__(self, chat: ChatFormat, config: ServerConfig) -> None:
        self._chat = chat
        self._config = config
        self.texts = Texts(chat.vocabulary, config.max_model_len)

    def read(
        self, kind: type[Asked], path: str, user_agent: str, body: bytes | bytearray
    ) -> Read[Asked]:
        """A validated body, none of whose texts and lists is beyond all bounds.

        path        as it was asked for
        user_agent  what the client calls itself

        Raises RequestError.
        """
        self._check_structure(kind, body)
        config = self._config
        notes: list[str] = []
        sent = reading.parse_json(body)
        told = sent if isinstance(sent, dict) else {}
        dialect = dialect_of(config.dialect, path, user_agent, told)
        left_out: list[str] = []
        accepts = config.unknown_fields == "accept"
        translated = foreign.translate(kind, sent, notes.append)
        asked = reading.parse(kind, translated, config.limits, left_out if accepts else None)
        self.texts.check_request(asked)
        if left_out:
            notes.append("unknown fields, which change nothing here: " + ", ".join(left_out))
        limits = config.limits
        pictures = take_out(asked, ImageLimits(limits.image_bytes, limits.image_pixels))
        return Read(asked, dialect, notes, pictures)

    def _check_structure(self, kind: type[Asked], body: bytes | bytearray) -> None:
        """Refuse a body of too much structure or text before anything is made of it."""
        limits, most_text = self._config.limits, self.texts.most_bytes
        if issubclass(kind, wire.CompletionRequest):
            most_text *= limits.prompts
        else:
            # Reading values takes 30 ns each. Only batches of prompts need so many.
            most_values = max(limits.body_values // 2, self._config.max_model_len + _FEW_VALUES)
            most_values = min(limits.body_values, most_values)
            limits = replace(limits, body_values=most_values)
        structure = reading.Structure(limits, most_text)
        with memoryview(body) as view:
            for start in range(0, len(view), _PIECE):
                structure.add(bytes(view[start : start + _PIECE]))

    def encode(self, conversation: Conversation) -> EncodedPrompt:
        """Token ids of a conversation whose pictures are shapes; their pixels are left out.

        Raises RequestError.
        """
        self.texts.check_tokens(conversation.texts(self._chat), "messages")
        prompt = self._chat.encode(
            [_with_stand_ins(message) for message in conversation.messages],
            tools=conversation.tools,
            reasoning_effort=conversation.reasoning_effort,
            json_schema=conversation.json_schema,
            continue_final=conversation.continue_final,
        )
        nothing = np.zeros((3, 0, 0), dtype=np.uint8)
        images = tuple(EncodedImage(nothing, one.offset, one.num_tokens) for one in prompt.images)
        return EncodedPrompt(prompt.token_ids, images)

    def encode_plain(self, text: str, with_start: bool) -> tuple[int, ...]:
        """Token ids of a plain prompt, with or without those that begin the model's prompts."""
        self.texts.check_tokens((text,), "prompt")
        if not with_start:
            return tuple(self._chat.vocabulary.encode_text(text))
        return self._chat.encode_prompt(text).token_ids

    def tokens_body(self, token_ids: Sequence[int], with_strs: bool) -> bytes:
        """The body of an answer of /tokenize, as JSON bytes."""
        piece = self._chat.vocabulary.piece
        return _json(
            {
                "tokens": token_ids,
                "count": len(token_ids),
                "max_model_len": self._config.max_model_len,
                "token_strs": [piece(token_id) for token_id in token_ids] if with_strs else None,
            }
        )

    def text_body(self, token_ids: list[int]) -> bytes:
        """The body of an answer of /detokenize; RequestError for ids that are no tokens."""
        check_token_ids(self._chat, token_ids, "tokens")
        return _json({"prompt": self._chat.vocabulary.decode(token_ids, keep_control=True)})

    def page_of(self, text: str) -> str:
        """An answer's Markdown as HTML, for the page."""
        return markdown.render(text)


def check_token_ids(chat: ChatFormat, token_ids: Sequence[int], param: str) -> None:
    """Raise RequestError (400) for ids that are no tokens, or image tokens without an image."""
    size, layout = chat.vocabulary.size, chat.image_layout
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise RequestError(
                f"{param}: token id {token_id} is outside the {size} known ones", param=param
            )
        if layout is not None and token_id == layout.image_token_id and param == "prompt":
            raise RequestError(f"{param}: an image token without an image", param=param)


def _with_stand_ins(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose shapes are pixels of no memory."""
    content = message.get("content")
    if not isinstance(content, list) or not any(map(_is_shape, content)):
        return message
    nothing = np.uint8(0)
    return {
        **message,
        "content": [
            {
                **part,
                "image": np.broadcast_to(nothing, (3, part["image"].height, part["image"].width)),
            }
            if _is_shape(part)
            else part
            for part in content
        ],
    }


def _is_shape(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("image"), Shape)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
