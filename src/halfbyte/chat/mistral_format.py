"""Encoding for Mistral checkpoints: mistral-common does it, in its serving mode.

The request arrives as OpenAI-style message dicts that the server has validated, images already
decoded. What mistral-common lets pass silently is checked here: arguments of earlier tool calls,
call ids, efforts. Rules: docs/reference/chat.md#order-of-a-prompt.
"""

import base64
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    ChatMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import (
    ChatCompletionRequest,
    JsonSchema,
    ReasoningEffort,
    ResponseFormat,
    ResponseFormats,
)
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer, is_tekkenizer
from pydantic import ValidationError

from halfbyte.chat import tools as tool_calls
from halfbyte.chat.images import DecodedImages, ImageLayout
from halfbyte.chat.prompt import ControlTokens, EncodedImage, EncodedPrompt
from halfbyte.chat.tokenizer_bounds import MAX_PATTERN_CHARS, check_length
from halfbyte.chat.vocabulary import (
    MAX_TOKENS,
    Vocabulary,
    raise_if_unreadable,
    read_json,
    tekken_vocabulary,
)
from halfbyte.errors import CheckpointError, RequestError, first_finding, in_words, shown
from halfbyte.files import require_regular

MAX_IMAGE_SIZE = 2**16  # pixels of a side
MAX_SPECIAL = 2**16  # control tokens; files in use have 1,000


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """A tekken.json and everything that follows from it.

    reasoning_efforts  what `reasoning_effort` may say, from the file; empty if it lists none
    default_effort     the effort of a request that names none
    image_layout       None for a text-only tokenizer
    directory          where it was loaded from
    """

    tokenizer: MistralTokenizer[Any, Any, Any, Any, Any]
    vocabulary: Vocabulary
    control: ControlTokens
    reasoning_efforts: tuple[str, ...]
    default_effort: str | None
    shows_json_schema: bool
    image_layout: ImageLayout | None
    directory: Path

    def encode_prompt(self, text: str) -> EncodedPrompt:
        """A plain prompt: bos and the text, which cannot hold control tokens."""
        return EncodedPrompt(self.vocabulary.encode_prompt(text))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning_effort: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> EncodedPrompt:
        """Token ids of a conversation, with its images as pixels.

        messages          OpenAI-style; image parts are {"type": "image", "image": PIL image or
                          pixels as `images.decode_pixels` gives them}
        json_schema       shown to the model only where its settings have a place for it
        continue_final    the last message is the assistant's and is to be continued

        Raises RequestError with the path of what is wrong.
        """
        self._check_effort(reasoning_effort)
        call_ids = tool_calls.CallIds()
        converted = _convert_messages(messages, call_ids, continue_final=continue_final)
        try:
            request = ChatCompletionRequest[Any](
                model="local",
                messages=converted,
                tools=[_convert_tool(tool, number) for number, tool in enumerate(tools)] or None,
                reasoning_effort=ReasoningEffort(reasoning_effort) if reasoning_effort else None,
                response_format=self._response_format(json_schema),
            )
            tokenized = self.tokenizer.encode_chat_completion(request)
        except (MistralCommonException, ValueError) as error:
            raise_if_unreadable(error)
            message = call_ids.in_the_clients_words(_plain_message(error))
            raise RequestError(message, param="messages") from error
        return EncodedPrompt(tuple(tokenized.tokens), self._place_images(tokenized))

    def _check_effort(self, effort: str | None) -> None:
        if effort is None or effort in self.reasoning_efforts:
            return
        # "none" asks a model without thoughts for what it does anyway.
        if effort == "none" and not self.reasoning_efforts:
            return
        known = ", ".join(self.reasoning_efforts) or "none"
        raise RequestError(
            f"reasoning_effort {effort!r} is not one this model knows: {known}",
            param="reasoning_effort",
            code="unsupported_value",
        )

    def _response_format(self, json_schema: Mapping[str, Any] | None) -> ResponseFormat:
        if json_schema is None or not self.shows_json_schema:
            return ResponseFormat()
        path = "response_format.json_schema.schema"
        shown = tool_calls.shown_schema(json_schema, path, "response_format", strict=False)
        schema = JsonSchema(name="response", schema=dict(shown), strict=True)
        return ResponseFormat(type=ResponseFormats.json_schema, json_schema=schema)

    def _place_images(self, tokenized: Any) -> tuple[EncodedImage, ...]:
        """Find where each image's run of tokens begins; runs come in the order of the images."""
        if not tokenized.images:
            return ()
        layout = self.image_layout
        assert layout is not None
        placed = []
        start = 0
        for pixels in tokenized.images:
            offset = tokenized.tokens.index(layout.image_token_id, start)
            num_tokens = layout.num_tokens(pixels.shape[1], pixels.shape[2])
            placed.append(EncodedImage(pixels, offset, num_tokens))
            start = offset + num_tokens
        return tuple(placed)


