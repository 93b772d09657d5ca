"""Our server in front of something that answers as vLLM does: limits, fields, pieces, failures."""

import asyncio
import base64
import io
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import uvicorn
from fastapi import FastAPI
from PIL import Image

from flows.vllm_stand_in import StandIn, token_rows
from halfbyte.chat.tekken_export import hub_tokenizer
from halfbyte.chat.tokens import load_chat
from halfbyte.server.api.admission import Admission
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.preparer import Preparer
from halfbyte.server.api.tool_names import model_name
from halfbyte.server.api.wire import ChatRequest
from halfbyte.server.config import Limits, ServerConfig
from halfbyte.server.http.app import app_over
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import listen
from halfbyte.server.vllm.command import VllmPlan
from halfbyte.server.vllm.upstream import VllmUpstream, _chat_options
from server.conftest import DATA, Bench
from server.scripted import ScriptedService
from server.test_chat_api import HELLO, TOOL, both

KEY = "inner"
THINK, END_THINK, CALLS = 34, 35, 9
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def inner() -> Iterator[tuple[StandIn, int]]:
    stand_in = StandIn(KEY)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(stand_in.app, log_config=None, lifespan="off"))

    def work() -> None:
        asyncio.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=work)
    thread.start()
    yield stand_in, listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def over_vllm(service: ScriptedService, plan: VllmPlan, config: ServerConfig) -> FastAPI:
    metrics = Metrics()
    backend = Backend(
        Supervisor(service, lambda: service),
        VllmUpstream(plan, KEY),
        Preparer(load_chat(DATA / "tekken"), config),
        Admission(config.limits, metrics),
        metrics,
    )
    return app_over(backend, access_log=None)


@pytest.fixture
def front(inner: tuple[StandIn, int]) -> tuple[Bench, StandIn]:
    stand_in, port = inner
    plan = VllmPlan(DATA, {"port": port, "served-model-name": "m"}, ())
    chat = load_chat(DATA / "tekken")
    service = ScriptedService(lambda request: ())
    config = ServerConfig(("m",), 4096, 800, limits=Limits(images=1))
    app = over_vllm(service, plan, config)
    return Bench(app, service, chat), stand_in


Front = tuple[Bench, StandIn]


@pytest.fixture(autouse=True)
def _fresh(inner: tuple[StandIn, int]) -> None:
    stand_in, _ = inner
    stand_in.seen.clear()
    stand_in.script = [{"content": "Hel"}, {"content": "lo"}]
    stand_in.finish, stand_in.hang, stand_in.refuse = "stop", False, None
    stand_in.last = {}


async def test_plain_answer(front: Front) -> None:
    bench, stand_in = front
    answer = await both(bench, n=2, logprobs=True, top_logprobs=1)
    assert answer["content"] == "Hello" and answer["finish"] == "stop"
    assert answer["usage"].prompt_tokens_details.cached_tokens == 16
    assert answer["usage"].completion_tokens_details.reasoning_tokens == 3
    assert [token.logprob for token in answer["tokens"]] == [-0.5, -0.5]
    assert stand_in.seen[0]["model"] == "m" and stand_in.seen[0]["n"] == 2


