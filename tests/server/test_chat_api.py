from typing import Any, cast

import pytest
from pydantic import ValidationError

from halfbyte.chat.grammar_follow import GrammarMask
from halfbyte.chat.mask_plan import MaskMaker, MaskPlan
from halfbyte.engine.request import GenerationRequest
from halfbyte.errors import RequestError
from halfbyte.server.api.prepare import _beginning
from halfbyte.server.api.wire import ChatRequest
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


async def both(bench: Bench, **request: Any) -> dict[str, Any]:
    """Send streamed and not; assert that they say the same; return what they say."""
    client = bench.openai()
    options: dict[str, Any] = {"model": "m", "messages": HELLO, **request}
    whole = await client.chat.completions.create(**options)
    stream = await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    async for chunk in stream:
        assert chunk.object == "chat.completion.chunk" and chunk.model == "m"
        if chunk.usage is not None:
            assert not chunk.choices
            usage = chunk.usage
        for choice in chunk.choices:
            mine = choices.setdefault(
                choice.index,
                {"content": "", "reasoning": "", "calls": [], "finish": None, "tokens": []},
            )
            delta = choice.delta
            mine["content"] += delta.content or ""
            mine["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                assert call.function is not None
                if call.id:
                    assert call.index == len(mine["calls"]) and len(call.id) == 9
                    mine["calls"].append([call.function.name, ""])
                mine["calls"][call.index][1] += call.function.arguments or ""
            mine["finish"] = choice.finish_reason or mine["finish"]
            if choice.logprobs is not None:
                mine["tokens"] += choice.logprobs.content or []
    for choice in whole.choices:
        mine, message = choices[choice.index], choice.message
        assert mine["content"] == (message.content or "")
        assert mine["reasoning"] == (getattr(message, "reasoning_content", None) or "")
        assert getattr(message, "reasoning", None) == getattr(message, "reasoning_content", None)
        calls = [[c.function.name, c.function.arguments] for c in message.tool_calls or ()]
        assert mine["calls"] == calls
        assert mine["finish"] == choice.finish_reason
        if choice.logprobs is not None:
            assert mine["tokens"] == choice.logprobs.content
    assert usage == whole.usage
    assert not bench.service.running
    return {"choices": choices, "usage": whole.usage, **choices[0]}


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
async def test_plain_answer(make_bench: MakeBench, tokens_per_event: int) -> None:
    bench = make_bench("Hello, é 漢 you!", EOS, service={"tokens_per_event": tokens_per_event})
    answer = await both(bench)
    assert answer["content"] == "Hello, é 漢 you!" and answer["finish"] == "stop"
    usage = answer["usage"]
    assert usage.completion_tokens == len(bench.ids("Hello, é 漢 you!")) + 1
    assert usage.prompt_tokens == len(bench.service.requests[0].prompt_token_ids)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_thought_and_calls(make_bench: MakeBench) -> None:
    bench = make_bench(
        THINK, "hm", END_THINK, "See.", CALLS, "f", ARGS, '{"a": 1}', CALLS, "f", ARGS, "{}", EOS
    )
    answer = await both(bench, tools=[TOOL], reasoning_effort="high")
    assert answer["reasoning"] == "hm" and answer["content"] == "See."
    assert answer["calls"] == [["f", '{"a": 1}'], ["f", "{}"]]
    assert answer["finish"] == "tool_calls"
    details = answer["usage"].completion_tokens_details
    assert details.reasoning_tokens == len(bench.ids("hm")) + 2


async def test_calls_alone_have_null_content(make_bench: MakeBench) -> None:
    bench = make_bench(CALLS, "f", ARGS, "{}", EOS)
    client: Any = bench.openai()
    answer = await client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL])
    assert answer.choices[0].message.content is None


async def test_cut_by_length_says_so(make_bench: MakeBench) -> None:
    answer = await both(make_bench("Hello, you!", EOS), max_completion_tokens=3)
    assert answer["finish"] == "length" and answer["usage"].completion_tokens == 3
    answer = await both(make_bench(THINK, "Hello"), reasoning_effort="high", max_tokens=3)
    assert answer["finish"] == "length" and answer["content"] == ""
    bench = make_bench(CALLS, "f", ARGS, '{"a": 123}', EOS)
    answer = await both(bench, tools=[TOOL], max_tokens=5)
    assert answer["finish"] == "length" and answer["calls"][0][1].startswith("{")


async def test_stop_strings_end_the_answer_and_the_engines_work(make_bench: MakeBench) -> None:
    bench = make_bench("one two three", EOS)
    answer = await both(bench, stop=[" tw", "x"])
    assert answer["content"] == "one" and answer["finish"] == "stop"
    assert len(bench.service.told_to_abort) == 2 and not bench.service.aborted
    # Counted up to the token that completed the stop string; the prompt's share is still known.
    assert answer["usage"].completion_tokens < len(bench.ids("one two three"))
    assert answer["usage"].prompt_tokens_details.cached_tokens == 3


