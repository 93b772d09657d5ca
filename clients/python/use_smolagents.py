"""smolagents' OpenAI model: agents that call tools and that write code."""

from cases import (
    MODEL, PERSON, PERSON_SCHEMA, PNG_URL, SAID, STREAM_SCRIPT, V1, case, equal, main,
)
from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(MODEL, api_base=V1, api_key="none")


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Which city.
    """
    equal(city, "Rome")
    return "sunny"


SCRIPT = f'@call get_weather {{"city":"Rome"}}\n@call final_answer {{"answer":"{SAID}"}}'


@case("tools")
def tools():
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=4, verbosity_level=0)
    equal(agent.run(SCRIPT), SAID)


@case("tools, streamed")
def tools_streamed():
    agent = ToolCallingAgent(
        tools=[get_weather], model=model, max_steps=4, stream_outputs=True, verbosity_level=0
    )
    equal(agent.run(SCRIPT), SAID)


@case("code")
def code():
    agent = CodeAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
    equal(agent.run('@say <code>final_answer(get_weather("Rome"))</code>'), "sunny")


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@case("stream")
def stream():
    text = "".join(
        piece.content or ""
        for piece in model.generate_stream(user({"type": "text", "text": STREAM_SCRIPT}))
    )
    equal(text, STREAM_SCRIPT[5:])


@case("structured")
def structured():
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON_SCHEMA}}
    asked = user({"type": "text", "text": "@say " + PERSON})
    equal(model.generate(asked, response_format=form).content, PERSON)


@case("image")
def image():
    parts = user(
        {"type": "text", "text": "@say Red."},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    )
    equal(model.generate(parts).content, "Red.")


@case("error")
def error():
    try:
        OpenAIServerModel("other", api_base=V1, api_key="none").generate(
            user({"type": "text", "text": "x"})
        )
    except Exception as found:
        assert "404" in str(found), found
    else:
        raise AssertionError("no error")


main()
