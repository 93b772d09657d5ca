"""vLLM's fields for token ids, log-probs of prompts and stop strings in the text."""

import asyncio
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from server.conftest import MakeBench
from server.test_chat_api import HELLO, TOOL
from server.test_properties import _TOKENS, SETTINGS

EOS = 2
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": HELLO, "tools": [TOOL], "reasoning_effort": "high"},
    TEXT: {"model": "m", "prompt": "Hi"},
}


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(
    ids=st.lists(_TOKENS, max_size=30),
    per_event=st.integers(1, 7),
    limit=st.integers(1, 35),
    stop=st.sampled_from([None, "a", "1}"]),
    keeps=st.booleans(),
    whole_calls=st.booleans(),
    include_reasoning=st.booleans(),
)
def test_every_counted_token_is_told_once_and_in_order(
    make_bench: MakeBench, ids: list[int], per_event: int, limit: int, stop: str | None,
    keeps: bool, whole_calls: bool, include_reasoning: bool,
) -> None:  # fmt: skip
    bench = make_bench(service={"tokens_per_event": per_event})
    bench.service.script = lambda request: [*ids, EOS]
    options = {"stream_tool_calls": not whole_calls}

    async def ask(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        body = {
            **ASKED[path], "return_token_ids": True, "max_tokens": limit, "stop": stop, "n": 2,
            "include_stop_str_in_output": keeps,
        }  # fmt: skip
        if path == CHAT:
            body["include_reasoning"] = include_reasoning
        async with bench.http() as client:
            whole = await client.post(path, json=body)
            streamed = await client.post(
                path, json={**body, "stream": True, "stream_options": options}
            )
        assert whole.status_code == streamed.status_code == 200, whole.text
        return whole.json(), chunks_of(streamed.text)

    for path in (CHAT, TEXT):
        whole, chunks = asyncio.run(ask(path))
        prompt = list(bench.service.requests[-1].prompt_token_ids)
        holders = [whole] if path == CHAT else whole["choices"]
        assert all(holder["prompt_token_ids"] == prompt for holder in holders)
        total = 0
        for choice in whole["choices"]:
            told = choice["token_ids"]
            total += len(told)
            # What the script says, as far as the limit or a stop string lets it.
            given = [*ids, EOS]
            end = given.index(EOS) + 1
            assert told == given[:end][: len(told)]
            pieces = [
                token_id
                for chunk in chunks
                for one in chunk["choices"]
                if one["index"] == choice["index"]
                for token_id in one["token_ids"]
            ]
            assert pieces == told
        assert total == whole["usage"]["completion_tokens"]
        first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
        assert first["prompt_token_ids"] == prompt
        assert "prompt_token_ids" not in chunks[-1]


@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(
    text=st.text("ab1}é ", max_size=20),
    stop=st.sampled_from(["a", "b1", "é", " a"]),
    per_event=st.integers(1, 5),
)
def test_a_stop_string_is_shown_if_asked_for(
    make_bench: MakeBench, text: str, stop: str, per_event: int
) -> None:
    bench = make_bench(service={"tokens_per_event": per_event})
    ids = bench.ids(text)
    bench.service.script = lambda request: [*ids, EOS]
    found = text.find(stop)
    wanted = text if found < 0 else text[: found + len(stop)]

    async def ask() -> None:
        async with bench.http() as client:
            for path in (CHAT, TEXT):
                body = {**ASKED[path], "stop": [stop], "include_stop_str_in_output": True}
                body |= {"max_tokens": 60}
                (choice,) = (await client.post(path, json=body)).json()["choices"]
                said = choice["message"]["content"] if path == CHAT else choice["text"]
                assert said == wanted
                streamed = await client.post(path, json={**body, "stream": True})
                parts = [one for chunk in chunks_of(streamed.text) for one in chunk["choices"]]
                texts = [
                    (one["delta"].get("content") or "") if path == CHAT else one["text"]
                    for one in parts
                ]
                assert "".join(texts) == wanted

    asyncio.run(ask())


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stop_token_with_a_text_is_shown_if_asked_for(
    make_bench: MakeBench, path: str
) -> None:
    bench = make_bench()
    ids = bench.ids("Say X now")
    (stop,) = bench.ids("X")
    bench.service.script = lambda request: [*ids, EOS]
    async with bench.http() as client:
        for keeps, text in ((False, "Say "), (True, "Say X")):
            body = {**ASKED[path], "stop_token_ids": [stop], "max_tokens": 40}
            body |= {"include_stop_str_in_output": keeps, "return_token_ids": True}
            body |= {"logprobs": True if path == CHAT else 0}
            answer = (await client.post(path, json=body)).json()
            (choice,) = answer["choices"]
            said = choice["message"]["content"] if path == CHAT else choice["text"]
            assert said == text and choice["finish_reason"] == "stop"
            assert choice["token_ids"][-1] == stop
            rows = choice["logprobs"]["content" if path == CHAT else "tokens"]
            # Plain continuations have an entry for each counted token, shown or not.
            assert len(rows) == len(choice["token_ids"]) - (path == CHAT and not keeps)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_log_probs_of_the_prompt_stand_by_token_id(make_bench: MakeBench, path: str) -> None:
    bench = make_bench("x", EOS)
    body = {**ASKED[path], "prompt_logprobs": 1, "max_tokens": 5}
    async with bench.http() as client:
        answer = (await client.post(path, json=body)).json()
        told = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
        prompt = bench.service.requests[0].prompt_token_ids
        assert told[0] is None and len(told) == len(prompt)
        for token_id, entry in zip(prompt[1:], told[1:], strict=True):
            # The scripted engine: -id / 1000 for the token, 100 as the likeliest one.
            assert list(entry) == list(dict.fromkeys([str(token_id), "100"]))
            piece = bench.chat.vocabulary.piece(token_id)
            assert entry[str(token_id)]["decoded_token"] == piece
            if token_id != 100:
                assert entry[str(token_id)]["logprob"] == -token_id / 1000
                assert entry[str(token_id)]["rank"] is None
            assert entry["100"]["rank"] == 1
        streamed = await client.post(path, json={**body, "stream": True})
        assert streamed.status_code == 400 and "prompt_logprobs" in streamed.text
        for wrong in (-1, 21, True, "1"):
            answer = await client.post(path, json={**body, "prompt_logprobs": wrong})
            assert answer.status_code == 400


async def test_echo_and_prompt_logprobs_have_each_their_own_number(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    body = {**ASKED[TEXT], "echo": True, "logprobs": 0, "prompt_logprobs": 1}
    async with bench.http() as client:
        (choice,) = (await client.post(TEXT, json=body)).json()["choices"]
    assert bench.service.requests[0].params.prompt_logprobs == 1
    assert all(len(entry) == 2 for entry in choice["prompt_logprobs"][1:] if "100" in entry)
    assert choice["logprobs"]["top_logprobs"] == [None] * len(choice["logprobs"]["tokens"])


async def test_nothing_of_it_is_there_unasked(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    async with bench.http() as client:
        for path in (CHAT, TEXT):
            body = {**ASKED[path], "return_token_ids": False, "prompt_logprobs": None}
            for stream in (False, True):
                text = (await client.post(path, json={**body, "stream": stream})).text
                assert "token_ids" not in text and "prompt_logprobs" not in text
