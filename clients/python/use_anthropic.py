"""The anthropic client over /v1/messages."""

import anthropic
from cases import (
    BASE, CALL, MODEL, PERSON_SCRIPT, PNG_BASE64, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT,
    TOOLS_SCRIPT, WEATHER_SCHEMA, case, equal, main,
)
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=BASE, api_key="none", max_retries=0)
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER_SCHEMA}


class Person(BaseModel):
    name: str
    age: int


def ask(messages, **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return client.messages.create(model=MODEL, max_tokens=500, messages=messages, **options)


@case("tools")
def tools():
    messages = [{"role": "user", "content": TOOLS_SCRIPT}]
    answer = ask(messages, tools=[TOOL])
    equal(answer.stop_reason, "tool_use")
    messages.append({"role": "assistant", "content": answer.content})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        for block in answer.content
        if block.type == "tool_use"
    ]
    messages.append({"role": "user", "content": results})
    equal(ask(messages, tools=[TOOL]).content[0].text, SAID)


@case("tools, streamed")
def tools_streamed():
    with client.messages.stream(
        model=MODEL, max_tokens=500, tools=[TOOL], messages=[{"role": "user", "content": CALL}],
        tool_choice={"type": "any"},
    ) as stream:
        message = stream.get_final_message()
    equal(message.content[0].input, {"city": "Rome"})


@case("stream")
def stream():
    with client.messages.stream(
        model=MODEL, max_tokens=500, messages=[{"role": "user", "content": STREAM_SCRIPT}]
    ) as stream:
        equal("".join(stream.text_stream), STREAM_SCRIPT[5:])
        assert stream.get_final_message().usage.output_tokens > 5


@case("structured")
def structured():
    answer = client.messages.parse(
        model=MODEL, max_tokens=500, messages=[{"role": "user", "content": PERSON_SCRIPT}],
        output_format=Person,
    )
    equal(answer.parsed_output, Person(name="Ada", age=36))


@case("image")
def image():
    source = {"type": "base64", "media_type": "image/png", "data": PNG_BASE64}
    parts = [{"type": "text", "text": "@say Red."}, {"type": "image", "source": source}]
    equal(ask([{"role": "user", "content": parts}]).content[0].text, "Red.")


@case("error")
def error():
    try:
        client.messages.create(
            model="other", max_tokens=5, messages=[{"role": "user", "content": "x"}]
        )
    except anthropic.NotFoundError as found:
        equal(found.body["error"]["type"], "not_found_error")
    else:
        raise AssertionError("no error")


@case("thoughts, and back in the history")
def thoughts():
    thinking = {"type": "enabled", "budget_tokens": 1024}
    messages = [{"role": "user", "content": THOUGHT_SCRIPT}]
    answer = client.messages.create(
        model=MODEL, max_tokens=2000, messages=messages, thinking=thinking
    )
    equal([block.type for block in answer.content], ["thinking", "text"])
    messages += [{"role": "assistant", "content": answer.content}]
    messages += [{"role": "user", "content": "@say Yes."}]
    equal(ask(messages).content[-1].text, "Yes.")


@case("beta messages, token count, models")
def others():
    answer = client.beta.messages.create(
        model=MODEL, max_tokens=50, messages=[{"role": "user", "content": "@say Hi."}],
        betas=["context-management-2025-06-27"], context_management={"edits": []},
    )
    equal(answer.content[0].text, "Hi.")
    count = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert count.input_tokens > 0
    equal([model.id for model in client.models.list()], [MODEL])


main()