async def test_several_choices_share_one_prompt(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS)
    scripts = {"0": "first é", "1": "the second", "2": ""}
    bench.service.script = lambda r: bench.ids(scripts[r.request_id[-1]], EOS)
    answer = await both(bench, n=3, seed=7)
    assert [answer["choices"][i]["content"] for i in range(3)] == list(scripts.values())
    assert [r.params.seed for r in bench.service.requests[:3]] == [7, 8, 9]
    assert answer["usage"].completion_tokens == sum(
        len(bench.ids(text)) + 1 for text in scripts.values()
    )


async def test_logprobs_are_those_of_the_content(make_bench: MakeBench) -> None:
    bench = make_bench(THINK, "x", END_THINK, "aé", EOS)
    answer = await both(bench, logprobs=True, top_logprobs=2, reasoning_effort="high")
    tokens = answer["tokens"]
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "aé"
    assert [token.logprob for token in tokens] == [-i / 1000 for i in bench.ids("aé")]
    assert all(len(token.top_logprobs) == 2 for token in tokens)


async def test_parameters_reach_the_engine(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    await both(
        bench,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"100": -100},
        user="someone",
        metadata={"a": "b"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 0},
    )
    params = bench.service.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.1 and params.logit_bias == {100: -100}
    assert EOS in params.stop_token_ids
    banned = set(params.banned_token_ids)
    # No thought was asked for, no tools: only the end of answer is left of the control tokens,
    # and rows of the head without a token are out.
    assert banned == (set(range(64)) - {EOS}) | set(range(764, 800))


async def test_schema_holds_the_answer(make_bench: MakeBench) -> None:
    bench = make_bench('{"a": 1}', EOS)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "not": {}}
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with bench.http() as client:
        body: dict[str, Any] = {"model": "m", "messages": HELLO, "response_format": form}
        answer = await client.post("/v1/chat/completions", json=body)
        assert "not" in answer.headers["x-halfbyte-warning"]
        body["stream"] = True
        streamed = await client.post("/v1/chat/completions", json=body)
        assert "not" in streamed.headers["x-halfbyte-warning"]
        form["json_schema"]["strict"] = True
        refused = await client.post("/v1/chat/completions", json={**body, "stream": False})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "response_format"
    assert bench.service.requests[0].rules is not None


async def test_engine_error_is_a_status_before_and_a_frame_after_the_start(
    make_bench: MakeBench,
) -> None:
    bench = make_bench("Hello", EOS, service={"fail_at": 0})
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO, "stream": True}
        failed = await client.post("/v1/chat/completions", json=body)
        assert failed.status_code == 500 and "lost its mind" in failed.text
        bench.service.fail_at = 1
        broken = await client.post("/v1/chat/completions", json=body)
        assert broken.status_code == 200
        lines = broken.text.strip().split("\n\n")
        assert "lost its mind" in lines[-2] and '"error"' in lines[-2]
        assert lines[-1] == "data: [DONE]" and "event:" not in broken.text
        whole = await client.post("/v1/chat/completions", json={**body, "stream": False})
        assert whole.status_code == 500
    assert not bench.service.running


async def test_images_reach_the_engine(make_bench: MakeBench) -> None:
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (100, 60), "red").save(buffer, "PNG")
    url = " \n\0data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode() + "\n "
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    bench = make_bench("red", EOS)
    answer = await both(bench, messages=[{"role": "user", "content": parts}])
    (image,) = bench.service.requests[0].images
    assert image.pixels.shape == (3, 84, 112) and image.num_tokens == 15
    assert answer["usage"].prompt_tokens_details.image_tokens == 15


async def test_continuing_an_answer(make_bench: MakeBench) -> None:
    bench = make_bench(" more", EOS)
    messages = [*HELLO, {"role": "assistant", "content": "Some"}]
    await both(bench, messages=messages, extra_body={"continue_final_message": True})
    # Mistral's own clients say it in the message.
    await both(bench, messages=[*HELLO, {**messages[-1], "prefix": True}])
    prompts = {request.prompt_token_ids for request in bench.service.requests}
    assert len(prompts) == 1
    assert bench.chat.vocabulary.decode(prompts.pop()).endswith("Some")
    async with bench.http() as client:
        early: Any = [{**messages[-1], "prefix": True}, *HELLO]
        refused = await client.post("/v1/chat/completions", json={"model": "m", "messages": early})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages[0].prefix"


