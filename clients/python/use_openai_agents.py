"""openai-agents over chat and over Responses."""

import agents
import openai
from cases import (
    MODEL, PERSON_SCRIPT, PNG_URL, SAID, STREAM_SCRIPT, THOUGHT_SCRIPT, TOOLS_SCRIPT, V1, case,
    equal, main,
)
from openai.types.shared import Reasoning
from pydantic import BaseModel

agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)
KINDS = {
    "": agents.OpenAIChatCompletionsModel,
    "Responses: ": agents.OpenAIResponsesModel,
}


class Person(BaseModel):
    name: str
    age: int


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    equal(city, "Rome")
    return "sunny"


def _register(prefix, kind):
    def agent(name=MODEL, **options):
        return agents.Agent(name="a", model=kind(name, client), **options)

    @case(prefix + "tools")
    async def tools():
        told = await agents.Runner.run(agent(tools=[get_weather]), TOOLS_SCRIPT)
        equal(told.final_output, SAID)

    @case(prefix + "stream")
    async def stream():
        told = agents.Runner.run_streamed(agent(tools=[get_weather]), TOOLS_SCRIPT)
        async for _ in told.stream_events():
            pass
        equal(told.final_output, SAID)
        told = agents.Runner.run_streamed(agent(), STREAM_SCRIPT)
        async for _ in told.stream_events():
            pass
        equal(told.final_output, STREAM_SCRIPT[5:])

    @case(prefix + "structured")
    async def structured():
        told = await agents.Runner.run(agent(output_type=Person), PERSON_SCRIPT)
        equal(told.final_output, Person(name="Ada", age=36))

    @case(prefix + "image")
    async def image():
        parts = [
            {"type": "input_text", "text": "@say Red."},
            {"type": "input_image", "image_url": PNG_URL, "detail": "auto"},
        ]
        told = await agents.Runner.run(agent(), [{"role": "user", "content": parts}])
        equal(told.final_output, "Red.")

    @case(prefix + "error")
    async def error():
        try:
            await agents.Runner.run(agent("other"), "x")
        except openai.NotFoundError:
            return
        raise AssertionError("no error")

    @case(prefix + "thoughts over turns")
    async def thoughts():
        settings = agents.ModelSettings(reasoning=Reasoning(effort="high"))
        asked = THOUGHT_SCRIPT
        told = await agents.Runner.run(agent(model_settings=settings), asked)
        equal(told.final_output, "Four.")
        again = [*told.to_input_list(), {"role": "user", "content": "@say Yes."}]
        equal((await agents.Runner.run(agent(), again)).final_output, "Yes.")


for prefix, kind in KINDS.items():
    _register(prefix, kind)
main()
