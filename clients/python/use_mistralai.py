"""mistralai: the client of Mistral's own API."""

import json

from cases import (
    BASE, CALL, MODEL, PERSON_SCRIPT, PNG_URL, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT, TOOLS_SCRIPT,
    WEATHER, case, equal, main,
)
from mistralai.client import Mistral
from pydantic import BaseModel

client = Mistral(api_key="none", server_url=BASE)


class Person(BaseModel):
    name: str
    age: int


def user(text):
    return [{"role": "user", "content": text}]


@case("tools")
def tools():
    messages = user(TOOLS_SCRIPT)
    message = client.chat.complete(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="auto"
    ).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        messages.append(
            {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"}
        )
    answer = client.chat.complete(model=MODEL, messages=messages, tools=[WEATHER])
    equal(answer.choices[0].message.content, SAID)


@case("tools, streamed")
def tools_streamed():
    calls, usage = [], None
    for event in client.chat.stream(model=MODEL, messages=user(CALL), tools=[WEATHER]):
        calls += event.data.choices[0].delta.tool_calls or []
        usage = event.data.usage or usage
    equal([call.function.name for call in calls], ["get_weather"])
    equal(json.loads(calls[0].function.arguments), {"city": "Rome"})
    assert usage.completion_tokens > 5


@case("tool_choice any, random_seed, safe_prompt")
def names():
    answer = client.chat.complete(
        model=MODEL, messages=user(CALL), tools=[WEATHER], tool_choice="any", random_seed=3,
        safe_prompt=False,
    )
    equal(answer.choices[0].message.tool_calls[0].function.name, "get_weather")


@case("stream")
def stream():
    text = ""
    for event in client.chat.stream(model=MODEL, messages=user(STREAM_SCRIPT)):
        text += event.data.choices[0].delta.content or ""
    equal(text, STREAM_SCRIPT[5:])


@case("structured")
def structured():
    answer = client.chat.parse(Person, model=MODEL, messages=user(PERSON_SCRIPT))
    equal(answer.choices[0].message.parsed, Person(name="Ada", age=36))


@case("image")
def image():
    parts = [{"type": "text", "text": "@say Red."}, {"type": "image_url", "image_url": PNG_URL}]
    answer = client.chat.complete(model=MODEL, messages=user(parts))
    equal(answer.choices[0].message.content, "Red.")


@case("error")
def error():
    from mistralai.client import errors

    try:
        client.chat.complete(model="other", messages=user("x"))
    except errors.SDKError as found:
        equal(found.status_code, 404)
    else:
        raise AssertionError("no error")


@case("thoughts, and back in the history")
def thoughts():
    messages = user(THOUGHT_SCRIPT)
    message = client.chat.complete(
        model=MODEL, messages=messages, reasoning_effort="high"
    ).choices[0].message
    kinds = [part.type for part in message.content]
    equal(kinds, ["thinking", "text"])
    messages += [message, *user("@say Yes.")]
    equal(client.chat.complete(model=MODEL, messages=messages).choices[0].message.content, "Yes.")
    kinds = set()
    for event in client.chat.stream(
        model=MODEL, messages=user(THOUGHT_SCRIPT), prompt_mode="reasoning"
    ):
        content = event.data.choices[0].delta.content
        if isinstance(content, list):
            kinds |= {part.type for part in content}
    assert "thinking" in kinds


@case("models")
def models():
    equal([model.id for model in client.models.list().data], [MODEL])
    equal(client.models.retrieve(model_id=MODEL).id, MODEL)


main()