def load_mistral_format(path: Path) -> MistralFormat:
    """Read a tekken.json. Raises CheckpointError if mistral-common does."""
    _check_tekken(read_json(path), path)
    try:
        require_regular(path)
        tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.from_file(
            path, mode=ValidationMode.serving
        )
    # mistral-common reads without looking: KeyError, TypeError, AssertionError, what it may be.
    except Exception as error:
        raise CheckpointError(f"{path}: {_of_file(error)}") from error
    tekken = tokenizer.instruct_tokenizer.tokenizer
    if not is_tekkenizer(tekken):
        raise CheckpointError(f"{path} is not a tekken vocabulary")
    _check_pattern(tekken, path)
    layout = _image_layout(tekken, path)
    if layout is not None:
        # Ours needs no OpenCV, and takes only images that are decoded and checked.
        tokenizer.instruct_tokenizer.image_encoder = DecodedImages(layout)  # type: ignore[assignment]
    builder = tekken.model_settings_builder
    effort = builder.reasoning_effort if builder is not None else None
    return MistralFormat(
        tokenizer=tokenizer,
        vocabulary=tekken_vocabulary(tekken),
        control=_control_tokens(tekken),
        reasoning_efforts=tuple(str(value) for value in effort.values) if effort else (),
        default_effort=str(effort.default) if effort and effort.default else None,
        shows_json_schema=builder is not None and builder.json_schema is not None,
        image_layout=layout,
        directory=path.parent,
    )


def _check_tekken(value: Mapping[str, Any], path: Path) -> None:
    """Refuse numbers that mistral-common would allocate by, and ranks that it would believe."""
    config = value.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path} has no config")
    for name, limit in (
        ("default_num_special_tokens", MAX_SPECIAL),
        ("default_vocab_size", MAX_TOKENS),
    ):
        number = config.get(name)
        if type(number) is not int or not 0 < number <= limit:
            raise CheckpointError(
                f"{path}: {name} is {shown(number)}; expected a number from 1 to {limit:,}"
            )
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise CheckpointError(f"{path}: pattern is {shown(pattern)}; a text was expected")
    check_length(len(pattern), MAX_PATTERN_CHARS, f"{path}: pattern has")
    version = config.get("version")
    if not isinstance(version, str) or len(version) > 20:
        raise CheckpointError(
            f"{path}: version is {shown(version)}; a text such as 'v13' was expected"
        )
    _check_pieces(value.get("vocab"), path)
    specials = value.get("special_tokens")
    if specials is None:
        return  # older files; mistral-common has their names
    is_list = isinstance(specials, list)
    listed = specials if is_list else ()
    ranks = [token.get("rank") for token in listed if isinstance(token, Mapping)]
    if not is_list or ranks != list(range(len(specials))):
        raise CheckpointError(
            f"{path}: the ranks of special_tokens must count from 0, in order; "
            f"they are {shown(ranks if is_list else specials)}"
        )
    names = [token.get("token_str") for token in specials]
    if not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{path}: a special token has no name")


