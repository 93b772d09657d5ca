"""pydantic-ai over its OpenAI, Responses, Mistral or Anthropic model."""

import os
import warnings

from cases import (
    BASE, MODEL, PERSON, PERSON_SCRIPT, PNG, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT, TOOLS_SCRIPT,
    V1, case, equal, main,
)
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError

warnings.simplefilter("ignore")
KIND = os.environ["PYDANTIC_AI_KIND"]


def model(name=MODEL):
    if KIND == "mistral":
        from pydantic_ai.models.mistral import MistralModel
        from pydantic_ai.providers.mistral import MistralProvider

        return MistralModel(name, provider=MistralProvider(api_key="none", base_url=BASE))
    if KIND == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel(name, provider=AnthropicProvider(api_key="none", base_url=BASE))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind = OpenAIChatModel if KIND == "chat" else OpenAIResponsesModel
    return kind(name, provider=OpenAIProvider(api_key="none", base_url=V1))


class Person(BaseModel):
    name: str
    age: int


def agent():
    made = Agent(model())

    @made.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        equal(city, "Rome")
        return "sunny"

    return made


@case("tools")
async def tools():
    equal((await agent().run(TOOLS_SCRIPT)).output, SAID)


@case("tools, streamed")
async def tools_streamed():
    async with agent().run_stream(TOOLS_SCRIPT) as told:
        equal(await told.get_output(), SAID)


@case("stream")
async def stream():
    async with Agent(model()).run_stream(STREAM_SCRIPT) as told:
        text = "".join([piece async for piece in told.stream_text(delta=True)])
    equal(text, STREAM_SCRIPT[5:])


@case("structured")
async def structured():
    made = Agent(model(), output_type=ToolOutput(Person, name="person"))
    equal((await made.run("@call person " + PERSON)).output, Person(name="Ada", age=36))


# Its other two models refuse that by themselves, going by the model's name.
if KIND in ("chat", "responses"):

    @case("structured by schema")
    async def by_schema():
        made = Agent(model(), output_type=NativeOutput(Person))
        equal((await made.run(PERSON_SCRIPT)).output, Person(name="Ada", age=36))


@case("image")
async def image():
    picture = BinaryContent(data=PNG, media_type="image/png")
    equal((await Agent(model()).run(["@say Red.", picture])).output, "Red.")


@case("error")
async def error():
    try:
        await Agent(model("other")).run("x")
    except ModelHTTPError as found:
        equal(found.status_code, 404)
    else:
        raise AssertionError("no error")


@case("seed" if KIND == "mistral" else "thoughts")
async def thoughts():
    settings = {"openai_reasoning_effort": "high"}
    script = THOUGHT_SCRIPT
    if KIND == "anthropic":
        settings = {"anthropic_thinking": {"type": "enabled", "budget_tokens": 1024}}
    elif KIND == "mistral":
        settings, script = {"seed": 3}, "@say Four."
    told = await Agent(model(), model_settings=settings).run(script)
    equal(told.output, "Four.")
    if KIND != "mistral":
        assert any(part.part_kind == "thinking" for part in told.new_messages()[-1].parts)
        again = await Agent(model()).run("@say Yes.", message_history=told.all_messages())
        equal(again.output, "Yes.")


main()
