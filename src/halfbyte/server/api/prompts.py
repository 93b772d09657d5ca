"""Prompts of requests: messages with their images opened, plain texts, and their token ids."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from halfbyte.chat.images import ImageLimits, data_url_bytes, decode_pixels, open_image
from halfbyte.chat.prompt import EncodedImage, EncodedPrompt
from halfbyte.engine.request import ImageInput
from halfbyte.errors import RequestError
from halfbyte.pictures import Picture
from halfbyte.server.api import wire
from halfbyte.server.api.fetch import fetch_image
from halfbyte.server.api.held import AROUND_URLS, HELD, held_picture
from halfbyte.server.api.preparer import Preparer
from halfbyte.server.api.reader import Conversation, Shape, check_token_ids
from halfbyte.server.api.reading import Wire, are_many, check_count

Result = TypeVar("Result")

# Messages and parts of one conversation that are looked through on the event loop: a fraction of a
# millisecond.
_FEW_ENTRIES = 64


async def chat_prompt(
    preparer: Preparer, request: wire.ChatRequest
) -> tuple[EncodedPrompt, list[dict[str, Any]]]:
    """The prompt of a conversation, and its messages with their images decoded."""
    limits = preparer.config.limits
    check_count(len(request.messages), limits.messages, "messages")
    check_count(len(request.tools or ()), limits.tools, "tools")
    messages = await resolved_messages(preparer, request.messages)
    prompt = await encode_resolved(
        preparer,
        messages,
        tools=[tool.model_dump() for tool in request.tools or ()],
        reasoning_effort=request.reasoning_effort,
        json_schema=_shown_schema(request.response_format),
        continue_final=request.continues_final,
    )
    return prompt, messages


async def resolved_messages(
    preparer: Preparer, messages: Sequence[wire.Message]
) -> list[dict[str, Any]]:
    """Messages as plain objects, their images fetched and decoded."""

    def dump() -> list[dict[str, Any]]:
        return [message.model_dump(exclude_none=True) for message in messages]

    plain = await beside(preparer, messages, dump)
    await _resolve_images(preparer, plain)
    return plain


async def beside(
    preparer: Preparer,
    items: Iterable[Wire | Mapping[str, Any]],
    work: Callable[[], Result],
) -> Result:
    """Do work on all of these messages or items here, or in a thread if they are many."""
    return await preparer.aside.do_beside(work) if are_many(items, _FEW_ENTRIES) else work()


async def encode_resolved(
    preparer: Preparer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]],
    reasoning_effort: str | None,
    json_schema: Mapping[str, Any] | None = None,
    continue_final: bool,
) -> EncodedPrompt:
    """Token ids of a conversation whose images are decoded."""
    for index, message in enumerate(messages[:-1]):
        if message.get("prefix"):
            path = f"messages[{index}].prefix"
            raise RequestError(f"{path}: only the last message can be one", param=path)

    def asking() -> tuple[Conversation, list[NDArray[np.uint8]], int]:
        shown, pictures = _shapes(messages)
        asked = Conversation(shown, tools, reasoning_effort, json_schema, continue_final)
        return asked, pictures, sum(map(len, asked.texts(preparer.chat)))

    asked, pictures, size = await beside(preparer, messages, asking)
    prompt = await preparer.aside.do(size, preparer.reader.encode, asked)
    images = tuple(
        EncodedImage(pixels, one.offset, one.num_tokens)
        for pixels, one in zip(pictures, prompt.images, strict=True)
    )
    return EncodedPrompt(prompt.token_ids, images)


def _shapes(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[NDArray[np.uint8]]]:
    """Messages with the shapes of their pictures, and the pictures in order."""
    shown: list[Mapping[str, Any]] = []
    pictures: list[NDArray[np.uint8]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any("image" in part for part in content):
            parts = []
            for part in content:
                pixels = part.get("image")
                if pixels is not None:
                    pictures.append(pixels)
                    part = {**part, "image": Shape(*pixels.shape[1:])}
                parts.append(part)
            message = {**message, "content": parts}
        shown.append(message)
    return shown, pictures


async def _resolve_images(preparer: Preparer, messages: list[dict[str, Any]]) -> None:
    """Replace image URLs by the images' pixels, and thoughts in parts by their text, in place.

    All headers are read first: images whose tokens do not fit the context are never decoded.
    """
    limits = preparer.config.limits
    opened: list[tuple[list[dict[str, Any]], int, str, Picture]] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for number, part in enumerate(content):
            if part["type"] == "thinking" and isinstance(part["thinking"], list):
                part["thinking"] = "".join(text["text"] for text in part["thinking"])
            if part["type"] != "image_url":
                continue
            path = f"messages[{index}].content[{number}].image_url"
            check_count(len(opened) + 1, limits.images, "messages", what="images")
            if preparer.chat.image_layout is None:
                raise RequestError(
                    f"{path}: this model takes text only", param=path, code="unsupported_content"
                )
            value = part["image_url"]
            url = value if isinstance(value, str) else value["url"]
            opened.append((content, number, path, await _open_image(preparer, url, path)))
            _check_images(preparer, [picture for *_, picture in opened])
    layout = preparer.chat.image_layout
    if layout is None:
        return
    try:
        for content, number, path, picture in opened:
            # Scaled at once; what waits its turn here is a file in memory, not pixels.
            async with preparer.decoding:
                pixels = await asyncio.to_thread(decode_pixels, picture, path, layout)
            content[number] = {"type": "image", "image": pixels}
    finally:
        if opened:
            HELD.get([]).clear()
            preparer.body_room.trim_soon()


async def _open_image(preparer: Preparer, url: str, path: str) -> Picture:
    limits = preparer.config.limits
    image_limits = ImageLimits(limits.image_bytes, limits.image_pixels)
    url = url.strip(AROUND_URLS)
    held = held_picture(url)
    data: bytes | memoryview
    if held is not None:
        data = held.file(path)
    elif url[:5].lower() == "data:":
        data = await asyncio.to_thread(data_url_bytes, url, path, image_limits)
    else:
        data = await fetch_image(url, path, preparer.config.image_fetch, limits.image_bytes)
    return await asyncio.to_thread(open_image, data, path, image_limits)


def _check_images(preparer: Preparer, pictures: Sequence[Picture]) -> None:
    """400 for images that together are too many pixels, or more tokens than the context has."""
    layout = preparer.chat.image_layout
    assert layout is not None
    pixels = sum(picture.width * picture.height for picture in pictures)
    check_count(pixels, preparer.config.limits.request_pixels, "messages", what="pixels of images")
    num_tokens = 0
    for picture in pictures:
        width, height = layout.size(picture.width, picture.height)
        num_tokens += layout.num_tokens(height, width)
    if num_tokens >= preparer.config.max_model_len:
        raise RequestError(
            f"this model's context is {preparer.config.max_model_len} tokens; the request's images "
            f"alone need {num_tokens}",
            param="messages",
            code="context_length_exceeded",
        )


def image_inputs(prompt: EncodedPrompt) -> tuple[ImageInput, ...]:
    return tuple(
        ImageInput.of(image.pixels, image.offset, image.num_tokens) for image in prompt.images
    )


async def encode_plain(
    preparer: Preparer, text: str, *, with_start: bool = True
) -> tuple[int, ...]:
    """Token ids of a plain prompt, with or without those that begin the model's prompts."""

    return await preparer.aside.do(len(text), preparer.reader.encode_plain, text, with_start)


async def prompt_ids(preparer: Preparer, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        token_ids = await encode_plain(preparer, prompt)
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        return token_ids
    check_token_ids(preparer.chat, prompt, "prompt")
    return tuple(prompt)


def _shown_schema(form: wire.ResponseFormat | None) -> Mapping[str, Any] | None:
    """The schema that models with a place for it are told about."""
    if isinstance(form, wire.JsonSchemaFormat):
        return form.json_schema.schema_
    if isinstance(form, wire.JsonObjectFormat):
        return {"type": "object"}
    return None