def _check_pieces(pieces: object, path: Path) -> None:
    """Refuse a vocabulary that mistral-common would stumble over: it asserts what it expects."""
    if not isinstance(pieces, list):
        raise CheckpointError(f"{path}: vocab must be a list of pieces: {shown(pieces)}")
    seen: set[bytes] = set()
    for number, piece in enumerate(pieces):
        try:
            text = base64.b64decode(piece["token_bytes"], validate=True)
            is_right = piece["rank"] == number and text != b"" and text not in seen
        except (TypeError, LookupError, ValueError):
            is_right = False
        if not is_right or (number < 256 and text != bytes([number])):
            raise CheckpointError(
                f"{path}: piece {number} of vocab is {shown(piece)}; its rank must be its place, "
                "its bytes new and in base64, the first 256 the single bytes"
            )
        seen.add(text)


def _check_pattern(tekken: Tekkenizer, path: Path) -> None:
    """Refuse a pattern that drops text: tiktoken encodes what matches and forgets the rest."""
    for text in _pattern_samples():
        try:
            ids = tekken.encode(text, bos=False, eos=False)
            kept = b"".join(map(tekken.id_to_byte_piece, ids)).decode(errors="replace")
        except ValueError as error:
            raise CheckpointError(f"{path}: {_of_file(error)}") from error
        if kept != text:
            raise CheckpointError(
                f"{path}: its pattern does not match all of a text; of {text[:20]!r} it keeps "
                f"{kept[:20]!r}"
            )


@functools.cache
def _pattern_samples() -> tuple[str, ...]:
    """Characters of every category alone, all pairs of ASCII characters, and all in a row."""
    of_category: dict[str, list[str]] = {"": ["\ue000", "\ufdd0", "\U00020000", "\U0001f600"]}
    for code in range(0x3100):  # holds every other category
        char = chr(code)
        found = of_category.setdefault(unicodedata.category(char), [])
        if len(found) < 4:
            found.append(char)
    chars = [char for found in of_category.values() for char in found]
    ascii_ = [chr(code) for code in range(128)]
    pairs = "".join(first + second for first in ascii_ for second in ascii_)
    return (*chars, *ascii_, "".join(chars), "".join(reversed(chars)), pairs)


def _control_tokens(tekken: Tekkenizer) -> ControlTokens:
    """The tokens that structure an answer of this version; a file may list more than it uses.

    Calls before v11 are a JSON list after [TOOL_CALLS], which no grammar here writes: such models
    count as having none.
    """

    def find(name: str) -> int | None:
        return tekken.get_special_token(name) if tekken.is_special(name) else None

    version = tekken.version
    has_calls = version >= TokenizerVersion.v11
    return ControlTokens(
        think=find("[THINK]"),
        end_think=find("[/THINK]"),
        tool_calls=find("[TOOL_CALLS]") if has_calls else None,
        args=find("[ARGS]") if has_calls else None,
        call_id=find("[CALL_ID]") if version == TokenizerVersion.v11 else None,
    )


def _image_layout(tekken: Tekkenizer, path: Path) -> ImageLayout | None:
    config = tekken.image
    if config is None:
        return None
    for name in ("image_patch_size", "spatial_merge_size", "max_image_size"):
        number = getattr(config, name, None)
        if type(number) is not int or not 0 < number <= MAX_IMAGE_SIZE:
            raise CheckpointError(
                f"{path}: {name} is {shown(number)}; expected a number from 1 to {MAX_IMAGE_SIZE:,}"
            )
    return ImageLayout(
        patch_pixels=config.image_patch_size * config.spatial_merge_size,
        max_side_pixels=config.max_image_size,
        image_token_id=tekken.get_special_token("[IMG]"),
        break_token_id=tekken.get_special_token("[IMG_BREAK]"),
        end_token_id=tekken.get_special_token("[IMG_END]"),
    )


