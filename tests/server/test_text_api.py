import json
from typing import Any

import pytest

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.server.api.text import _by_name
from server.conftest import Bench, MakeBench

EOS = 2


async def both(bench: Bench, **request: Any) -> dict[str, Any]:
    """Streamed and not, which must agree; the choices as plain data."""
    client = bench.openai()
    whole = await client.completions.create(model="m", **request)
    stream = await client.completions.create(
        model="m", **request, stream=True, stream_options={"include_usage": True}
    )
    texts: dict[int, str] = {}
    logprobs: dict[int, dict[str, list[Any]]] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                mine = logprobs.setdefault(choice.index, {})
                for key, values in choice.logprobs.model_dump().items():
                    mine[key] = mine.get(key, []) + values
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        if choice.logprobs is not None:
            assert logprobs[choice.index] == choice.logprobs.model_dump()
    return {"texts": texts, "logprobs": logprobs.get(0), "usage": whole.usage}


async def test_prompts_in_every_form(make_bench: MakeBench) -> None:
    bench = make_bench(" world", EOS)
    ids = bench.ids("Hello")
    for prompt in ("Hello", ["Hello"], [1, *ids], [[1, *ids]]):
        assert (await both(bench, prompt=prompt))["texts"] == {0: " world"}
        assert bench.service.requests[-1].prompt_token_ids == (1, *ids)


async def test_several_prompts_and_choices_are_in_order(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.service.script = lambda r: bench.ids(f"answer {r.request_id[-1]}", EOS)
    answer = await both(bench, prompt=["a", "b"], n=2)
    assert answer["texts"] == {i: f"answer {i}" for i in range(4)}
    usage = answer["usage"]
    assert usage.prompt_tokens == 4
    # Each prompt's own once (the scripted engine says 3), however many answers it has.
    assert usage.prompt_tokens_details.cached_tokens == 2 * 3


@pytest.mark.parametrize("echo", [False, True])
async def test_each_token_says_where_its_text_begins(make_bench: MakeBench, echo: bool) -> None:
    bench = make_bench(" one two three", EOS)
    answer = await both(bench, prompt="Hello", echo=echo, logprobs=0)
    found, text = answer["logprobs"], answer["texts"][0]
    assert len(found["tokens"]) == len(found["text_offset"]) > 3
    assert found["text_offset"][-1] > 0
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        # The control tokens in front of the prompt and behind the answer have no text.
        if token not in ("<s>", "</s>"):
            assert text[offset : offset + len(token)] == token


async def test_echo_with_logprobs_scores_the_prompt(make_bench: MakeBench) -> None:
    bench = make_bench(" éx", EOS)
    answer = await both(bench, prompt="Hello é", echo=True, logprobs=1)
    assert answer["texts"] == {0: "Hello é éx"}
    found = answer["logprobs"]
    prompt, text = bench.ids("Hello é"), bench.ids(" éx")
    # The token that ended the answer is counted, hence it has its entry.
    assert found["token_logprobs"] == [None, *[-i / 1000 for i in (*prompt, *text, EOS)]]
    assert len(found["tokens"]) == len(found["text_offset"]) == 1 + len(prompt) + len(text) + 1
    assert found["text_offset"] == sorted(found["text_offset"])
    assert found["top_logprobs"][0] is None and found["top_logprobs"][1]


async def test_zero_tokens_score_the_prompt_only(make_bench: MakeBench) -> None:
    bench = make_bench("never shown", EOS)
    answer = await both(bench, prompt="Hello", echo=True, logprobs=0, max_tokens=0)
    assert answer["texts"] == {0: "Hello"}
    assert len(answer["logprobs"]["tokens"]) == 1 + len(bench.ids("Hello"))
    assert answer["usage"].completion_tokens == 0


async def test_default_is_sixteen_tokens(make_bench: MakeBench) -> None:
    bench = make_bench("a b c d e f g h i j k l m n o p q r s t", EOS)
    assert (await both(bench, prompt="x"))["usage"].completion_tokens == 16


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [99999]},
        {"prompt": [-1]},
        {"prompt": [1, 10]},
        {"prompt": ["a", 1]},
        {"prompt": ["a"] * 500},
        {"prompt": 5},
        {"suffix": "x"},
        {"best_of": 3},
        {"max_tokens": 0},
        {"max_tokens": 10_000},
        {"logprobs": 21},
    ],
)
async def test_bad_requests(make_bench: MakeBench, change: dict[str, Any]) -> None:
    bench = make_bench("x", EOS)
    async with bench.http() as client:
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "a", **change})
        assert answer.status_code == 400, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not bench.service.requests


@pytest.mark.parametrize("max_tokens", [0, 1, 3, 50])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("stop", [None, " two", "o t"])
async def test_every_counted_token_has_an_entry(
    make_bench: MakeBench, max_tokens: int, ends: bool, stop: str | None
) -> None:
    """Harnesses slice the entries by counts of tokens: one missing shifts all scores."""
    # A control token in the middle has no text, part of a character neither.
    script = ["one", 3, " two", 64 + 0xF0, *([EOS] if ends else [])]
    request = {"prompt": "Héllo", "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = await both(make_bench(*script), **request, stop=stop)
    found, usage = answer["logprobs"], answer["usage"]
    for values in found.values():
        assert len(values) == usage.prompt_tokens + usage.completion_tokens


async def test_a_token_without_text_has_its_frame_and_usage_runs_along(
    make_bench: MakeBench,
) -> None:
    bench = make_bench("a", 3, 3, "b", EOS)
    body = {
        "model": "m",
        "prompt": "x",
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    async with bench.http() as http:
        text = (await http.post("/v1/completions", json=body)).text
    chunks = [json.loads(one[6:]) for one in text.split("\n\n")[:-2]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "", "", "b", ""]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("prompt", ["😀a你b", "e\u0301é", "👨\u200d👩\u200d👧 x", "ab", "你"])
async def test_offsets_count_characters_not_tokens(make_bench: MakeBench, prompt: str) -> None:
    """A token that is part of a character begins where the character stands."""
    bench = make_bench("你x", EOS)
    found = (await both(bench, prompt=prompt, echo=True, logprobs=1))["logprobs"]
    whole = f"{prompt}你x".encode()
    vocabulary = bench.chat.vocabulary
    ids = [1, *vocabulary.encode_text(prompt), *vocabulary.encode_text("你x"), EOS]
    expected, position = [], 0
    for token_id in ids:
        expected.append(len(whole[:position].decode(errors="ignore")))
        position += len(vocabulary.token_bytes[token_id])
    assert found["text_offset"] == expected


def test_alternatives_of_equal_text_keep_their_entries(mistral: MistralFormat) -> None:
    """Parts of characters are named by their bytes; no two tokens share a name."""
    vocabulary = mistral.vocabulary
    top = tuple((token_id, -float(token_id)) for token_id in range(vocabulary.size + 3))
    named = _by_name(vocabulary, top)
    assert [logprob for _, logprob in named] == [logprob for _, logprob in top]
    names = [name for name, _ in named]
    assert len(set(names)) == len(names)
    high = vocabulary.encode_text("😀")[0]
    assert names[high] == "bytes:\\xf0" and names[vocabulary.encode_text("a")[0]] == "a"
