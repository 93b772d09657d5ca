"""Prompts of each generation of Mistral's tokenizers are mistral-common's, token for token.

Generated conversations with system prompts, thoughts (in Magistral's system prompt, too), tools,
calls, results and pictures go through the server's own reading of a request on our side, and
through mistral-common's reading of the same OpenAI messages on the other.
"""

import base64
import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers import image as their_images
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from halfbyte.chat.mistral_format import MistralFormat, load_mistral_format
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from tokenizers_of_sisters import VERSIONS, write_tekken

WORDS = ("hello", " world", "\n", "é", "你好", "😀", "[INST]", "</s>", "[THINK]", "42", " {", "}")
HAVE_THOUGHTS = ("v13", "v15")
HAVE_PICTURES = ("v3", "v7", "v11", "v13", "v15")


def text(dice: random.Random) -> str:
    return "".join(dice.choice(WORDS) for _ in range(dice.randrange(1, 7))).strip() or "x"


def picture(dice: random.Random) -> dict[str, Any]:
    image = Image.new(
        "RGB", (dice.randrange(1, 200), dice.randrange(1, 120)), (dice.randrange(256), 1, 2)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def system(dice: random.Random, version: str) -> dict[str, Any]:
    """Plain or, as Magistral's own prompt is, text around a thought."""
    content: Any = text(dice)
    if version in HAVE_THOUGHTS and dice.random() < 0.5:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": text(dice)}]}
        content = [
            {"type": "text", "text": text(dice)},
            thought,
            {"type": "text", "text": text(dice)},
        ]
    return {"role": "system", "content": content}


def user(dice: random.Random, version: str) -> dict[str, Any]:
    if version not in HAVE_PICTURES or dice.random() < 0.5:
        return {"role": "user", "content": text(dice)}
    parts = [
        picture(dice) if dice.random() < 0.5 else {"type": "text", "text": text(dice)}
        for _ in range(dice.randrange(1, 4))
    ]
    return {"role": "user", "content": parts}


def answers(dice: random.Random, version: str, names: list[str]) -> list[dict[str, Any]]:
    """One answer, or a call of one or two tools with their results and an answer."""
    said: list[dict[str, Any]] = []
    if names and dice.random() < 0.6:
        calls = [
            {
                "id": "".join(dice.choice("abcdef123") for _ in range(9)),
                "type": "function",
                "function": {
                    "name": dice.choice(names),
                    "arguments": json.dumps({"q": text(dice)}, ensure_ascii=False),
                },
            }
            for _ in range(dice.randrange(1, 3))
        ]
        said.append({"role": "assistant", "tool_calls": calls})
        said += [
            {"role": "tool", "tool_call_id": call["id"], "content": text(dice)} for call in calls
        ]
    answer: dict[str, Any] = {"role": "assistant", "content": text(dice)}
    if version in HAVE_THOUGHTS and dice.random() < 0.6:
        answer["reasoning_content"] = text(dice)
    return [*said, answer]


def request(dice: random.Random, version: str) -> dict[str, Any]:
    names = ["look_up", "add"][: dice.randrange(3)]
    messages = [system(dice, version)] if dice.random() < 0.6 else []
    for _ in range(dice.randrange(3)):
        messages += [user(dice, version), *answers(dice, version, names)]
    messages.append(user(dice, version))
    body: dict[str, Any] = {"model": "m", "messages": messages}
    if names:
        parameters = {"type": "object", "properties": {"q": {"type": "string"}}}
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": name, "description": text(dice), "parameters": parameters},
            }
            for name in names
        ]
    if version == "v15" and dice.random() < 0.5:
        body["reasoning_effort"] = dice.choice(["none", "high"])
    return body


def theirs_of(body: dict[str, Any]) -> Any:
    """Mistral-common's own reading, which wants a thought as one text."""
    body = copy.deepcopy(body)
    for message in body["messages"]:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if part["type"] == "thinking":
                part["thinking"] = "".join(one["text"] for one in part["thinking"])
    return ChatCompletionRequest.from_openai(**body)


@pytest.fixture(scope="module")
def _no_resizing() -> Iterator[None]:
    """Their pixels need OpenCV, and are not what is compared; their grids of tokens are."""
    patch = pytest.MonkeyPatch()

    def blank(image: Image.Image, size: tuple[int, int]) -> Any:
        return np.zeros((3, size[1], size[0]), np.float32)

    patch.setattr(their_images, "transform_image", blank)
    yield
    patch.undo()


def ours_of(chat: MistralFormat, body: dict[str, Any]) -> tuple[int, ...]:
    parsed = reading.parse(wire.ChatRequest, body)
    messages = [message.model_dump(exclude_none=True) for message in parsed.messages]
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if part["type"] == "thinking" and isinstance(part["thinking"], list):
                part["thinking"] = "".join(one["text"] for one in part["thinking"])
            elif part["type"] == "image_url":
                data = base64.b64decode(part.pop("image_url")["url"].partition(",")[2])
                part |= {"type": "image", "image": Image.open(io.BytesIO(data))}
    return chat.encode(
        messages,
        tools=[tool.model_dump(exclude_none=True) for tool in parsed.tools or ()],
        reasoning_effort=parsed.reasoning_effort,
    ).token_ids


@pytest.mark.usefixtures("_no_resizing")
@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_are_those_of_mistral_common(version: str, tmp_path: Path) -> None:
    write_tekken(tmp_path, version)
    path = tmp_path / "tekken.json"
    chat = load_mistral_format(path)
    theirs = MistralTokenizer.from_file(str(path), mode=ValidationMode.serving)
    assert chat.vocabulary.size == 764
    dice = random.Random(version)
    compared = 0
    for _ in range(60):
        body = request(dice, version)
        try:
            expected = theirs.encode_chat_completion(theirs_of(body)).tokens
        except MistralCommonException:
            with pytest.raises(RequestError):
                ours_of(chat, body)
            continue
        assert list(ours_of(chat, body)) == expected, json.dumps(body)
        compared += 1
    assert compared > 40


THOUGHT_IN_SYSTEM: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "thinking", "thinking": "so"}]},
    {"role": "user", "content": "Hi"},
]


@pytest.mark.parametrize("version", [one for one in VERSIONS if one not in HAVE_THOUGHTS])
def test_a_thought_in_the_system_prompt_needs_a_version_that_has_thoughts(
    version: str, tmp_path: Path
) -> None:
    write_tekken(tmp_path, version)
    with pytest.raises(RequestError):
        ours_of(
            load_mistral_format(tmp_path / "tekken.json"),
            {"model": "m", "messages": THOUGHT_IN_SYSTEM},
        )


def test_a_template_has_no_place_for_a_thought_in_the_system_prompt(
    chatml: TemplateFormat,
) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.content: .* no place for a thought"):
        chatml.encode(THOUGHT_IN_SYSTEM)


@pytest.mark.parametrize("version", VERSIONS)
def test_which_versions_think_and_call(version: str, tmp_path: Path) -> None:
    """Calls before v11 are a list in text, of which no grammar here knows."""
    write_tekken(tmp_path, version)
    control = load_mistral_format(tmp_path / "tekken.json").control
    assert (control.think is not None) is (version in HAVE_THOUGHTS)
    assert (control.tool_calls is not None) is (version in ("v11", "v13", "v15"))
    assert (control.call_id is not None) is (version == "v11")
