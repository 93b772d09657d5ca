"""Encoding for checkpoints with tokenizer.json and their own Jinja chat template.

The template runs in Jinja's immutable sandbox. It sees the real strings, except that every control
token typed by a user is broken by a guard character; the rendered text is then cut at the control
tokens that are left, which only the template can have written, the guards are taken out, and the
text between is encoded by a tokenizer that knows no control tokens. Of an image the template
writes one token, which becomes the image's rows here; templates that take no parts get the token in
a string.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from PIL import Image

from halfbyte.chat import tools as tool_calls
from halfbyte.chat.images import ImageLayout, encode_image
from halfbyte.chat.processor import processor_layout
from halfbyte.chat.prompt import ControlTokens, EncodedImage, EncodedPrompt
from halfbyte.chat.vocabulary import (
    Vocabulary,
    read_json,
    token_text,
    tokenizer_json_vocabulary,
)
from halfbyte.errors import CheckpointError, RequestError
from halfbyte.files import read_bounded

# What a template does with data it was not written for.
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError)
# Private-use characters; one that the request does not contain is taken as the guard.
_GUARDS = tuple(chr(code) for code in range(0xE000, 0xF8FF))


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """A tokenizer.json, its chat template, and the names the template may ask for.

    image_layout  None for a text-only checkpoint
    takes_parts   whether the template writes the image token for an image part of a content list

    Such a model has no thoughts and no tool calls that we could tell from text, hence the empty
    fields that it shares with `MistralFormat`.
    """

    vocabulary: Vocabulary
    template: jinja2.Template | None
    template_names: Mapping[str, str]
    control: ControlTokens = field(default_factory=ControlTokens)
    reasoning_efforts: tuple[str, ...] = ()
    default_effort: str | None = None
    image_layout: ImageLayout | None = None
    takes_parts: bool = False

    def encode_prompt(self, text: str) -> EncodedPrompt:
        """A plain prompt: the text, after a bos where the tokenizer's config wants one."""
        bos = self.vocabulary.bos_token_id
        start = () if bos is None else (bos,)
        return EncodedPrompt((*start, *self.vocabulary.encode_text(text)))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning_effort: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> EncodedPrompt:
        """Token ids of a conversation; see `MistralFormat.encode`.

        Raises RequestError for images where the model takes none or its template drops one, for an
        effort other than "none", and with the template's own words where it refuses the
        conversation.
        """
        if self.template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        if reasoning_effort not in (None, "none"):
            raise RequestError(
                f"reasoning_effort {reasoning_effort!r} is not one this model knows: none",
                param="reasoning_effort",
                code="unsupported_value",
            )
        images: list[Image.Image] = []
        plain = [
            _plain_message(message, index, images if self.image_layout else None)
            for index, message in enumerate(messages)
        ]
        if continue_final and plain[-1]["role"] != "assistant":
            raise RequestError(
                "only an assistant's last message can be continued", param="messages"
            )
        guarding = _Guarding(self.vocabulary, plain, tools)
        guarded = [self._with_image_tokens(guarding.value(message)) for message in plain]
        if continue_final:
            guarded[-1]["content"] += guarding.end
        text = self._render(guarded, [guarding.value(tool) for tool in tools], not continue_final)
        if continue_final:
            text = text[: text.rindex(guarding.end)]
        return self._with_images(guarding.encode(text), images)

    def _with_image_tokens(self, message: dict[str, Any]) -> dict[str, Any]:
        """A guarded message as this template takes it: parts stay, or become one string."""
        content = message["content"]
        if isinstance(content, str) or self.takes_parts:
            return message
        assert self.image_layout is not None
        token = self.vocabulary.control_names[self.image_layout.image_token_id]
        texts = (part.get("text", token) for part in content)
        return {**message, "content": "\n".join(texts)}

    def _with_images(self, ids: list[int], images: Sequence[Image.Image]) -> EncodedPrompt:
        """The prompt with each image token replaced by its image's rows of tokens."""
        if self.image_layout is None or not images:
            return EncodedPrompt(tuple(ids))
        found = ids.count(self.image_layout.image_token_id)
        if found != len(images):
            raise RequestError(
                f"the model's chat template writes {found} of {len(images)} images",
                param="messages",
                code="unsupported_content",
            )
        waiting = iter(images)
        expanded: list[int] = []
        placed: list[EncodedImage] = []
        for token_id in ids:
            if token_id != self.image_layout.image_token_id:
                expanded.append(token_id)
                continue
            encoded = encode_image(self.image_layout, next(waiting))
            placed.append(EncodedImage(encoded.image, len(expanded), len(encoded.tokens)))
            expanded += encoded.tokens
        return EncodedPrompt(tuple(expanded), tuple(placed))

    def _render(self, messages: list[Any], tools: list[Any], add_prompt: bool) -> str:
        assert self.template is not None
        try:
            return self.template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_prompt,
                **self.template_names,
            )
        except _TemplateRefusalError as error:
            raise RequestError(str(error), param="messages") from error
        except _FAULTS as error:
            message = f"the model's chat template cannot render this conversation: {error}"
            raise RequestError(message, param="messages") from error


