"""The server over the real engine, on small random models: wire, chat, engine, kernels, blocks."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch

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
    streamed_text,
    write_model,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
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
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


@pytest.fixture
async def stand(directory: Path) -> AsyncIterator[Stand]:
    async with standing(
        directory, max_model_len=512, kv_cache_tokens=4096, max_sequences=16
    ) as stand:
        yield stand


async def test_streamed_equals_whole_and_the_prefix_is_found_again(stand: Stand) -> None:
    messages = [{"role": "user", "content": "Hello " * 40}]
    first = await ask(stand, messages=messages)
    text = first.choices[0].message.content
    assert text and first.usage.prompt_tokens_details.cached_tokens == 0
    assert await streamed_text(stand, messages=messages) == text
    again = await ask(stand, messages=messages)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens >= 128
    await stand.idle()


async def test_sixteen_at_once_answer_as_alone(stand: Stand) -> None:
    def options(i: int) -> dict[str, Any]:
        content = f"Question {i} " * (i + 1)
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 8 + i}

    alone = [await streamed_text(stand, **options(i)) for i in range(16)]
    together = await asyncio.gather(*(streamed_text(stand, **options(i)) for i in range(16)))
    assert together == alone
    await stand.idle()


async def test_a_seed_repeats_and_choices_differ(stand: Stand) -> None:
    options = {"temperature": 1.0, "seed": 5, "n": 3}
    one, two = await asyncio.gather(ask(stand, **options), ask(stand, **options))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 3


async def test_bias_and_stop_reach_the_sampler(stand: Stand) -> None:
    x = stand.chat.vocabulary.encode_text("x")[0]
    biased = await ask(stand, logit_bias={str(x): 100}, max_tokens=5)
    assert biased.choices[0].message.content == "xxxxx"
    stopped = await ask(stand, logit_bias={str(x): 100}, stop="xx")
    assert stopped.choices[0].message.content == "" and stopped.usage.completion_tokens == 2
    await stand.idle()


async def test_logprobs_are_of_the_chosen_tokens(stand: Stand) -> None:
    answer = await ask(stand, logprobs=True, top_logprobs=5, max_tokens=6)
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 5
        # Greedy: nothing is likelier, unless it was banned (a control token).
        text = [a for a in entry.top_logprobs if not a.token.startswith(("<SPECIAL", "["))]
        assert entry.logprob >= max([a.logprob for a in text], default=-99.0) - 1e-6


async def test_echo_scores_as_generation_did(stand: Stand) -> None:
    """Text generated with log-probs and then scored as a prompt: the figures agree."""
    request = {"model": "tiny", "temperature": 0, "logprobs": 0}
    # Log-probs are the model's own; the bias only keeps the answer to letters, one token each.
    letters = {character: 64 + ord(character) for character in "abcdefgh"}
    bias = {str(token_id): 50 for token_id in letters.values()}
    made = await stand.client.completions.create(
        **request, prompt="Hello", max_tokens=8, logit_bias=bias
    )
    ids = [1, *stand.chat.vocabulary.encode_text("Hello")]
    answer_ids = [letters[character] for character in made.choices[0].text]
    scored = await stand.client.completions.create(
        **request, prompt=[*ids, *answer_ids], echo=True, max_tokens=0
    )
    logprobs = scored.choices[0].logprobs.token_logprobs[len(ids) :]
    assert logprobs == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=0.05)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "b"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


async def test_even_a_random_model_writes_valid_json(stand: Stand) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }
    options = {"response_format": form, "max_tokens": 400, "temperature": 1.0}
    answers = await asyncio.gather(*(ask(stand, **options, seed=seed) for seed in range(8)))
    num_whole = 0
    for answer in answers:
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            num_whole += 1
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert num_whole >= 4
    await stand.idle()


async def test_choice_and_regex(stand: Stand) -> None:
    form: dict[str, Any] = {"type": "choice", "choices": ["Yes", "No"]}
    choice = await ask(stand, extra_body={"response_format": form})
    assert choice.choices[0].message.content in ("Yes", "No")
    form = {"type": "regex", "regex": "[0-9]{3}-[a-f]{2}"}
    text = (await ask(stand, extra_body={"response_format": form})).choices[0].message.content
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text)


async def test_grammar_that_gives_up_is_an_error_not_an_answer(stand: Stand) -> None:
    """Nine tenths of an answer with reason "stop" would pass for a whole one."""
    form = {"type": "grammar", "grammar": 'start: a\na: a a | "x" | a a a\n'}
    options = {"extra_body": {"response_format": form}, "max_tokens": 300}
    stand.script.ids = [64 + ord("x")] * 300
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(stand, **options)
    assert caught.value.code == "grammar_failed" and "items" in caught.value.message
    with pytest.raises(openai.APIError, match="could not be held"):
        await streamed_text(stand, **options)
    stand.script.ids = [*stand.script.ids[:20], EOS]
    assert (await ask(stand, **options)).choices[0].message.content == "x" * 20
    await stand.idle()


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
async def test_even_a_random_model_calls_a_tool_when_it_must(stand: Stand, choice: Any) -> None:
    answer = await ask(
        stand, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=200
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and answer.choices[0].finish_reason == "tool_calls"
    parameters: Any = WEATHER["function"]["parameters"]  # type: ignore[index]
    jsonschema.validate(json.loads(call.function.arguments), parameters)


async def test_forced_thought_text_and_calls_pass_the_whole_pipe(stand: Stand) -> None:
    stand.force(
        THINK, "two é", END_THINK, "See.", CALLS, "get_weather", ARGS, '{"city": "Rome"}',
        CALLS, "get_weather", ARGS, '{"city": "Bari"}', EOS,
    )  # fmt: skip
    options = {"tools": [WEATHER], "reasoning_effort": "high", "max_tokens": 200}
    message = (await ask(stand, **options)).choices[0].message
    assert message.reasoning_content == message.reasoning == "two é"
    assert message.content == "See."
    arguments = [call.function.arguments for call in message.tool_calls]
    assert arguments == ['{"city": "Rome"}', '{"city": "Bari"}']
    # The answer goes back as it came, with results, and the next turn runs.
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "21"} for call in message.tool_calls
    ]
    stand.force("Warm.", EOS)
    turns = [*HELLO, message.model_dump(exclude_none=True), *results]
    after = await ask(stand, messages=turns, tools=[WEATHER])
    assert after.choices[0].message.content == "Warm."
    await stand.idle()


CALL: tuple[str | int, ...] = (CALLS, "get_weather", ARGS, '{"city": "Rome"}')


async def test_deltas_have_the_shape_that_clients_build_on(stand: Stand) -> None:
    """The first delta of a call says all but its arguments, later ones only arguments."""
    stand.force(
        THINK, "hm", END_THINK, "See.", *CALL, CALLS, "get_weather", ARGS, '{"city":""}', EOS
    )
    body = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [WEATHER],
        "reasoning_effort": "high",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = (await stand.http.post("/v1/chat/completions", json=body)).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and all(c["usage"] is None for c in chunks[:-1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert reasons == [None] * (len(deltas) - 1) + ["tool_calls"]
    thoughts = [delta for delta in deltas if "reasoning" in delta]
    assert thoughts and all(set(d) == {"reasoning", "reasoning_content"} for d in thoughts)
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in thoughts)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    firsts = [call for call in calls if "id" in call]
    assert [call["index"] for call in firsts] == [0, 1]
    for call in firsts:
        assert set(call) == {"index", "id", "type", "function"} and call["type"] == "function"
        assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])
        assert call["function"] == {"name": "get_weather", "arguments": ""}
    assert firsts[0]["id"] != firsts[1]["id"]
    for call in calls:
        if call not in firsts:
            assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
    # Thought, text, calls, in this order and not mixed.
    kinds = [next(iter(sorted(delta)), "") for delta in deltas[1:-1]]
    assert sorted(kinds, key=["reasoning", "content", "tool_calls"].index) == kinds


async def test_one_call_at_most_if_the_client_says_so(stand: Stand) -> None:
    stand.force(*CALL, *CALL, EOS)
    answer = await ask(stand, tools=[WEATHER], parallel_tool_calls=False, max_tokens=100)
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    answer = await ask(stand, tools=[WEATHER], max_tokens=100)
    assert len(answer.choices[0].message.tool_calls) == 2


async def test_no_call_without_leave_and_none_against_its_schema(stand: Stand) -> None:
    stand.force(*CALL, EOS)
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = await ask(stand, **options)
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason in ("stop", "length")
    # Whatever the model wants to write - another name, other arguments - the call is valid.
    stand.force(CALLS, "rm_rf", ARGS, '{"town": [1, 2]}', EOS)
    free: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": False, "temperature": 1}
    answers = await asyncio.gather(
        *(ask(stand, **free, max_tokens=300, seed=seed) for seed in range(4))
    )
    whole = [answer for answer in answers if answer.choices[0].finish_reason == "tool_calls"]
    assert whole
    for answer in whole:
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        parameters: Any = WEATHER["function"]["parameters"]  # type: ignore[index]
        jsonschema.validate(json.loads(call.function.arguments), parameters)


async def test_calls_cut_by_length_say_length_and_keep_what_was_said(stand: Stand) -> None:
    stand.force(*CALL, EOS)
    num_name = len(stand.chat.vocabulary.encode_text("get_weather"))
    cut = await ask(stand, tools=[WEATHER], max_tokens=1 + num_name + 1 + 3)
    (call,) = cut.choices[0].message.tool_calls
    assert '{"city": "Rome"}'.startswith(call.function.arguments) and call.function.arguments
    assert cut.choices[0].finish_reason == "length"
    # A name alone is no call: it reaches the client as text.
    cut = await ask(stand, tools=[WEATHER], max_tokens=2)
    assert cut.choices[0].message.tool_calls is None
    assert cut.choices[0].message.content.startswith("[TOOL_CALLS]")
    assert cut.choices[0].finish_reason == "length"


async def test_required_call_comes_after_the_thought_and_its_budget(stand: Stand) -> None:
    stand.force(THINK, "a" * 40)
    answer = await ask(
        stand,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning_effort="high",
        max_tokens=200,
        extra_body={"max_reasoning_tokens": 5},
    )
    message = answer.choices[0].message
    assert message.reasoning == "a" * 5 and message.content is None
    assert len(message.tool_calls) == 1 and answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 7


async def test_thought_that_never_ends_is_cut_with_its_text(stand: Stand) -> None:
    stand.force(THINK, "b" * 100)
    answer = await ask(stand, reasoning_effort="high", max_tokens=20, stop="bb")
    assert answer.choices[0].message.reasoning == "b" * 19
    assert not answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.completion_tokens_details.reasoning_tokens == 20


async def test_grammar_ends_an_answer_whatever_its_least_length(stand: Stand) -> None:
    form = {"type": "choice", "choices": ["Yes", "No"]}
    for more in ({"min_tokens": 20}, {"ignore_eos": True}):
        answer = await ask(stand, extra_body={"response_format": form, **more})
        assert answer.choices[0].message.content in ("Yes", "No")
        assert answer.choices[0].finish_reason == "stop"


async def test_schemas_survive_preemption(directory: Path) -> None:
    """A cache too small for all of them: answers are thrown out and computed again, masks stay."""
    form = {"type": "regex", "regex": "([0-9]{4}-){20}[0-9]{4}"}
    messages = [{"role": "user", "content": "word " * 20}]
    async with standing(
        directory,
        max_model_len=256,
        kv_cache_tokens=512,
        max_sequences=8,
        block_tokens=8,
        # The clock is not to decide how many run at once.
        target_gap_ms="none",
    ) as stand:
        answers = await asyncio.gather(*(
            ask(
                stand,
                messages=messages,
                max_tokens=150,
                temperature=1.0,
                seed=seed,
                extra_body={"response_format": form},
            )
            for seed in range(8)
        ))  # fmt: skip
        assert stand.engine.stats().preemptions > 0
        for answer in answers:
            assert re.fullmatch("([0-9]{4}-){20}[0-9]{4}", answer.choices[0].message.content)
        assert len({answer.choices[0].message.content for answer in answers}) == 8
        await stand.idle()


async def test_effort_none_leaves_no_way_into_a_thought(stand: Stand) -> None:
    stand.force(THINK, "x", END_THINK, "y", EOS)
    message = (await ask(stand, reasoning_effort="none", max_tokens=30)).choices[0].message
    assert getattr(message, "reasoning_content", None) is None


async def test_schema_begins_after_the_thought(stand: Stand) -> None:
    stand.force(THINK, "not json", END_THINK)
    form = {"type": "choice", "choices": ["Yes", "No"]}
    answer = await ask(stand, reasoning_effort="high", extra_body={"response_format": form})
    assert answer.choices[0].message.reasoning_content == "not json"
    assert answer.choices[0].message.content in ("Yes", "No")


async def test_budget_closes_the_thought(stand: Stand) -> None:
    stand.force(THINK, "a" * 50)
    answer = await ask(
        stand, reasoning_effort="high", max_tokens=40, extra_body={"max_reasoning_tokens": 10}
    )
    assert answer.choices[0].message.reasoning_content == "a" * 10
    assert answer.usage.completion_tokens_details.reasoning_tokens == 12
    assert answer.choices[0].message.content


async def test_prompt_over_the_context_is_400_and_the_next_request_works(stand: Stand) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(stand, messages=[{"role": "user", "content": "1" * 600}])
    assert caught.value.code == "context_length_exceeded"
    assert (await ask(stand)).choices[0].message.content
    await stand.idle()


async def test_leaving_frees_blocks_at_every_stage(stand: Stand) -> None:
    """Cancelled while queued, prefilling and generating, one choice and several."""
    long = [{"role": "user", "content": "word " * 150}]
    for delay_s in (0.0, 0.01, 0.05, 0.15):
        tasks = [
            asyncio.create_task(ask(stand, messages=long, max_tokens=200, n=n))
            for n in (1, 2, 1, 3)
        ]
        await asyncio.sleep(delay_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stand.idle()
    health = (await stand.http.get("/health")).json()
    assert health["status"] == "ok" and health["engine"]["running"] == 0


async def test_death_of_the_engine_is_503_and_a_restart_not_a_hang(stand: Stand) -> None:
    stand.script.dies = True
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(stand)
    assert caught.value.status_code == 503
    assert (await stand.http.get("/ready")).status_code == 503
    assert (await stand.http.get("/health")).json()["ready"] is False
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(stand)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    stand.script.dies = False
    async with asyncio.timeout(20):
        while (await stand.http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)
    assert (await ask(stand)).choices[0].message.content
    assert (await stand.http.get("/health")).json()["engine_restarts"] == 1
