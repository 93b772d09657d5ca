"""instructor in every mode that this server can serve."""

import instructor
import openai
from cases import MODEL, PERSON, PNG_URL, V1, case, equal, main
from pydantic import BaseModel

raw = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)


class Person(BaseModel):
    name: str
    age: int


ADA = {"name": "Ada", "age": 36}
CALL, SAY = "@call Person " + PERSON, "@say " + PERSON
FENCED = "@say ```json" + PERSON + "```"


def made(mode, script, client=raw, **options):
    asker = instructor.from_openai(client, mode=mode)
    return asker.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": script}], response_model=Person,
        max_retries=0, **options,
    )


SCRIPTS = {
    "TOOLS": CALL, "TOOLS_STRICT": CALL, "JSON": SAY, "JSON_SCHEMA": SAY, "MD_JSON": FENCED,
    "JSON_O1": SAY, "FUNCTIONS": None, "RESPONSES_TOOLS": CALL,
    "RESPONSES_TOOLS_WITH_INBUILT_TOOLS": CALL,
}


def _register(name, script):
    @case("structured" if name == "TOOLS" else name)
    def one():
        equal(made(instructor.Mode[name], script).model_dump(), ADA)


for name, script in SCRIPTS.items():
    if script is not None and hasattr(instructor.Mode, name):
        _register(name, script)


@case("PARALLEL_TOOLS")
def parallel():
    from collections.abc import Iterable

    asker = instructor.from_openai(raw, mode=instructor.Mode.PARALLEL_TOOLS)
    people = asker.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": f"{CALL} ;; {CALL}"}],
        response_model=Iterable[Person], max_retries=0,
    )
    equal([one.model_dump() for one in people], [ADA, ADA])


@case("ANTHROPIC_PARALLEL_TOOLS")
def anthropic_parallel():
    from collections.abc import Iterable

    import anthropic
    from cases import BASE

    asker = instructor.from_anthropic(
        anthropic.Anthropic(base_url=BASE, api_key="none", max_retries=0),
        mode=instructor.Mode.ANTHROPIC_PARALLEL_TOOLS,
    )
    people = asker.messages.create(
        model=MODEL, max_tokens=2000, max_retries=0, response_model=Iterable[Person],
        messages=[{"role": "user", "content": f"{CALL} ;; {CALL}"}],
    )
    equal([one.model_dump() for one in people], [ADA, ADA])


@case("MISTRAL_TOOLS, MISTRAL_STRUCTURED_OUTPUTS")
def mistral():
    from cases import BASE
    from mistralai import Mistral

    for mode, script in (("MISTRAL_TOOLS", CALL), ("MISTRAL_STRUCTURED_OUTPUTS", SAY)):
        asker = instructor.from_mistral(
            Mistral(api_key="none", server_url=BASE), mode=instructor.Mode[mode]
        )
        found = asker.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": script}], response_model=Person,
            max_retries=0,
        )
        equal(found.model_dump(), ADA)


def _register_anthropic(name, script):
    @case(name)
    def one():
        import anthropic
        from cases import BASE

        asker = instructor.from_anthropic(
            anthropic.Anthropic(base_url=BASE, api_key="none", max_retries=0),
            mode=instructor.Mode[name],
        )
        found = asker.messages.create(
            model=MODEL, max_tokens=2000, messages=[{"role": "user", "content": script}],
            response_model=Person, max_retries=0,
        )
        equal(found.model_dump(), ADA)


for name, script in (
    ("ANTHROPIC_TOOLS", CALL), ("ANTHROPIC_JSON", SAY), ("ANTHROPIC_REASONING_TOOLS", CALL),
):
    if hasattr(instructor.Mode, name):
        _register_anthropic(name, script)


@case("stream")
def stream():
    asker = instructor.from_openai(raw, mode=instructor.Mode.TOOLS)
    last = None
    for last in asker.chat.completions.create_partial(
        model=MODEL, response_model=Person,
        messages=[{"role": "user", "content": "@call PartialPerson " + PERSON}],
    ):
        pass
    equal((last.name, last.age), ("Ada", 36))


@case("image")
def image():
    asker = instructor.from_openai(raw, mode=instructor.Mode.JSON_SCHEMA)
    found = asker.chat.completions.create(
        model=MODEL, response_model=Person, max_retries=0,
        messages=[{"role": "user", "content": [SAY, instructor.Image.from_base64(PNG_URL)]}],
    )
    equal(found.model_dump(), ADA)


main()
