"""A conversation as the token ids that calibration runs: plain, or through the chat template.

The template is the model's own, by way of `chat`, so that the ids are those that serving sees:
tools and calls included, thoughts in the model's thinking form, pictures as rows of tokens with
their pixels beside them, a closing end token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.calibrate.blend import ReasoningMode
from halfbyte.calibrate.drawn import draw_reference, is_reference
from halfbyte.calibrate.rows import BadRowError, ParsedRow, text_of
from halfbyte.chat.images import (
    ImageLayout,
    ImageLimits,
    ImageSource,
    data_url_bytes,
    decode_pixels,
    open_image,
)
from halfbyte.chat.prompt import EncodedPrompt
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.errors import CheckpointError, HalfbyteError, RequestError
from halfbyte.files import hash_regular, is_there, read_bounded

_LIMITS = ImageLimits()  # the server's own
_TOKENIZER_FILES = ("tekken.json", "tokenizer.json")


class RefusedRowError(Exception):
    """The model's template cannot express this conversation; counted by the caller."""


@dataclass(frozen=True, slots=True)
class ChatText:
    """Turns conversations into ids for one checkpoint, and says what with."""

    chat: ChatFormat
    mode: ReasoningMode
    tokenizer_sha256: str
    template_sha256: str

    def encode(self, conversation: ParsedRow, folder: Path | None = None) -> EncodedPrompt:
        """A whole row, not cut; without ids if it has no text.

        folder  where the pictures lie that the row names; None if it may name none
        Raises RefusedRowError, and BadRowError for a picture that is none or not there.
        """
        if conversation.has_pictures:
            conversation = self._shown(conversation, folder)
        if conversation.text or self.mode == "plain":
            return EncodedPrompt(tuple(self._plain(conversation)))
        if not any(text_of(message).strip() for message in conversation.messages):
            return EncodedPrompt(())
        try:
            return self._template(conversation)
        except RequestError as error:
            raise RefusedRowError(str(error)) from error

    def _shown(self, conversation: ParsedRow, folder: Path | None) -> ParsedRow:
        """The conversation with pixels in the place of names."""
        layout = self.chat.image_layout
        if layout is None:
            raise RefusedRowError("the model takes text only, and the row shows a picture")
        if self.mode == "plain":
            raise RefusedRowError("mode plain joins texts; a row with a picture needs the template")
        messages: list[Mapping[str, Any]] = []
        for message in conversation.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    {**part, "image": _picture(part["image"], folder, layout)}
                    if part["type"] == "image"
                    else part
                    for part in content
                ]
            messages.append({**message, "content": content})
        return replace(conversation, messages=tuple(messages))

    def closed(self, ids: list[int]) -> list[int]:
        """`ids` with the end token behind them, once: how documents are packed."""
        ends = self.chat.vocabulary.eos_token_ids
        return ids if ids and ids[-1] in ends else [*ids, ends[0]]

    def _plain(self, conversation: ParsedRow) -> list[int]:
        contents = [str(message["content"]) for message in conversation.messages]
        text = conversation.text or "\n".join(contents)
        return list(self.chat.encode_prompt(text).token_ids) if text.strip() else []

    def _template(self, conversation: ParsedRow) -> EncodedPrompt:
        messages = list(conversation.messages)
        options: dict[str, Any] = {
            "tools": conversation.tools,
            "reasoning_effort": self._effort(conversation),
        }
        last = messages[-1]
        if last["role"] != "assistant":
            return self.chat.encode(messages, **options)
        if last.get("tool_calls"):
            return self._open_calls(messages, options)
        # Formats for serving know an assistant's last message only as one to be continued.
        prompt = self.chat.encode(messages, continue_final=True, **options)
        return replace(prompt, token_ids=tuple(self.closed(list(prompt.token_ids))))

    def _open_calls(
        self, messages: list[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> EncodedPrompt:
        """A row that ends with tool calls, which formats for serving take only with results.

        It is encoded with two kinds of made-up results; what both encodings begin with, up to its
        last end token, is the row.
        """
        first, second = (
            self.chat.encode([*messages, *_results(messages[-1], text)], **options)
            for text in ("0", "x")
        )
        one, other = first.token_ids, second.token_ids
        shared = next(
            (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0
        )
        ends = self.chat.vocabulary.eos_token_ids
        last_end = max((n for n in range(shared) if one[n] in ends), default=shared - 1)
        return replace(first, token_ids=one[: last_end + 1])

    def _effort(self, conversation: ParsedRow) -> str | None:
        """High when the row has a thought, none otherwise; None for a model without efforts."""
        wanted = "high" if conversation.has_reasoning else "none"
        return wanted if wanted in self.chat.reasoning_efforts else None


def _picture(named: str, folder: Path | None, layout: ImageLayout) -> ImageSource:
    """Pixels of a picture by the name that a row has for it. Raises BadRowError."""
    if is_reference(named):
        try:
            return draw_reference(named)
        except HalfbyteError as error:
            raise BadRowError(str(error)) from error
    is_data = named[:5].lower() == "data:"
    where = "a picture" if is_data else f"picture {named[:80]}"
    try:
        if is_data:
            data = data_url_bytes(named, where, _LIMITS)
        else:
            data = read_bounded(_beside(named, folder), _LIMITS.max_bytes)
        return decode_pixels(open_image(data, where, _LIMITS), where, layout)
    except RequestError as error:
        raise BadRowError(str(error)) from error
    except (OSError, ValueError) as error:
        raise BadRowError(f"{where}: {error}") from error


def _beside(named: str, folder: Path | None) -> Path:
    """The file that a row names; it must lie in the folder of the rows. Raises BadRowError."""
    if folder is None:
        raise BadRowError(f"picture {named[:80]}: only rows of local files may name files")
    path = folder / named
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadRowError(f"picture {named[:80]} lies outside of {folder}, where its rows are")
    return path


def _results(message: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": text}
        for call in message["tool_calls"]
    ]


def load_chat_text(directory: Path, mode: ReasoningMode) -> ChatText:
    """The chat format of a checkpoint directory, with hashes of the files it came from.

    Raises CheckpointError if there is none, or no chat template where the mode needs one.
    """
    chat = load_chat(directory)
    tokenizer = next(directory / name for name in _TOKENIZER_FILES if is_there(directory / name))
    # tekken.json holds the template's facts itself; mistral-common writes it out.
    template = None if tokenizer.name == "tekken.json" else _template_file(directory)
    if mode != "plain" and tokenizer.name != "tekken.json" and template is None:
        raise CheckpointError(f"{directory} has no chat template; only mode plain can do without")
    return ChatText(chat, mode, file_sha256(tokenizer), file_sha256(template or tokenizer))


def _template_file(directory: Path) -> Path | None:
    """Where the chat template stands, by the order in which `chat` looks for it."""
    jinja, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if is_there(jinja):
        return jinja
    has_template = is_there(config) and b'"chat_template"' in read_bounded(config)
    return config if has_template else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file must be a regular one."""
    return hash_regular(path)