BEGUN = {"role": "assistant", "content": "ye", "prefix": True}
CHOICE = {"type": "choice", "choices": ["yes", "no"]}
OBJECT = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "fitting", "other"),
    [
        ({"response_format": CHOICE}, "no", "maybe"),
        ({"response_format": {"type": "regex", "regex": "a+b"}}, "aab", "ba"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x" "y"'}}, "xy", "yx"),
        ({"response_format": OBJECT}, '{"a": 1}', "[1]"),
        ({"response_format": OBJECT, "tools": [TOOL]}, '{"a": 1}', "[1]"),
        ({"response_format": CHOICE, "tools": [TOOL], "tool_choice": "none"}, "no", "maybe"),
        # A call is forced: no text may stand there, whatever the format says of it.
        ({"response_format": OBJECT, "tools": [TOOL], "tool_choice": "required"}, "", '{"a": 1}'),
        ({"response_format": CHOICE, "messages": [*HELLO, BEGUN]}, "s", "yes"),
    ],
)
async def test_rules_reach_the_engine(
    make_bench: MakeBench, fields: dict[str, Any], fitting: str, other: str
) -> None:
    bench = make_bench("no", EOS)
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO, "n": 2, **fields}
        await client.post("/v1/chat/completions", json=body)
    # One mask each: what the first answer has said does not bind the second.
    chat = bench.app.state.backend.chat
    maker = MaskMaker(chat.vocabulary, chat.control)
    plans = (cast("MaskPlan", request.rules) for request in bench.service.requests)
    one, two = (cast("GrammarMask", maker.make(plan)) for plan in plans)
    assert one is not two
    assert one.begin(bench.ids(fitting)) == len(bench.ids(fitting))
    assert two.begin(bench.ids(other)) < len(bench.ids(other))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 2], [-0.01, 2.01]),
        ("top_p", [0.01, 1], [0, 1.01]),
        ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31]),
        ("min_p", [0, 1], [-0.01, 1.01]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
        ("repetition_penalty", [0.01, 100], [0.009, 100.1]),
        ("max_reasoning_tokens", [0], [-1]),
    ],
)
def test_sampling_has_these_bounds(name: str, good: list[float], bad: list[float]) -> None:
    body = {"model": "m", "messages": HELLO}
    for value in good:
        assert getattr(ChatRequest.model_validate({**body, name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError, match=name):
            ChatRequest.model_validate({**body, name: value})


def test_most_likely_tokens_are_asked_for_with_log_probs() -> None:
    body = {"model": "m", "messages": HELLO, "top_logprobs": 3}
    with pytest.raises(ValidationError, match="only allowed when logprobs is true"):
        ChatRequest.model_validate(body)
    assert ChatRequest.model_validate({**body, "logprobs": True}).top_logprobs == 3


THOUGHT = {"type": "thinking", "thinking": "hm"}
SAID = {"type": "text", "text": "ye"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": "ye"}, "ye"),
        ({"content": [SAID, SAID]}, "yeye"),
        ({"content": [THOUGHT, SAID]}, "ye"),
        # What was only thought has begun, too.
        ({"content": [THOUGHT]}, ""),
        ({"content": "", "reasoning": "hm"}, ""),
        ({"content": None, "reasoning_content": "hm"}, ""),
        ({"content": ""}, None),
        ({"content": None}, None),
    ],
)
def test_what_of_an_answer_has_begun(fields: dict[str, Any], text: str | None) -> None:
    last = {"role": "assistant", "prefix": True, **fields}
    request = ChatRequest.model_validate({"model": "m", "messages": [*HELLO, last]})
    found = _beginning(request)
    assert (None if found is None else found.text) == text
    later = ChatRequest.model_validate({"model": "m", "messages": [*HELLO, last, *HELLO]})
    assert _beginning(later) is None


async def test_texts_besides_json_cannot_stand_beside_tools(make_bench: MakeBench) -> None:
    bench = make_bench("no", EOS)
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO, "response_format": CHOICE, "tools": [TOOL]}
        refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"


async def test_thoughts_may_come_in_parts(make_bench: MakeBench) -> None:
    bench = make_bench("no", EOS)
    parts = [{"type": "text", "text": "Hm"}, {"type": "text", "text": "m."}]
    async with bench.http() as client:
        for thinking in ("Hmm.", parts):
            thought = {"type": "thinking", "thinking": thinking}
            said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Yes"}]}
            body = {"model": "m", "messages": [*HELLO, said, *HELLO]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    whole, split = (request.prompt_token_ids for request in bench.service.requests)
    assert whole == split


async def test_the_first_failure_of_several_answers_is_told(make_bench: MakeBench) -> None:
    """The others are still running then; that they are ended must not hide it."""
    bench = make_bench("x" * 50, service={"delay_s": 0.01})
    ids = bench.ids("x" * 50)

    def script(request: GenerationRequest) -> list[int]:
        if len(bench.service.requests) > 1:
            raise RequestError("the second one is ill", code="engine_error", status=500)
        return ids

    bench.service.script = script
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO, "n": 2}
        failed = await client.post("/v1/chat/completions", json=body)
    assert failed.status_code == 500 and "the second one is ill" in failed.text
    assert not bench.service.running and len(bench.service.aborted) == 2


async def test_a_failure_while_draining_is_no_shutdown(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS, service={"fail_at": 0})
    ids = bench.ids("Hello")

    def script(request: GenerationRequest) -> list[int]:
        bench.app.state.backend.admission.is_draining = True
        return ids

    bench.service.script = script
    async with bench.http() as client:
        failed = await client.post("/v1/chat/completions", json={"model": "m", "messages": HELLO})
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_error"
    assert "lost its mind" in failed.text
