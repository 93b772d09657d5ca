"""Bodies and texts beyond all bounds: refused before they are read, whatever else they hold."""

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from halfbyte.server.api.texts import Texts
from halfbyte.server.config import Limits
from halfbyte.server.http.openapi import BODIES
from server.conftest import MakeBench

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
# What is read as it is and bounded by its size when it is compiled.
FREE = {"parameters", "schema", "input_schema", "input"}


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """Lists and maps without a most, by path."""
    if isinstance(schema, list):
        for item in schema:
            yield from unbounded(item, path)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "array" and "maxItems" not in schema:
        yield path
    is_map = schema.get("type") == "object" and "additionalProperties" in schema
    if is_map and schema["additionalProperties"] is not False and "maxProperties" not in schema:
        yield path
    for name, inner in schema.items():
        if name == "properties":
            for field, said in inner.items():
                if field not in FREE:
                    yield from unbounded(said, f"{path}.{field}")
        elif isinstance(inner, (dict, list)):
            yield from unbounded(inner, path if name != "$defs" else f"{path}$")


@pytest.mark.parametrize("kind", BODIES)
def test_every_list_and_map_of_a_request_has_a_most(kind: type[reading.Wire]) -> None:
    assert not list(unbounded(kind.model_json_schema()))


def body(**change: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO, **change}).encode()


def with_values(count: int, value: bytes) -> bytes:
    return b'{"model": "m", "metadata": [' + b",".join([value] * count) + b"]}"


def count_all(limits: Limits, content: bytes, size: int) -> None:
    counts = reading.Structure(limits)
    for start in range(0, len(content), size):
        counts.add(content[start : start + size])


MANY = 700_000
ENDLESS = {
    "brackets": b'{"messages": [' + b"{}," * MANY,
    "lists": b"[" * MANY,
    "numbers": with_values(MANY, b"5"),
    "texts": with_values(MANY, b'"a"'),
    "names": b'{"metadata": {' + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}}",
    "names apart": b'{"metadata": {' + b",".join(b'"%d" \n:1' % i for i in range(200_000)) + b"}}",
    "long numbers": with_values(6000, b"9" * 4000),
    "blanks": b" " * 9_000_000,
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("size", [4099, 65_536])
def test_structure_without_end_is_refused_as_it_comes(name: str, size: int) -> None:
    with pytest.raises(RequestError, match="more than"):
        count_all(Limits(), ENDLESS[name], size)


# Full of what looks like structure.
TEXTS = st.text() | st.text(alphabet='"\\\\[]{},: a')


@settings(deadline=None, max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS,
        lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
        max_leaves=40,
    ),
    st.integers(1, 60),
    st.sampled_from([None, 1]),
)
def test_structure_is_counted_exactly_however_it_is_cut(
    value: Any, size: int, indent: int | None
) -> None:
    content = json.dumps(value, indent=indent, separators=(",", " :")).encode()

    def count(item: Any) -> tuple[int, int, int, int]:
        """Arrays and objects, commas, names, texts."""
        if isinstance(item, (list, dict)):
            inner = [count(one) for one in (item.values() if isinstance(item, dict) else item)]
            names = len(item) if isinstance(item, dict) else 0
            own = (1, max(len(item) - 1, 0), names, names)
            nodes, commas, keys, texts = map(sum, zip(own, *inner, strict=True))
            return nodes, commas, keys, texts
        return (0, 0, 0, int(isinstance(item, str)))

    names = ("body_nodes", "body_values", "body_keys", "body_texts")
    for name, number in zip(names, count(value), strict=True):
        count_all(dataclasses.replace(Limits(), **{name: number}), content, size)
        if number:
            limits = dataclasses.replace(Limits(), **{name: number - 1})
            with pytest.raises(RequestError):
                count_all(limits, content, size)


def test_what_clients_send_is_within_bounds() -> None:
    """Long conversations, many tools, a whole context of ids, pictures: nothing is counted over."""
    part = {"type": "text", "text": 'JSON in a text: {"a": [1, 2]}, ' * 5}
    turn = [
        {"role": "user", "content": [part, part]},
        {"role": "assistant", "content": "It is so."},
    ]
    properties = {f"field_{i}": {"type": "string", "description": "what, why"} for i in range(40)}
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {
            "type": "object", "properties": properties}}}
        for i in range(256)
    ]  # fmt: skip
    limits = Limits()
    for kind, value in (
        (wire.ChatRequest, {"model": "m", "messages": turn * 2048}),
        (wire.ChatRequest, {"model": "m", "messages": HELLO, "tools": tools}),
        (wire.CompletionRequest, {"model": "m", "prompt": list(range(262_144))}),
        (wire.CompletionRequest, {"model": "m", "prompt": [[5] * 4000] * 128}),
        (wire.ChatRequest, {"model": "m", "messages": HELLO, "stop_token_ids": list(range(256))}),
        (
            wire.ChatRequest,
            {"model": "m", "messages": [{"role": "user", "content": "," * 500_000}]},
        ),
    ):
        content = json.dumps(value).encode()
        count_all(limits, content, 65_536)
        reading.parse(kind, reading.parse_json(content), limits)


