"""Encoding for checkpoints with tokenizer.json and their own Jinja chat template.

The template runs in a sandbox over text that remembers who wrote it (`sandbox`, `written`). The
rendered text is cut at the control tokens whose every character is the template's, and what is
between is encoded by a tokenizer that knows no control tokens. Of an image the template writes one
token, which becomes the image's rows here; templates that take no parts get the token in a string.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.chat import tools as tool_calls
from halfbyte.chat.images import ImageLayout, ImageSource, encode_image
from halfbyte.chat.processor import processor_layout
from halfbyte.chat.prompt import ControlTokens, EncodedImage, EncodedPrompt
from halfbyte.chat.sandbox import ChatTemplate
from halfbyte.chat.tokenizer_json import ControlCutter, load_tokenizer_json, text_of_token
from halfbyte.chat.vocabulary import Vocabulary, read_json, read_text
from halfbyte.chat.written import Written, own, typed
from halfbyte.errors import CheckpointError, RequestError, shown
from halfbyte.files import is_there

# Roles are the server's words, not the client's; "<|" + role + "|>" is a control token.
_ROLES = {role: own(role) for role in ("system", "user", "assistant", "tool")}
# Stands at the end of an answer that is to be continued. No client can send half a surrogate pair.
_END = "\udfff"
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """A tokenizer.json, its chat templates, and the names a template may ask for.

    cutter        finds the control tokens of a rendered text
    templates     by name; "default", and "tool_use" where the model has one for tools; empty if
                  the checkpoint has none
    directory     where it was loaded from
    image_layout  None for a text-only checkpoint
    takes_parts   whether the template writes the image token for an image part of a content list

    Such a model has no thoughts and no tool calls that we could tell from text, hence the empty
    fields that it shares with `MistralFormat`.
    """

    vocabulary: Vocabulary
    cutter: ControlCutter
    templates: Mapping[str, ChatTemplate]
    template_names: Mapping[str, str]
    directory: Path
    control: ControlTokens = field(default_factory=ControlTokens)
    reasoning_efforts: tuple[str, ...] = ()
    default_effort: str | None = None
    image_layout: ImageLayout | None = None
    takes_parts: bool = False

    def encode_prompt(self, text: str) -> EncodedPrompt:
        """A plain prompt: the text, after a bos where the tokenizer's config wants one."""
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
        """Token ids of a conversation by its template; see `MistralFormat.encode`.

        Raises RequestError for images where the model takes none or its template drops one, for an
        effort other than "none", with the template's own words where it refuses the conversation,
        and where the template does not let an answer be continued.
        """
        if not self.templates:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        if reasoning_effort not in (None, "none"):
            raise RequestError(
                f"reasoning_effort {reasoning_effort!r} is not one this model knows: none",
                param="reasoning_effort",
                code="unsupported_value",
            )
        images: list[ImageSource] = []
        plain = [
            self._with_image_tokens(
                _plain_message(message, index, images if self.image_layout else None)
            )
            for index, message in enumerate(messages)
        ]
        if continue_final and plain[-1]["role"] != "assistant":
            raise RequestError(
                "only an assistant's last message can be continued", param="messages"
            )
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        template = self.templates[name]
        if continue_final:
            text = self._continued(template, plain, tools)
        else:
            text = self._rendered(template, plain, tools, add_generation_prompt=True)
        return self._with_images(self._ids(text), images)

    def _rendered(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
    ) -> Written:
        values = {
            "messages": messages,
            "tools": typed(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{key: own(name) for key, name in self.template_names.items()},
        }
        return template.render(values)

    def _continued(
        self,
        template: ChatTemplate,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> Written:
        """The conversation up to where its last message ends.

        White space at that end stays if the template keeps it and goes if the template trims, as
        in transformers: so the model was trained.
        """
        last = dict(messages[-1])
        answer: Written = last.get("content") or typed("")
        # The space shows whether the template trims.
        last["content"] = answer + own(_END + " ")
        text = self._rendered(template, [*messages[:-1], last], tools, add_generation_prompt=False)
        begun = text[: max(text.find(_END), 0)]
        if text.count(_END) != 1 or not begun.rstrip().endswith(answer.strip()):
            raise RequestError(
                "the model's chat template does not write the last message whole, once; this "
                "answer cannot be continued",
                param=f"messages[{len(messages) - 1}]",
                code="unsupported_value",
            )
        is_trimmed = text[len(begun) + 1 : len(begun) + 2] != " "
        return begun.rstrip() if is_trimmed and answer.strip() else begun

    def _ids(self, text: Written) -> list[int]:
        """Ids of a rendered conversation; control tokens are what the template wrote."""
        if not text.isascii() and _HALF_PAIR.search(text):
            raise RequestError(
                "messages: half a surrogate pair is not text; send whole characters",
                param="messages",
            )
        ids: list[int] = []
        for piece in self.cutter.cut(text, text.own):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                encode = self.vocabulary.encode_text if ids else self.vocabulary.encode_first
                ids += encode(piece)
        return ids

    def _with_image_tokens(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as this template takes it: parts stay, or become one string."""
        content = message.get("content")
        if not isinstance(content, list) or self.takes_parts:
            return message
        assert self.image_layout is not None
        token = own(self.vocabulary.control_names[self.image_layout.image_token_id])
        texts = (part.get("text", token) for part in content)
        return {**message, "content": own("\n").join(texts)}

    def _with_images(self, ids: list[int], images: Sequence[ImageSource]) -> EncodedPrompt:
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


def load_template_format(directory: Path) -> TemplateFormat:
    """Read tokenizer.json, the processor's files, and the chat templates."""
    vocabulary, cutter = load_tokenizer_json(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if is_there(path) else {}
    names = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := text_of_token(config.get(key))) is not None
    }
    templates = {
        name: ChatTemplate(source, where)
        for name, (source, where) in _template_sources(directory, config).items()
    }
    if templates and "default" not in templates:
        raise CheckpointError(
            f"{directory}: chat templates {', '.join(sorted(templates))}; none is called default"
        )
    layout = processor_layout(directory, vocabulary.control)
    takes_parts = False
    if templates and layout is not None:
        token = vocabulary.control_names[layout.image_token_id]
        takes_parts = _takes_parts(templates["default"], names, token)
    return TemplateFormat(
        vocabulary=vocabulary,
        cutter=cutter,
        templates=templates,
        template_names=names,
        directory=directory,
        image_layout=layout,
        takes_parts=takes_parts,
    )


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (source, where it stands) of every chat template, from where transformers reads it.

    chat_template.jinja with additional_chat_templates/NAME.jinja beside it, else the processor's
    chat_template.json, else tokenizer_config.json, with one template or several by name.
    """
    files = {"default": directory / "chat_template.jinja"}
    folder = directory / "additional_chat_templates"
    if folder.is_dir():
        files |= {path.stem: path for path in sorted(folder.glob("*.jinja"))}
    found = {name: (read_text(path), str(path)) for name, path in files.items() if is_there(path)}
    if found:
        return found
    of_processor = directory / "chat_template.json"
    if is_there(of_processor):
        where = of_processor
        value = read_json(of_processor).get("chat_template")
    else:
        where = directory / "tokenizer_config.json"
        value = config.get("chat_template")
    return {name: (source, str(where)) for name, source in _named(value, where).items()}


def _named(value: object, where: Path) -> dict[str, str]:
    """A template alone, a list of {"name", "template"}, or a mapping of names."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(item, Mapping) and isinstance(item.get("name"), str) for item in value
    ):
        value = {item["name"]: item.get("template") for item in value}
    if not isinstance(value, Mapping) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise CheckpointError(
            f"{where}: chat_template is neither a text nor texts by name, but {shown(value)}"
        )
    return dict(value)


def _takes_parts(template: ChatTemplate, names: Mapping[str, str], image_token: str) -> bool:
    """Whether an image part comes out as one image token; found out by trying."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    values = {"messages": messages, "tools": None, "documents": None, **names}
    try:
        text = template.render({**values, "add_generation_prompt": True})
    except RequestError:
        return False
    return text.count(image_token) == 1


def _plain_message(
    message: Mapping[str, Any], index: int, images: list[ImageSource] | None
) -> dict[str, Any]:
    """A message as templates expect it: absent fields absent, content one string.

    With images the content is parts, {"type": "image"} or a text, and their pixels are appended to
    `images`; None refuses them. Thoughts go by the names that templates read, arguments of calls
    are objects, as transformers and other servers hand them over.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        thoughts = [part["thinking"] for part in content if part["type"] == "thinking"]
        if thoughts and plain["role"] in ("system", "developer"):
            path = f"messages[{index}].content"
            raise RequestError(
                f"{path}: this model's template has no place for a thought in a system message",
                param=path,
                code="unsupported_content",
            )
        parts = [
            _plain_part(part, index, n, images)
            for n, part in enumerate(content)
            if part["type"] != "thinking"
        ]
        has_images = any(part["type"] == "image" for part in parts)
        plain["content"] = parts if has_images else "\n".join(part["text"] for part in parts)
        if thoughts:
            plain.setdefault("reasoning_content", "".join(thoughts))
    thought = plain.get("reasoning_content") or plain.get("reasoning")
    if thought is not None:
        plain = {"thinking": thought, **plain, "reasoning_content": thought}
    if calls := plain.get("tool_calls"):
        path = f"messages[{index}].tool_calls"
        plain["tool_calls"] = [
            {**call, "function": _plain_call(call["function"], f"{path}[{number}].function")}
            for number, call in enumerate(calls)
        ]
    plain = typed(plain)
    assert isinstance(plain, dict)
    role = "system" if plain["role"] == "developer" else plain["role"]
    plain["role"] = _ROLES.get(role, role)
    return plain


def _plain_call(function: Mapping[str, Any], path: str) -> dict[str, Any]:
    arguments = tool_calls.read_arguments(function["arguments"], f"{path}.arguments")
    return {**function, "arguments": arguments}


def _plain_part(
    part: Mapping[str, Any], index: int, number: int, images: list[ImageSource] | None
) -> dict[str, str]:
    if part["type"] in ("text", "refusal"):
        return {"type": "text", "text": str(part[part["type"]])}
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