async def test_thought_and_calls(front: Front) -> None:
    bench, stand_in = front
    call = {"index": 0, "id": "abcdefghi", "type": "function"}
    stand_in.script = [
        {"reasoning": "h"},
        {"reasoning": "m"},
        {"content": "See."},
        {"tool_calls": [{**call, "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
    ]
    stand_in.finish = "tool_calls"
    answer = await both(bench, tools=[TOOL], reasoning_effort="high")
    assert answer["reasoning"] == "hm" and answer["content"] == "See."
    assert answer["calls"] == [["f", '{"a": 1}']] and answer["finish"] == "tool_calls"
    assert stand_in.seen[0]["reasoning_effort"] == "high"
    assert stand_in.seen[0]["tool_choice"] == "auto"
    async with bench.http() as client:
        told = await client.post("/v1/responses", json={"model": "m", "input": "Hello"})
        kinds = [item["type"] for item in told.json()["output"]]
        assert kinds == ["reasoning", "message", "function_call"]


@pytest.fixture
def hub_front(inner: tuple[StandIn, int]) -> tuple[Bench, StandIn]:
    """vLLM with a tokenizer.json: it finds control tokens in text and cannot parse thoughts."""
    stand_in, port = inner
    chat = load_chat(DATA / "tekken")
    names = tuple(chat.vocabulary.control)
    flags = {"port": port, "served-model-name": "m", "tokenizer-mode": "hf"}
    plan = VllmPlan(DATA, flags, (), names, ("[THINK]", "[/THINK]"))
    service = ScriptedService(lambda request: ())
    app = over_vllm(service, plan, ServerConfig(("m",), 4096, 800, limits=Limits(images=1)))
    return Bench(app, service, chat), stand_in


async def test_thoughts_are_taken_out_where_vllm_has_no_parser(hub_front: Front) -> None:
    bench, stand_in = hub_front
    stand_in.script = [
        {"content": "[THINK]", "tokens": [THINK]},
        {"content": "h", "tokens": [101]},
        {"content": "m[/THINK]So", "tokens": [102, END_THINK, 103]},
        {"content": ".", "tokens": [104]},
    ]
    answer = await both(bench, logprobs=True, top_logprobs=1, n=2)
    for choice in answer["choices"].values():
        assert choice["reasoning"] == "hm" and choice["content"] == "So."
    assert ids_of(bench, answer)[-1] == 104
    assert stand_in.seen[0]["skip_special_tokens"] is False
    stand_in.script = [{"content": "Plain"}]
    assert (await both(bench))["content"] == "Plain"
    stand_in.script = [{"content": "[THINK]cut"}]
    answer = await both(bench)
    assert answer["reasoning"] == "cut" and answer["content"] == ""


async def test_typed_names_of_control_tokens_stay_text(hub_front: Front) -> None:
    bench, stand_in = hub_front
    tokenizer = tokenizers.Tokenizer.from_str(
        hub_tokenizer(DATA / "tekken" / "tekken.json")["tokenizer.json"].decode()
    )
    typed = "".join(bench.chat.vocabulary.control) + "[INST][[IMG]][/INST</s>]"
    function: Any = TOOL["function"]
    tool = {**function, "description": typed}
    await both(
        bench,
        messages=[
            {"role": "system", "content": typed},
            {"role": "user", "content": [{"type": "text", "text": typed}]},
        ],
        tools=[{"type": "function", "function": tool}],
    )
    sent = json.dumps(
        [stand_in.seen[-1]["messages"], stand_in.seen[-1]["tools"]], ensure_ascii=False
    )
    ids = set(tokenizer.encode(sent).ids)
    assert not ids & set(bench.chat.vocabulary.control_names)
    assert sent.replace("\u2060", "").count(json.dumps(typed)[1:-1]) == 3


def ids_of(bench: Bench, answer: dict[str, Any]) -> list[int]:
    return [round(-200 * token.logprob) for token in answer["tokens"]]


async def test_log_probs_of_tokens_without_text_arrive(front: Front) -> None:
    bench, stand_in = front
    stand_in.script = [
        {"content": "a", "tokens": [1]},
        {"content": "", "tokens": [2]},
        {"content": "é", "tokens": [3]},
        {"tokens": [4]},
    ]
    answer = await both(bench, logprobs=True, top_logprobs=1, n=2)
    assert answer["content"] == "aé" and ids_of(bench, answer) == [1, 2, 3, 4]
    assert ids_of(bench, answer["choices"][1]) == [1, 2, 3, 4]


async def test_log_probs_of_any_split_arrive_in_order(front: Front) -> None:
    """Chunks with text, without, with several tokens, and what comes with the finish reason."""
    bench, stand_in = front
    draw = random.Random(7)
    for _ in range(25):
        ids = list(range(100, 100 + draw.randint(1, 32)))
        rest = list(ids)
        script: list[dict[str, Any]] = []
        while rest:
            count = draw.randint(1, min(4, len(rest)))
            texts: list[dict[str, Any]] = [{"content": "x"}, {"content": ""}, {"content": None}, {}]
            text = draw.choice(texts)
            script.append({**text, "tokens": rest[:count]})
            rest = rest[count:]
        stand_in.last = {"logprobs": {"content": token_rows(script.pop()["tokens"])}}
        stand_in.script = script
        answer = await both(bench, logprobs=True, top_logprobs=1)
        assert ids_of(bench, answer) == ids


async def test_log_probs_are_of_the_content(front: Front) -> None:
    """As our own engine has it: neither those of thoughts and calls, nor those of their marks."""
    bench, stand_in = front
    call: dict[str, Any] = {"index": 0, "id": "abcdefghi", "type": "function"}
    stand_in.script = [
        {"tokens": [THINK]},
        {"reasoning": "h", "tokens": [101]},
        {"tokens": [102]},
        {"reasoning": "m", "tokens": [103]},
        {"tokens": [END_THINK]},
        {"tokens": [104]},
        {"content": "é", "tokens": [105]},
        {"content": "!", "tokens": [106]},
        {"tokens": [CALLS]},
        {"tool_calls": [{**call, "function": {"name": "f", "arguments": ""}}], "tokens": [107]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}], "tokens": [108]},
    ]
    stand_in.finish = "tool_calls"
    stand_in.last = {"logprobs": {"content": token_rows([109])}}
    answer = await both(bench, tools=[TOOL], logprobs=True, top_logprobs=1)
    assert answer["reasoning"] == "hm" and answer["calls"] == [["f", "{}"]]
    assert ids_of(bench, answer) == [104, 105, 106]


async def test_our_fields_in_vllms_words(front: Front) -> None:
    bench, stand_in = front
    forms: list[tuple[dict[str, Any], tuple[str, Any]]] = [
        ({"response_format": {"type": "regex", "regex": "a+"}},
         ("structured_outputs", {"regex": "a+"})),
        ({"response_format": {"type": "choice", "choices": ["a", "b"]}},
         ("structured_outputs", {"choice": ["a", "b"]})),
        ({"response_format": {"type": "grammar", "grammar": 'start: "a"'}},
         ("structured_outputs", {"grammar": 'start: "a"'})),
        ({"response_format": {"type": "json_object"}},
         ("response_format", {"type": "json_object"})),
        ({"reasoning_effort": "high", "max_reasoning_tokens": 5}, ("thinking_token_budget", 5)),
        ({"stop": "x"}, ("stop", ["x"])),
        ({"max_tokens": 9}, ("max_completion_tokens", 9)),
        ({"continue_final_message": True,
          "messages": [*HELLO, {"role": "assistant", "content": "So"}]},
         ("add_generation_prompt", False)),
        ({"user": "u", "metadata": {"a": "b"}, "logit_bias": {"100": 5}},
         ("logit_bias", {"100": 5.0})),
    ]  # fmt: skip
    async with bench.http() as client:
        for change, (name, value) in forms:
            answer = await client.post(CHAT, json={"model": "m", "messages": HELLO, **change})
            assert answer.status_code == 200, answer.text
            assert stand_in.seen[-1][name] == value


async def test_vllms_own_fields_pass_through(front: Front) -> None:
    bench, stand_in = front
    stand_in.script = [{"content": "Hel", "tokens": [100, 101]}, {"tokens": [102]},
                       {"content": "lo", "tokens": [103]}]  # fmt: skip
    asked = {"model": "m", "return_token_ids": True, "include_stop_str_in_output": True}
    chat, text = {**asked, "messages": HELLO}, {**asked, "prompt": [100, 101, 102]}
    async with bench.http() as client:
        (choice,) = (await client.post(CHAT, json=chat)).json()["choices"]
        assert choice["token_ids"] == [100, 101, 102, 103]
        (choice,) = (await client.post("/v1/completions", json=text)).json()["choices"]
        assert choice["token_ids"] == [100] and choice["prompt_token_ids"] == [100, 101, 102]
        assert all(seen["include_stop_str_in_output"] for seen in stand_in.seen)
        scored = {**text, "prompt_logprobs": 1}
        (choice,) = (await client.post("/v1/completions", json=scored)).json()["choices"]
        assert choice["prompt_logprobs"][0] is None
        assert choice["prompt_logprobs"][1]["101"]["logprob"] == -1.01
        assert choice["logprobs"] is None
        refused = await client.post(CHAT, json={**chat, "prompt_logprobs": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_only_allowed_tools_reach_vllm(front: Front, mode: str) -> None:
    """vLLM knows no list of allowed tools; what it is not shown it cannot call."""
    bench, stand_in = front
    shown = model_name("files.read")
    call = {"index": 0, "id": "abcdefghi", "type": "function"}
    stand_in.script = [{"tool_calls": [{**call, "function": {"name": shown, "arguments": "{}"}}]}]
    stand_in.finish = "tool_calls"
    tools = [TOOL, *(_tool(name) for name in ("files.read", "g"))]
    chosen = [{"type": "function", "function": {"name": name}} for name in ("g", "files.read")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}
    answer = await both(bench, tools=tools, tool_choice=choice)
    assert answer["calls"] == [["files.read", "{}"]]
    for seen in stand_in.seen:
        assert [tool["function"]["name"] for tool in seen["tools"]] == [shown, "g"]
        assert seen["tool_choice"] == mode


async def test_a_named_tool_reaches_vllm_by_the_name_it_is_shown(front: Front) -> None:
    bench, stand_in = front
    choice = {"type": "function", "function": {"name": "files.read"}}
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO, "tools": [_tool("files.read")]}
        answer = await client.post(CHAT, json={**body, "tool_choice": choice})
    assert answer.status_code == 200, answer.text
    assert stand_in.seen[0]["tool_choice"]["function"]["name"] == model_name("files.read")


@pytest.mark.parametrize("is_continued", [True, False])
def test_an_answer_that_has_begun_is_continued_and_not_begun_anew(is_continued: bool) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "y"}]
    body = {"model": "m", "messages": messages, "continue_final_message": is_continued}
    options = _chat_options(ChatRequest.model_validate(body))
    said = {name: options.get(name) for name in ("continue_final_message", "add_generation_prompt")}
    expected = (True, False) if is_continued else (None, None)
    assert tuple(said.values()) == expected


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


