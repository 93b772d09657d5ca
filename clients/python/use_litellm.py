"""litellm in one of its spellings: openai/, hosted_vllm/, mistral/."""

import json
import os

import litellm
from cases import (
    MODEL, PERSON, PERSON_SCHEMA, PERSON_SCRIPT, PNG_URL, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT,
    TOOLS_SCRIPT, V1, WEATHER, CALL, case, equal, main,
)

PREFIX = os.environ["LITELLM_PREFIX"]
litellm.telemetry = False


def ask(messages, model=MODEL, **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return litellm.completion(
        model=f"{PREFIX}/{model}", api_base=V1, api_key="none", num_retries=0, messages=messages,
        **options,
    )


@case("tools")
def tools():
    messages = [{"role": "user", "content": TOOLS_SCRIPT}]
    message = ask(messages, tools=[WEATHER]).choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        equal(json.loads(call.function.arguments), {"city": "Rome"})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    equal(ask(messages, tools=[WEATHER]).choices[0].message.content, SAID)


@case("tools, streamed")
def tools_streamed():
    chunks = list(ask(CALL, tools=[WEATHER], stream=True))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    equal((call.function.name, call.function.arguments), ("get_weather", '{"city":"Rome"}'))


@case("tool_choice required, seed")
def required():
    answer = ask(CALL, tools=[WEATHER], tool_choice="required", seed=7)
    equal(answer.choices[0].message.tool_calls[0].function.name, "get_weather")


@case("stream")
def stream():
    chunks = list(ask(STREAM_SCRIPT, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    equal(whole.choices[0].message.content, STREAM_SCRIPT[5:])
    assert whole.usage.completion_tokens > 5


@case("structured")
def structured():
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON_SCHEMA}}
    answer = ask(PERSON_SCRIPT, response_format=form)
    equal(answer.choices[0].message.content, PERSON)


@case("image")
def image():
    parts = [
        {"type": "text", "text": "@say Red."},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    ]
    equal(ask([{"role": "user", "content": parts}]).choices[0].message.content, "Red.")


@case("error")
def error():
    try:
        ask("x", model="other")
    except litellm.NotFoundError:
        return
    raise AssertionError("no error")


@case("thoughts")
def thoughts():
    extra = {"reasoning_effort": "high", "allowed_openai_params": ["reasoning_effort"]}
    message = ask(THOUGHT_SCRIPT, **extra).choices[0].message
    equal(message.reasoning_content, "Let me see.")
    equal(message.content, "Four.")


main()
