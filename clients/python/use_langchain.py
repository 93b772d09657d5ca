"""langchain-openai (chat and Responses) and langchain-mistralai, with langgraph's agent loop."""

import os

from cases import (
    CALL, MODEL, PERSON_SCRIPT, PNG_URL, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT, TOOLS_SCRIPT, V1,
    case, equal, main,
)
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

KIND = os.environ["LANGCHAIN_KIND"]
if KIND == "mistralai":
    from langchain_mistralai import ChatMistralAI

    chat = ChatMistralAI(model=MODEL, endpoint=V1, api_key="none", max_retries=1)
    other = ChatMistralAI(model="other", endpoint=V1, api_key="none", max_retries=1)
else:
    from langchain_openai import ChatOpenAI

    options = {"base_url": V1, "api_key": "none", "max_retries": 0, "stream_usage": True}
    if KIND == "responses":
        options["use_responses_api"] = True
    chat = ChatOpenAI(model=MODEL, **options)
    other = ChatOpenAI(model="other", **options)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    equal(city, "Rome")
    return "sunny"


@case("tools")
def tools():
    agent = create_agent(chat, [get_weather])
    told = agent.invoke({"messages": [{"role": "user", "content": TOOLS_SCRIPT}]})
    equal(told["messages"][-1].text, SAID)


@case("tools, streamed")
def tools_streamed():
    whole = None
    for chunk in chat.bind_tools([get_weather]).stream(CALL):
        whole = chunk if whole is None else whole + chunk
    equal([(one["name"], one["args"]) for one in whole.tool_calls], [("get_weather", {"city": "Rome"})])
    agent = create_agent(chat, [get_weather])
    last = None
    for last in agent.stream({"messages": [{"role": "user", "content": TOOLS_SCRIPT}]}):
        pass
    equal(last["model"]["messages"][-1].text, SAID)


@case("tool_choice any")
def tool_any():
    answer = chat.bind_tools([get_weather], tool_choice="any").invoke(CALL)
    equal(answer.tool_calls[0]["args"], {"city": "Rome"})


@case("stream")
def stream():
    whole = None
    for chunk in chat.stream(STREAM_SCRIPT):
        whole = chunk if whole is None else whole + chunk
    equal(whole.text, STREAM_SCRIPT[5:])
    assert whole.usage_metadata["output_tokens"] > 5, whole.usage_metadata


@case("structured")
def structured():
    # The default of langchain-mistralai is a forced call, that of langchain-openai a schema.
    script = "@call Person " + PERSON_SCRIPT[5:] if KIND == "mistralai" else PERSON_SCRIPT
    equal(chat.with_structured_output(Person).invoke(script), Person(name="Ada", age=36))


@case("structured by json_schema")
def by_schema():
    made = chat.with_structured_output(Person, method="json_schema").invoke(PERSON_SCRIPT)
    equal(made, Person(name="Ada", age=36))


@case("image")
def image():
    parts = [
        {"type": "text", "text": "@say Red."},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    ]
    equal(chat.invoke([HumanMessage(content=parts)]).text, "Red.")


@case("error")
def error():
    try:
        other.invoke("x")
    except Exception as found:
        assert "404" in str(found) or "model" in str(found), found
    else:
        raise AssertionError("no error")


if KIND == "responses":

    @case("thoughts")
    def thoughts():
        answer = chat.bind(reasoning={"effort": "high"}).invoke(THOUGHT_SCRIPT)
        equal(answer.text, "Four.")
        assert any(block["type"] == "reasoning" for block in answer.content_blocks)


main()