async def test_images_arrive_as_what_we_decoded(front: Front) -> None:
    bench, stand_in = front
    buffer = io.BytesIO()
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(buffer, "WEBP")
    url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    async with bench.http() as client:
        body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
        answer = await client.post(CHAT, json=body)
        assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    sent = stand_in.seen[-1]["messages"][0]["content"][0]["image_url"]["url"]
    assert sent.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
    assert image.size == (84, 56)  # whole patches, which the other server leaves alone
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


async def test_our_limits_stand_in_front(front: Front) -> None:
    bench, stand_in = front
    part = {"type": "image_url", "image_url": "http://169.254.169.254/latest"}
    changes: list[dict[str, Any]] = [
        {"n": 17},
        {"messages": [{"role": "user", "content": [part]}]},
        {"messages": [{"role": "user", "content": "word " * 20_000}]},
        {"response_format": {"type": "regex", "regex": "("}},
        {"mm_processor_kwargs": {"size": 1}},
        {"reasoning_effort": "very"},
        {"chat_template": "{{ x }}"},
    ]
    async with bench.http() as client:
        for change in changes:
            refused = await client.post(CHAT, json={"model": "m", "messages": HELLO, **change})
            assert refused.status_code == 400, change
    assert stand_in.seen == []


async def test_plain_completions_with_and_without_echo(front: Front) -> None:
    bench, stand_in = front
    client = bench.openai()
    request: dict[str, Any] = {"model": "m", "prompt": ["Hello", "x"], "max_tokens": 3}
    whole = await client.completions.create(**request, logprobs=1)
    assert [choice.text for choice in whole.choices] == ["abc", "abc"]
    assert whole.choices[0].logprobs.token_logprobs == [-0.5]
    stream = await client.completions.create(**request, logprobs=1, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["abc", "abc"]
    echoed = await client.completions.create(**request, echo=True, logprobs=1)
    ids = [1, *bench.ids("Hello")]
    logprobs = echoed.choices[0].logprobs
    assert echoed.choices[0].text == "Helloabc"
    assert logprobs.token_logprobs == [None, *[-i / 100 for i in ids[1:]], -0.5]
    assert stand_in.seen[-1]["prompt"][0] == ids and "stream" not in stand_in.seen[-1]


@pytest.mark.parametrize(
    ("refusal", "status", "message"),
    [
        ((400, {"error": {"message": "too odd", "param": "top_k"}}), 400, "too odd"),
        ((422, {"message": "old form", "object": "error"}), 400, "old form"),
        ((500, {"error": {"message": "boom"}}), 500, "boom"),
        ((503, {"error": {"message": "busy"}}), 503, "busy"),
        ((401, {"error": "Unauthorized"}), 500, "vLLM answered 401"),
    ],
)
async def test_refusals_of_vllm_have_our_form(
    front: Front, refusal: tuple[int, dict[str, Any]], status: int, message: str
) -> None:
    bench, stand_in = front
    stand_in.refuse = refusal
    async with bench.http() as client:
        for stream in (False, True):
            body = {"model": "m", "messages": HELLO, "stream": stream}
            answer = await client.post(CHAT, json=body)
            assert answer.status_code == status
            error = answer.json()["error"]
            assert message in error["message"]
            assert set(error) == {"message", "type", "param", "code"}


async def test_leaving_closes_the_connection_to_vllm(front: Front) -> None:
    bench, stand_in = front
    stand_in.hang = True
    async with bench.http() as client:
        body = {"model": "m", "messages": HELLO}
        task = asyncio.create_task(client.post(CHAT, json=body))
        async with asyncio.timeout(5):
            while not stand_in.num_open:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while stand_in.num_open:
                await asyncio.sleep(0.01)
    assert not bench.app.state.backend.running


async def test_no_vllm_is_503() -> None:
    plan = VllmPlan(DATA, {"port": 9, "served-model-name": "m"}, ())
    service = ScriptedService(lambda request: ())
    chat = load_chat(DATA / "tekken")
    app = over_vllm(service, plan, ServerConfig(("m",), 4096, 800))
    async with Bench(app, service, chat).http() as client:
        answer = await client.post(CHAT, json={"model": "m", "messages": HELLO})
    assert answer.status_code == 503 and "does not answer" in answer.text
