"""dspy with its chat and JSON adapters."""

import dspy
from cases import MODEL, PNG_URL, STREAM_SCRIPT, V1, case, equal, main



class Calling(dspy.LM):
    """A model that no catalogue knows: what it can do has to be stated."""

    supports_function_calling = True


OPTIONS = {"api_base": V1, "api_key": "none", "cache": False, "num_retries": 0}
lm = dspy.LM(f"openai/{MODEL}", **OPTIONS)
dspy.configure(lm=lm)

ANSWER = "@say [[ ## answer ## ]]\\nRome\\n\\n[[ ## completed ## ]]"


@case("structured")
def structured():
    with dspy.context(adapter=dspy.JSONAdapter()):
        made = dspy.Predict("question -> name, age: int")
        told = made(question='\n@say {"name":"Ada","age":36}\n')
    equal((told.name, told.age), ("Ada", 36))


@case("chat adapter")
def chat():
    told = dspy.Predict("question -> answer")(question=f"\n{ANSWER}\n")
    equal(told.answer, "Rome")


@case("tools")
def tools():
    def get_weather(city: str) -> str:
        equal(city, "Rome")
        return "sunny"

    class Ask(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        calls: dspy.ToolCalls = dspy.OutputField()

    adapter = dspy.ChatAdapter(use_native_function_calling=True)
    with dspy.context(lm=Calling(f"openai/{MODEL}", **OPTIONS), adapter=adapter):
        told = dspy.Predict(Ask)(
            question='\n@call get_weather {"city":"Rome"}\n', tools=[dspy.Tool(get_weather)]
        )
    equal([(call.name, call.args) for call in told.calls.tool_calls], [("get_weather", {"city": "Rome"})])


@case("stream")
async def stream():
    made = dspy.streamify(dspy.Predict("question -> answer"))
    last = None
    async for last in made(question=f"\n{ANSWER}\n"):
        pass
    equal(last.answer, "Rome")


@case("image")
def image():
    signature = dspy.Signature(
        {"picture": (dspy.Image, dspy.InputField()), "question": (str, dspy.InputField()),
         "answer": (str, dspy.OutputField())}
    )
    made = dspy.Predict(signature)
    equal(made(picture=dspy.Image(PNG_URL), question=f"\n{ANSWER}\n").answer, "Rome")


@case("error")
def error():
    try:
        dspy.LM("openai/other", **OPTIONS)("x")
    except Exception as found:
        assert "other" in str(found), found
    else:
        raise AssertionError("no error")


@case("n, plain call")
def plain():
    equal(len(lm("@say Hi.", n=2, temperature=0.7)), 2)


main()
