"""llama-index's OpenAILike."""

from cases import (
    MODEL, PERSON, PNG, SAID, STREAM_SCRIPT, TOOLS_SCRIPT, V1, case, equal, main,
)
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def made(name=MODEL, **options):
    options = {"is_chat_model": True, "is_function_calling_model": True, **options}
    return OpenAILike(model=name, api_base=V1, api_key="none", max_retries=0, **options)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    equal(city, "Rome")
    return "sunny"


@case("tools")
async def tools():
    agent = FunctionAgent(tools=[get_weather], llm=made())
    equal(str(await agent.run(TOOLS_SCRIPT)), SAID)


@case("stream")
def stream():
    pieces = made().stream_chat([ChatMessage(role="user", content=STREAM_SCRIPT)])
    equal("".join(piece.delta or "" for piece in pieces), STREAM_SCRIPT[5:])


@case("structured")
def structured():
    llm = made().as_structured_llm(Person)
    answer = llm.chat([ChatMessage(role="user", content="@call Person " + PERSON)])
    equal(answer.raw, Person(name="Ada", age=36))


@case("structured by schema")
def by_schema():
    llm = made(should_use_structured_outputs=True).as_structured_llm(Person)
    answer = llm.chat([ChatMessage(role="user", content="@say " + PERSON)])
    equal(answer.raw, Person(name="Ada", age=36))


@case("image")
def image():
    blocks = [TextBlock(text="@say Red."), ImageBlock(image=PNG, image_mimetype="image/png")]
    answer = made().chat([ChatMessage(role="user", blocks=blocks)])
    equal(answer.message.content, "Red.")


@case("error")
def error():
    try:
        made("other").chat([ChatMessage(role="user", content="x")])
    except Exception as found:
        assert "404" in str(found), found
    else:
        raise AssertionError("no error")


main()
