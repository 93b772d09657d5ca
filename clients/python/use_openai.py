"""The openai client: chat and Responses."""

import json

import openai
from cases import (
    CALL, MODEL, PERSON_SCRIPT, PNG_URL, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT, TOOLS_SCRIPT, V1,
    WEATHER, WEATHER_SCHEMA, case, equal, main,
)
from pydantic import BaseModel

client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)


class Person(BaseModel):
    name: str
    age: int


def loop(**options):
    messages = [{"role": "user", "content": TOOLS_SCRIPT}]
    for _ in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[WEATHER], **options
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            equal(json.loads(call.function.arguments), {"city": "Rome"})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    return None


@case("tools")
def tools():
    equal(loop(), SAID)


@case("tools, streamed")
def tools_streamed():
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": CALL}], tools=[WEATHER]
    ) as stream:
        answer = stream.get_final_completion()
    equal(answer.choices[0].message.tool_calls[0].function.arguments, '{"city":"Rome"}')


@case("stream")
def stream():
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": STREAM_SCRIPT}], stream=True,
        stream_options={"include_usage": True},
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    equal(text, STREAM_SCRIPT[5:])
    assert usage.completion_tokens > 5


@case("structured")
def structured():
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": PERSON_SCRIPT}], response_format=Person
    )
    equal(answer.choices[0].message.parsed, Person(name="Ada", age=36))


@case("image")
def image():
    parts = [
        {"type": "text", "text": "@say Red."},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}]
    )
    equal(answer.choices[0].message.content, "Red.")
    assert answer.usage.prompt_tokens_details.image_tokens > 0


@case("error")
def error():
    try:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    except openai.NotFoundError as found:
        equal(found.code, "model_not_found")
    else:
        raise AssertionError("no error")


@case("thoughts")
def thoughts():
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": THOUGHT_SCRIPT}], reasoning_effort="high"
    )
    equal(answer.choices[0].message.reasoning_content, "Let me see.")
    equal(answer.choices[0].message.content, "Four.")


@case("Responses: tools")
def responses_tools():
    items = [{"role": "user", "content": TOOLS_SCRIPT}]
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
    answer = client.responses.create(model=MODEL, input=items, tools=[tool])
    items += answer.output
    for item in answer.output:
        if item.type == "function_call":
            items.append(
                {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
            )
    equal(client.responses.create(model=MODEL, input=items, tools=[tool]).output_text, SAID)


@case("Responses: stream, structured")
def responses_stream():
    with client.responses.stream(model=MODEL, input=PERSON_SCRIPT, text_format=Person) as stream:
        for _ in stream:
            pass
        equal(stream.get_final_response().output_parsed, Person(name="Ada", age=36))


@case("models, completions")
def others():
    equal([model.id for model in client.models.list()], [MODEL])
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).usage.prompt_tokens


main()
