"""The official client over the real engine: what it adds up from a stream is what it gets whole.

The client's own accumulators are used (`stream()`, `parse()`), as an application would. Thoughts
and calls are forced token by token; no model that thinks is part of this.
"""

import asyncio
import base64
import gc
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from flows.stand import (
    ARGS,
    CALLS,
    END_THINK,
    EOS,
    HELLO,
    THINK,
    Stand,
    ask,
    standing,
    write_model,
)
from halfbyte.chat.grammar_follow import GrammarMask
from halfbyte.chat.grammar_masks import ThoughtMask
from halfbyte.engine.request import ImageInput

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("models") / "seeing"
    write_model(path, vision=True)
    return path


@pytest.fixture
async def stand(directory: Path) -> AsyncIterator[Stand]:
    async with standing(
        directory, max_model_len=512, kv_cache_tokens=4096, max_sequences=8
    ) as stand:
        yield stand


def picture() -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.effect_noise((90, 60), 90).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


LOOK = [{"role": "user", "content": [{"type": "text", "text": "What?"}, picture()]}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FEATURES: dict[str, tuple[tuple[str | int, ...] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "sampled with a seed": (None, {"temperature": 0.9, "top_p": 0.9, "seed": 3}),
    "choices": (None, {"n": 3, "temperature": 1.0, "seed": 3}),
    "log-probs": (None, {"logprobs": True, "top_logprobs": 20, "max_tokens": 6}),
    "stop": (("one two three", EOS), {"stop": ["w", "x"]}),
    "penalties": (None, {"presence_penalty": 1.5, "frequency_penalty": 1.5}),
    "bias": (None, {"logit_bias": {"100": 100}, "max_tokens": 3}),
    "length": (None, {"max_completion_tokens": 2}),
    "image": (None, {"messages": LOOK}),
    "thought": ((THINK, "hm é", END_THINK, "Yes.", EOS), {"reasoning_effort": "high"}),
    "thought without end": ((THINK, "a" * 60), {"reasoning_effort": "high"}),
    "budget": (
        (THINK, "a" * 60),
        {"reasoning_effort": "high", "extra_body": {"max_reasoning_tokens": 4}},
    ),
    "calls": (
        (CALLS, "get_weather", ARGS, '{"city": "Rome"}',
         CALLS, "get_weather", ARGS, '{"city": "Bari"}', EOS),
        {"tools": [WEATHER], "max_tokens": 100},
    ),
    "thought, text, call": (
        (THINK, "hm", END_THINK, "See.", CALLS, "get_weather", ARGS, '{"city": "Rome"}', EOS),
        {"tools": [WEATHER], "reasoning_effort": "high", "max_tokens": 100},
    ),
    "one call at most": (None, {
        "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False,
        "max_tokens": 100,
    }),
    "named tool": (None, {
        "tools": [WEATHER], "max_tokens": 100,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }),
    "tools not to be used": (None, {"tools": [WEATHER], "tool_choice": "none"}),
    "schema": (None, {"max_tokens": 100, "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }}),
    "regex": (None, {"extra_body": {"response_format": {"type": "regex", "regex": "[ab]{9}"}}}),
    "continued": (None, {
        "messages": [*HELLO, {"role": "assistant", "content": "So"}],
        "extra_body": {"continue_final_message": True},
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
async def test_streamed_equals_whole(stand: Stand, name: str) -> None:
    forced, options = FEATURES[name]
    if forced is not None:
        stand.force(*forced)
    request: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24, **options,
    }  # fmt: skip
    if "max_completion_tokens" in options:
        del request["max_tokens"]
    whole = await stand.client.chat.completions.create(**request)
    try:
        async with stand.client.chat.completions.stream(
            **request, stream_options={"include_usage": True}
        ) as stream:
            async for _ in stream:
                pass
            summed = await stream.get_final_completion()
    except openai.LengthFinishReasonError as error:
        # The client's accumulator refuses cut answers to tools and schemas; it carries them.
        summed = error.completion
    assert len(summed.choices) == len(whole.choices) == options.get("n", 1)
    for one, other in zip(summed.choices, whole.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert (one.message.content or "") == (other.message.content or "")
        thought = getattr(other.message, "reasoning_content", None)
        assert (getattr(one.message, "reasoning_content", None) or None) == thought
        calls = [
            [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
            for message in (one.message, other.message)
        ]
        assert calls[0] == calls[1]
        if options.get("logprobs"):
            assert one.logprobs.content == other.logprobs.content

    def bare(usage: Any) -> Any:
        # What the first of the two left in the prefix cache is found by the second.
        told = usage.model_dump()
        told["prompt_tokens_details"].pop("cached_tokens")
        return told

    # A stream that the accumulator refuses is not read to its usage.
    assert summed.usage is None or bare(summed.usage) == bare(whole.usage)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    await stand.idle()


async def test_parse_gives_a_typed_object(stand: Stand) -> None:
    class Answer(BaseModel):
        a: bool
        b: Literal["x", "y"]

    answer = await stand.client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=100, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)
    told = await stand.client.responses.parse(
        model="tiny", input="Hello", text_format=Answer, max_output_tokens=100, temperature=0
    )
    assert isinstance(told.output_parsed, Answer)


@pytest.mark.parametrize("name", ["plain", "thought, text, call", "image"])
async def test_responses_streamed_equal_whole(stand: Stand, name: str) -> None:
    # Complete answers: the accumulator takes no others.
    stand.force(*(FEATURES[name][0] or ("Hello é", EOS)))
    said: list[dict[str, Any]] = [{"type": "input_text", "text": "What?"}]
    if name == "image":
        said.append({"type": "input_image", "image_url": picture()["image_url"]["url"]})
    function = WEATHER["function"]
    request: dict[str, Any] = {
        "model": "tiny",
        "input": [{"role": "user", "content": said}],
        "temperature": 0,
        "max_output_tokens": 100,
        "tools": [{"type": "function", **function}],
        "reasoning": {"effort": "high"},
    }
    whole = await stand.client.responses.create(**request)
    async with stand.client.responses.stream(**request) as stream:
        kinds = [event.type async for event in stream]
        summed = await stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"

    def bare(answer: Any) -> Any:
        items = [item.model_dump() for item in answer.output]
        for item in items:
            for key in ("id", "call_id", "parsed_arguments"):
                item.pop(key, None)
            for part in item.get("content") or ():
                part.pop("parsed", None)
        return items, answer.status, answer.usage.output_tokens

    assert bare(summed) == bare(whole)
    if name == "thought, text, call":
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert whole.output_text == "See."
    await stand.idle()


@pytest.mark.parametrize("echo", [False, True])
async def test_completions_streamed_equal_whole(stand: Stand, echo: bool) -> None:
    request: dict[str, Any] = {
        "model": "tiny", "prompt": ["Hello", "x y"], "n": 2, "max_tokens": 7, "logprobs": 3,
        "echo": echo, "temperature": 0.7, "seed": 1,
    }  # fmt: skip
    whole = await stand.client.completions.create(**request)
    stream = await stand.client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    texts = [""] * 4
    tokens: list[list[Any]] = [[] for _ in range(4)]
    offsets: list[list[int]] = [[] for _ in range(4)]
    usage: Any = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset
    assert usage.completion_tokens == whole.usage.completion_tokens
    await stand.idle()


async def test_leaving_the_queue_frees_pictures_and_grammars(directory: Path) -> None:
    """One place is taken; what waits for it holds a picture and a schema until its client goes."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }

    def held() -> int:
        gc.collect()
        kinds = (ImageInput, GrammarMask, ThoughtMask)
        return sum(type(one) in kinds for one in gc.get_objects())

    async with standing(
        directory, max_model_len=512, kv_cache_tokens=2048, max_sequences=1
    ) as stand:
        # The processes that read pictures and try grammars start now: while they did, the answer
        # that is to be waited for would end.
        await ask(stand, messages=LOOK, response_format=form, max_tokens=1)
        before = held()
        running = asyncio.create_task(
            ask(stand, max_tokens=400, extra_body={"ignore_eos": True, "min_tokens": 400})
        )
        waiting = [
            asyncio.create_task(ask(stand, messages=LOOK, response_format=form, n=2))
            for _ in range(2)
        ]
        async with asyncio.timeout(20):
            while stand.engine.stats().waiting < 4:
                await asyncio.sleep(0.005)
        assert held() >= before + 4
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        async with asyncio.timeout(5):
            while stand.engine.stats().waiting:
                await asyncio.sleep(0.005)
        assert stand.engine.stats().running == 1, "the one that runs goes on"
        # A cancelled task keeps its frames by its traceback.
        waiting.clear()
        del task
        # The engine's thread may be in a step that began before they went.
        async with asyncio.timeout(10):
            while held() > before:
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await stand.idle()
