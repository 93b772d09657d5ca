"""Encoding for checkpoints with tokenizer.json and their own Jinja chat template.

The template runs in Jinja's immutable sandbox. It sees the real strings, except that every control
token typed by a user is broken by a guard character; the rendered text is then cut at the control
tokens that are left, which only the template can have written, the guards are taken out, and the
text between is encoded by a tokenizer that knows no control tokens.
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

from halfbyte.chat import tools as tool_calls
from halfbyte.chat.prompt import ControlTokens, EncodedPrompt
from halfbyte.chat.vocabulary import (
    Vocabulary,
    read_json,
    token_text,
    tokenizer_json_vocabulary,
)
from halfbyte.errors import CheckpointError, RequestError

# Private-use characters; one that the request does not contain is taken as the guard.
_GUARDS = tuple(chr(code) for code in range(0xE000, 0xF8FF))


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """A tokenizer.json, its chat template, and the names the template may ask for.

    Such a model has no thoughts and no tool calls that we could tell from text, hence the empty
    fields that it shares with `MistralFormat`.
    """

    vocabulary: Vocabulary
    template: jinja2.Template | None
    template_names: Mapping[str, str]
    control: ControlTokens = field(default_factory=ControlTokens)
    reasoning_efforts: tuple[str, ...] = ()
    default_effort: str | None = None
    image_layout: None = None

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

        Raises RequestError for images, for an effort other than "none", and with the template's
        own words where it refuses the conversation.
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
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if continue_final and plain[-1]["role"] != "assistant":
            raise RequestError(
                "only an assistant's last message can be continued", param="messages"
            )
        guarding = _Guarding(self.vocabulary, plain, tools)
        guarded = [guarding.value(message) for message in plain]
        if continue_final:
            guarded[-1]["content"] += guarding.end
        text = self._render(guarded, [guarding.value(tool) for tool in tools], not continue_final)
        if continue_final:
            text = text[: text.rindex(guarding.end)]
        return EncodedPrompt(tuple(guarding.encode(text)))

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
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
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


def load_template_format(directory: Path) -> TemplateFormat:
    """Read tokenizer.json, and the template from chat_template.jinja or tokenizer_config.json."""
    vocabulary = tokenizer_json_vocabulary(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    source = config.get("chat_template")
    if (directory / "chat_template.jinja").exists():
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    names = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := token_text(config.get(key))) is not None
    }
    template = None if source is None else _compile(str(source), directory)
    return TemplateFormat(vocabulary=vocabulary, template=template, template_names=names)


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


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as templates expect it: content as one string, absent fields absent."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, index, n) for n, part in enumerate(content))
    plain.setdefault("content", "")
    if plain["role"] == "developer":
        plain["role"] = "system"
    for number, call in enumerate(plain.get("tool_calls", ())):
        path = f"messages[{index}].tool_calls[{number}].function.arguments"
        tool_calls.checked_arguments(call["function"]["arguments"], path)
    return plain


def _part_text(part: Mapping[str, Any], index: int, number: int) -> str:
    if part["type"] == "text":
        return str(part["text"])
    path = f"messages[{index}].content[{number}]"
    raise RequestError(
        f"{path}: this model takes text only, not {part['type']}",
        param=path,
        code="unsupported_content",
    )