class _Guarding:
    """Breaks control tokens in a user's strings, and encodes what the template made of them."""

    def __init__(self, vocabulary: Vocabulary, *values: Any) -> None:
        self._vocabulary = vocabulary
        names = sorted(vocabulary.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._starts = {name[:length] for name in names for length in range(1, len(name))}
        text = json.dumps(values, ensure_ascii=False)
        free = (guard for guard in _GUARDS if guard not in text)
        self._guard = next(free, "")
        self.end = next(free, "")
        if not self.end:
            # Somebody sent every private-use character there is.
            raise RequestError("messages use all private-use characters", param="messages")

    def value(self, value: Any) -> Any:
        """A copy of JSON-like data with every string guarded."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._text(key): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        """Break each control token after its first character, and ends that could become one.

        "a<|im_end|>" -> "a<GUARD|im_end|>"; "a <|im_" -> "a <|im_GUARD", lest the template's next
        characters complete it. Templates trim, so white space at the end does not protect.
        """
        broken = self._control.sub(lambda m: m[0][0] + self._guard + m[0][1:], text)
        stripped = broken.rstrip()
        if any(stripped.endswith(start) for start in self._starts):
            broken = stripped + self._guard + broken[len(stripped) :]
        return broken

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation; control tokens are what the template wrote."""
        ids: list[int] = []
        position = 0
        for match in self._control.finditer(rendered):
            ids += self._plain(rendered[position : match.start()])
            ids.append(self._vocabulary.control[match[0]])
            position = match.end()
        return ids + self._plain(rendered[position:])

    def _plain(self, text: str) -> list[int]:
        text = text.replace(self._guard, "")
        return self._vocabulary.encode_text(text) if text else []


def _read_text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text: {error}") from error


def load_template_format(directory: Path) -> TemplateFormat:
    """Read tokenizer.json, the processor's files, and the template.

    The template is chat_template.jinja, else that of tokenizer_config.json.
    """
    vocabulary = tokenizer_json_vocabulary(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    source = config.get("chat_template")
    if (directory / "chat_template.jinja").exists():
        source = _read_text(directory / "chat_template.jinja")
    names = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := token_text(config.get(key))) is not None
    }
    template = None if source is None else _compile(str(source), directory)
    layout = processor_layout(directory, vocabulary.control)
    takes_parts = False
    if template is not None and layout is not None:
        token = vocabulary.control_names[layout.image_token_id]
        takes_parts = _takes_parts(template, names, token)
    return TemplateFormat(
        vocabulary=vocabulary,
        template=template,
        template_names=names,
        image_layout=layout,
        takes_parts=takes_parts,
    )


def _takes_parts(template: jinja2.Template, names: Mapping[str, str], image_token: str) -> bool:
    """Whether an image part comes out as one image token; found out by trying."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    try:
        text = template.render(messages=messages, tools=None, add_generation_prompt=True, **names)
    except (_TemplateRefusalError, *_FAULTS):
        return False
    return text.count(image_token) == 1


def _compile(source: str, directory: Path) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{directory}: chat template does not compile: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON, as chat templates expect it (Jinja's own filter escapes for HTML)."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _TemplateRefusalError(Exception):
    """The template called raise_exception."""


def _refuse(message: str) -> NoReturn:
    raise _TemplateRefusalError(message)


def _plain_message(
    message: Mapping[str, Any], index: int, images: list[Image.Image] | None
) -> dict[str, Any]:
    """A message as templates expect it: absent fields absent, content one string.

    With images the content is parts, {"type": "image"} or a text, and their pixels are appended to
    `images`; None refuses them.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        parts = [_plain_part(part, index, n, images) for n, part in enumerate(content)]
        has_images = any(part["type"] == "image" for part in parts)
        plain["content"] = parts if has_images else "\n".join(part["text"] for part in parts)
    plain.setdefault("content", "")
    if plain["role"] == "developer":
        plain["role"] = "system"
    for number, call in enumerate(plain.get("tool_calls", ())):
        path = f"messages[{index}].tool_calls[{number}].function.arguments"
        tool_calls.checked_arguments(call["function"]["arguments"], path)
    return plain


def _plain_part(
    part: Mapping[str, Any], index: int, number: int, images: list[Image.Image] | None
) -> dict[str, str]:
    if part["type"] == "text":
        return {"type": "text", "text": str(part["text"])}
    if part["type"] == "image" and images is not None:
        images.append(part["image"])
        return {"type": "image"}
    path = f"messages[{index}].content[{number}]"
    takes = "text only" if images is None else "text and images"
    raise RequestError(
        f"{path}: this model takes {takes}, not {part['type']}",
        param=path,
        code="unsupported_content",
    )
