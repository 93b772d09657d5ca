"""Schemas, tools and formats over the whole server: what is held, named, refused and survived."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from flows.stand import ARGS, CALLS, EOS, HELLO, Stand, standing, write_model

# One server for all of them.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(directory: Path) -> AsyncIterator[Stand]:
    async with standing(
        directory, max_model_len=1024, kv_cache_tokens=8192, max_sequences=16
    ) as stand:
        yield stand


async def ask(stand: Stand, **body: Any) -> tuple[int, Any, str]:
    """Status, body, and what the warning header says."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0, **body}
    answer = await stand.http.post(CHAT, json=body)
    return answer.status_code, answer.json(), answer.headers.get("x-halfbyte-warning", "")


def schema_form(schema: Any, *, strict: bool = False) -> dict[str, Any]:
    named = {"name": "x", "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": named}


def tool(name: str, parameters: Any, *, strict: bool = False) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def with_property(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


# Schemas that are not strict: a value that has to be possible, and what the header names.
LENIENT: list[tuple[Any, Any, str]] = [
    (with_property({"type": "string", "pattern": r"^(?!\.).+$"}), {"a": "x"}, "s.a.pattern"),
    (with_property({"type": "string", "pattern": r"(a|b)\1"}), {"a": "zz"}, "s.a.pattern"),
    (with_property({"type": "string", "pattern": "("}), {"a": "x"}, "properties.a.pattern"),
    (with_property({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}), {"a": -5},
     "minimum"),
    (with_property({"type": "integer", "maximum": 2**64 - 1, "minimum": 0}), {"a": 7}, "a.maximum"),
    (with_property({"type": "number", "maximum": 1.7976931348623157e308}), {"a": 0.5}, "a.maximum"),
    (with_property({"type": "number", "exclusiveMinimum": -1e20}), {"a": 0.5}, "exclusiveMinimum"),
    (with_property({"type": "integer", "maximum": "9"}), {"a": 10}, "a.maximum"),
    (with_property({"type": "integer", "multipleOf": 0}), {"a": 10}, "a.multipleOf"),
    (with_property({"type": "string", "maxLength": 2**63}), {"a": "x"}, "a.maxLength"),
    (with_property({"type": "file"}), {"a": "x"}, "a.type"),
    (with_property({"type": ["any", "null"]}), {"a": 5}, "a.type"),
    (with_property({"$ref": "#/definitions/Nothing"}), {"a": {}}, "a.$ref"),
    (with_property({"$ref": "https://example.org/pet.json"}), {"a": {}}, "a.$ref"),
    (with_property({"type": "integer", "enum": ["1", "2"]}), {"a": 1}, "a.enum"),
    (with_property({"type": "string", "const": 5}), {"a": "x"}, "a.const"),
    (with_property({"type": "string", "format": "date", "pattern": "^x"}),
     {"a": "2026-01-31"}, "a.pattern"),
    (with_property({"allOf": [{"type": "string"}, {"type": "integer"}]}), {"a": 1}, "a"),
    (with_property({"anyOf": [{"type": "string", "pattern": "(?=x)"}]}), {"a": "y"},
     "anyOf[0].pattern"),
    (with_property({"not": {"type": "string"}}), {"a": "x"}, "not"),
    (with_property({"type": "integer", "maximum": 2**53 + 10}), {"a": 5}, "nearest double"),
    ({"type": "object", "required": None}, {}, ""),
    ({"type": "object", "properties": None}, {}, ""),
    ({"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}, {"a": "x"}, ""),
    ({"type": None, "properties": {"a": {"type": "string"}}}, {"a": "x"}, ""),
    (with_property({"type": "string"}, title=None, additionalProperties=None), {"a": "x"}, ""),
    (with_property({"$ref": "#/$defs/A", "$defs": {"A": {"type": "string"}}}), {"a": "x"}, ""),
    (with_property({"properties": {"漢\n": {"type": "datetime"}}}), {"a": {}}, "\\u6f22 .type"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value", "named"), LENIENT)
async def test_what_cannot_be_held_goes_and_is_named(
    stand: Stand, schema: Any, value: Any, named: str
) -> None:
    text = json.dumps(value)
    stand.force(CALLS, "f", ARGS, text, EOS)
    status, body, warning = await ask(stand, tools=[tool("f", schema)], tool_choice="required")
    assert status == 200, body
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == text
    assert named in warning and bool(warning) is bool(named)
    if named and "double" not in named and "\\" not in named:
        assert "tools[0].function.parameters" in warning or "Unimplemented" in warning
    stand.force(text, EOS)
    status, body, warning = await ask(stand, response_format=schema_form(schema))
    assert status == 200, body
    assert body["choices"][0]["message"]["content"] == text
    assert bool(warning) is bool(named)
    stand.script.ids = None


async def test_the_rest_of_a_schema_is_held_all_the_same(stand: Stand) -> None:
    properties = {
        "a": {"type": "string", "pattern": "^(?!x).*$", "maxLength": 4},
        "b": {"type": "integer", "minimum": 3, "maximum": 5},
    }
    schema = {"type": "object", "properties": properties, "required": ["a", "b"],
              "additionalProperties": False}  # fmt: skip
    for seed in range(4):
        status, body, _ = await ask(
            stand, response_format=schema_form(schema), temperature=1, seed=seed, max_tokens=300
        )
        assert status == 200
        if body["choices"][0]["finish_reason"] == "stop":
            value = json.loads(body["choices"][0]["message"]["content"])
            assert len(value["a"]) <= 4 and value["b"] in (3, 4, 5)


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (with_property({"type": "string", "pattern": "^(?!a)"}), "properties.a.pattern: "),
        (with_property({"$ref": "#/$defs/X"}), "properties.a.$ref: "),
        (with_property({"type": "integer", "minimum": -(2**63)}), "properties.a.minimum: "),
        ({"type": "object", "required": None}, "required: "),
        (with_property({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "properties.a.oneOf: "),
    ],
)
async def test_a_strict_tool_that_cannot_be_held_is_named(
    stand: Stand, bad: Any, path: str
) -> None:
    tools = [tool("good", OBJECT, strict=True), tool("bad", bad, strict=True), tool("x", None)]
    status, body, _ = await ask(stand, tools=tools)
    message = body["error"]["message"]
    assert status == 400 and body["error"]["param"] == "tools"
    assert message.startswith(f"tools[1].function.parameters.{path}") and message[-1] != ":"
    assert "coerce_one_of" not in message
    status, body, _ = await ask(stand, response_format=schema_form(bad, strict=True))
    assert status == 400
    assert body["error"]["message"].startswith(f"response_format.json_schema.schema.{path}")


@pytest.mark.parametrize("kind", ["array", "string", "null", ["string", "array"]])
async def test_a_tool_without_an_object_is_refused_by_name(stand: Stand, kind: Any) -> None:
    tools = [tool("good", OBJECT), tool("bad", {"type": kind})]
    status, body, _ = await ask(stand, tools=tools)
    assert status == 400 and "tools[1].function.parameters" in body["error"]["message"]


# --- answers that have begun -----------------------------------------------------------------

FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "choice", "choices": ["yes", "no"]}, "ye", "yes|no"),
    ({"type": "choice", "choices": ["yes", "no"]}, "no", "yes|no"),
    ({"type": "regex", "regex": "[0-9]{4}"}, "12", "[0-9]{4}"),
    ({"type": "regex", "regex": "(é漢){2,3}x"}, "é漢é", "(é漢){2,3}x"),
    ({"type": "grammar", "grammar": 'start: "ab" "cd"+\n'}, "abc", "ab(cd)+"),
    (schema_form(OBJECT, strict=True), '{"a":', r"\{\s*\"a\"\s*:\s*-?\d+\s*\}"),
    ({"type": "json_object"}, '{"', r"\{.*"),
]


@pytest.mark.parametrize(("form", "begun", "expected"), FORMS)
@pytest.mark.parametrize("as_parts", [False, True])
async def test_an_answer_that_has_begun_is_held_from_its_beginning(
    stand: Stand, form: dict[str, Any], begun: str, expected: str, as_parts: bool
) -> None:
    content: Any = begun
    if as_parts:
        content = [{"type": "text", "text": begun[:1]}, {"type": "text", "text": begun[1:]}]
    messages = [*HELLO, {"role": "assistant", "content": content, "prefix": True}]
    bias = {str(stand.chat.vocabulary.encode_text(" ")[0]): -100}
    status, body, _ = await ask(
        stand, messages=messages, response_format=form, n=2, temperature=1, seed=3, logit_bias=bias
    )
    assert status == 200, body
    for choice in body["choices"]:
        text = begun + (choice["message"]["content"] or "")
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(expected, text, re.DOTALL), text
        else:
            assert text.startswith(begun)


@pytest.mark.parametrize(("form", "begun", "expected"), FORMS)
async def test_a_beginning_that_does_not_fit_is_refused(
    stand: Stand, form: dict[str, Any], begun: str, expected: str
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": f"{begun}\x02", "prefix": True}]
    status, body, _ = await ask(stand, messages=messages, response_format=form)
    assert status == 400 and body["error"]["param"] == "messages[1].content"
    assert "cannot begin so" in body["error"]["message"]


async def test_a_beginning_without_rules_and_rules_without_a_beginning(stand: Stand) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "ye", "prefix": True}]
    assert (await ask(stand, messages=messages))[0] == 200
    form = {"type": "choice", "choices": ["yes", "no"]}
    assert (await ask(stand, messages=messages, response_format={"type": "text"}))[0] == 200
    status, body, _ = await ask(stand, response_format=form)
    assert status == 200 and body["choices"][0]["message"]["content"] in ("yes", "no")
    both = [*HELLO, {"role": "assistant", "content": "ye"}]
    status, body, _ = await ask(
        stand, messages=both, response_format=form, continue_final_message=True
    )
    assert status == 200, body
    assert body["choices"][0]["message"]["content"] == "s"


async def test_text_before_a_call_is_no_beginning_of_a_forced_one(stand: Stand) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Let me", "prefix": True}]
    tools = [tool("f", OBJECT)]
    status, body, _ = await ask(stand, messages=messages, tools=tools, tool_choice="required")
    assert status == 400 and "cannot begin so" in body["error"]["message"]
    stand.force(" see", CALLS, "f", ARGS, '{"a": 1}', EOS)
    status, body, _ = await ask(stand, messages=messages, tools=tools)
    stand.script.ids = None
    assert status == 200 and body["choices"][0]["message"]["content"] == " see"
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


# --- survival --------------------------------------------------------------------------------


def chain(count: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"a{count}": {"type": "string"}}
    for i in range(count):
        ref = {"$ref": f"#/$defs/a{i + 1}"}
        defs[f"a{i}"] = {"type": "object", "properties": {"x": ref}, "required": ["x"]}
    return {"$ref": "#/$defs/a0", "$defs": defs}


async def test_a_stream_goes_on_beside_what_would_end_a_server(stand: Stand) -> None:
    """Each of the four doors, and a bomb; the stream gets all of its tokens."""
    deep = chain(1200)
    within = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": deep["$defs"]}
    rules = "".join(f'r{i}: "a" r{i + 1} | r{i + 1}\n' for i in range(4000))
    hostile: list[dict[str, Any]] = [
        {"response_format": schema_form(deep)},
        {"response_format": schema_form(deep, strict=True)},
        {"tools": [tool("f", within)]},
        {"response_format": {"type": "grammar", "grammar": f'start: r0\n{rules}r4000: "b"\n'}},
        {"response_format": {"type": "regex", "regex": "((a{990}){1000}){1000}"}},
    ]

    async def stream() -> int:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
        async with stand.http.stream("POST", CHAT, json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
        return int(json.loads(lines[-1][6:])["usage"]["completion_tokens"])

    tokens, *answers = await asyncio.gather(stream(), *(ask(stand, **body) for body in hostile))
    assert tokens == 300
    for status, body, _ in answers:
        assert status == 400, body
    assert answers[0][1]["error"]["code"] == "schema_too_complex"
    assert (await ask(stand, response_format=schema_form(OBJECT)))[0] == 200
    await stand.idle()