def _convert_messages(
    messages: Sequence[Mapping[str, Any]], call_ids: tool_calls.CallIds, *, continue_final: bool
) -> list[ChatMessage]:
    """mistral-common's messages. Empty answers are left out: the format has no way to write one."""
    if all(message["role"] in ("system", "developer") for message in messages):
        raise RequestError("messages: a user message is missing", param="messages")
    converted: list[ChatMessage] = []
    for index, message in tool_calls.with_missing_results(messages):
        is_last = index == len(messages) - 1
        path = f"messages[{index}]"
        role = message["role"]
        if role in ("system", "developer"):
            converted.append(SystemMessage(content=_content(message)))
        elif role == "user":
            converted.append(UserMessage(content=_content(message)))
        elif role == "assistant":
            prefix = continue_final and is_last
            answer = _convert_assistant(message, path, call_ids, prefix=prefix)
            if answer.content or answer.tool_calls:
                converted.append(answer)
        else:
            converted.append(
                ToolMessage(
                    content=_content(message),
                    tool_call_id=call_ids.inside(message["tool_call_id"]),
                )
            )
    is_answer = messages[-1]["role"] == "assistant"
    if is_answer is not continue_final:
        raise RequestError(
            "the last message is the assistant's own; to have it continued, set its prefix or "
            "continue_final_message to true"
            if is_answer
            else "only an assistant's last message can be continued",
            param=f"messages[{len(messages) - 1}]",
        )
    return converted


def _content(message: Mapping[str, Any]) -> Any:
    """Content as a string or as chunks; a missing one is empty."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return [_convert_part(part) for part in content]


def _convert_part(part: Mapping[str, Any]) -> TextChunk | ImageChunk | ThinkChunk:
    if part["type"] == "image":
        # Not validated: pixels are no image to mistral-common, and to our encoder they are.
        return ImageChunk.model_construct(image=part["image"])
    if part["type"] == "thinking":
        return ThinkChunk(thinking=part["thinking"], closed=True)
    return TextChunk(text=part["text"] if part["type"] == "text" else part["refusal"])


def _convert_assistant(
    message: Mapping[str, Any], path: str, call_ids: tool_calls.CallIds, *, prefix: bool
) -> AssistantMessage:
    """An earlier answer, its thought first: clients send it as reasoning_content or reasoning."""
    content = _content(message)
    thought = message.get("reasoning_content") or message.get("reasoning")
    # Clients that keep both forms of an answer send its thought twice.
    has_thought = any(isinstance(chunk, ThinkChunk) for chunk in content)
    if isinstance(content, list) and not has_thought and not any(c.text for c in content):
        content = ""
    if thought and not has_thought:
        chunks = [TextChunk(text=content)] if isinstance(content, str) and content else content
        content = [ThinkChunk(thinking=thought, closed=True), *(chunks or ())]
    calls = [
        ToolCall(
            id=call_ids.inside(call["id"]),
            function=FunctionCall(
                name=call["function"]["name"],
                arguments=tool_calls.checked_arguments(
                    call["function"]["arguments"], f"{path}.tool_calls[{index}].function.arguments"
                ),
            ),
        )
        for index, call in enumerate(message.get("tool_calls") or ())
    ]
    return AssistantMessage(content=content or None, tool_calls=calls or None, prefix=prefix)


def _convert_tool(tool: Mapping[str, Any], number: int) -> Tool:
    function = tool["function"]
    parameters = tool_calls.shown_schema(
        function.get("parameters") or {},
        f"tools[{number}].function.parameters",
        "tools",
        strict=bool(function.get("strict")),
    )
    return Tool(
        function=Function(
            name=function["name"],
            description=function.get("description") or "",
            parameters=dict(parameters),
        )
    )


def _of_file(error: Exception) -> str:
    """What is wrong with a file, from what mistral-common raised over it."""
    return first_finding(error) if isinstance(error, ValidationError) else in_words(error)


def _plain_message(error: Exception) -> str:
    """One line of an exception of mistral-common or pydantic."""
    text = getattr(error, "message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3])