# --- texts ----------------------------------------------------------------------------------


def test_no_text_within_the_context_is_refused(mistral: MistralFormat) -> None:
    @settings(deadline=None, max_examples=60)
    @given(
        st.text(min_size=1, max_size=50) | st.sampled_from([" ", "a", "\n", "é", "word ", "1,2;"]),
        st.integers(1, 3000),
        st.integers(0, 3),
    )
    def check(piece: str, times: int, slack: int) -> None:
        text = piece * times
        count = len(mistral.vocabulary.encode_text(text))
        texts = Texts(mistral.vocabulary, count + slack)
        texts.check_tokens((text,), "messages")
        for request in (
            wire.CompletionRequest(model="m", prompt=text),
            wire.TokenizeRequest(prompt=text),
        ):
            texts.check_request(request)

    check()


def test_twice_the_context_is_the_bound_exactly(mistral: MistralFormat) -> None:
    text = "word, " * 200
    count = len(mistral.vocabulary.encode_text(text))
    text, count = (text, count) if count % 2 == 0 else (text + ",", count + 1)
    assert len(mistral.vocabulary.encode_text(text)) == count
    Texts(mistral.vocabulary, count // 2).check_tokens((text,), "messages")
    with pytest.raises(RequestError, match="more than twice as many"):
        Texts(mistral.vocabulary, count // 2 - 1).check_tokens((text,), "messages")


@pytest.mark.parametrize(
    "unit", ["word ", "a", " ", "é", "\U0001f469\u200d\U0001f680", "1", "\n\n"]
)
async def test_long_texts_are_refused_unread_on_every_route(
    make_bench: MakeBench, unit: str
) -> None:
    bench = make_bench("x", 2)
    text = unit * (4_000_000 // len(unit.encode()))
    said = [{"role": "user", "content": text}]
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"model": "m", "messages": said}),
        (CHAT, {"model": "m", "messages": said, "stream": True}),
        (CHAT, {"model": "m", "messages": [
            {"role": "user", "content": [{"type": "text", "text": text}]}]}),
        (CHAT, {"model": "m", "messages": [*HELLO, {"role": "assistant", "content": "a",
                                                    "reasoning_content": text}, *HELLO]}),
        ("/v1/completions", {"model": "m", "prompt": ["a", text]}),
        ("/v1/responses", {"model": "m", "input": text}),
        ("/v1/responses", {"model": "m", "input": "a", "instructions": text}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": said}),
        ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": said}),
        ("/v1/messages/count_tokens", {"model": "m", "messages": said}),
        ("/web/render", {"text": text}),
    ]  # fmt: skip
    async with bench.http() as client:
        for path, content in asked:
            started = time.process_time()
            answer = await client.post(path, json=content)
            assert answer.status_code == 400, (path, answer.text[:200])
            message = answer.json()["error"]["message"]
            assert "bytes of text do not fit" in message or "any text for this model" in message
            # Encoding it would take seconds.
            assert time.process_time() - started < 1.0
    assert not bench.service.requests


async def test_texts_of_more_tokens_than_twice_the_context_are_told_by_a_part(
    make_bench: MakeBench, mistral: MistralFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench("x", 2, max_model_len=64)
    monkeypatch.setattr("halfbyte.server.api.texts._PIECE", 100)
    longest = max(map(len, mistral.vocabulary.token_bytes))
    text = "word " * (64 * longest // 5)
    async with bench.http() as client:
        for path, content in (
            (CHAT, {"model": "m", "messages": [{"role": "user", "content": text}]}),
            ("/v1/completions", {"model": "m", "prompt": text}),
            ("/tokenize", {"prompt": text}),
        ):
            answer = await client.post(path, json=content)
            assert answer.status_code == 400, path
            assert "more than twice as many" in answer.json()["error"]["message"]
        # Over the context, but not by so much: counted, and on /tokenize shown.
        near = "word " * 60
        answer = await client.post("/tokenize", json={"prompt": near})
        assert answer.status_code == 200 and answer.json()["count"] > 64


async def test_ids_beyond_the_context_are_refused(make_bench: MakeBench) -> None:
    bench = make_bench("x", 2, max_model_len=64)
    async with bench.http() as client:
        for path, content in (
            ("/detokenize", {"tokens": [5] * 65}),
            ("/v1/completions", {"model": "m", "prompt": [5] * 65}),
            ("/v1/completions", {"model": "m", "prompt": [[5], [5] * 65]}),
        ):
            answer = await client.post(path, json=content)
            assert answer.status_code == 400 and "64" in answer.json()["error"]["message"]
        assert (await client.post("/detokenize", json={"tokens": [5] * 64})).status_code == 200
