import base64
import re
import time
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route

from halfbyte.chat.template_format import TemplateFormat
from halfbyte.errors import CheckpointError
from halfbyte.server.config import Limits, ServerConfig
from halfbyte.server.http.admin import create_admin
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from server.conftest import MakeBench
from server.scripted import ScriptedService

EOS = 2
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


async def test_models_and_aliases(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, model_names=("m", "org/alias"))
    client = bench.openai()
    assert [model.id async for model in client.models.list()] == ["m", "org/alias"]
    assert (await client.models.retrieve("org/alias")).id == "org/alias"
    answer = await client.chat.completions.create(**{**CHAT, "model": "org/alias"})
    assert answer.model == "m"


async def test_tokenize_and_back(make_bench: MakeBench) -> None:
    bench = make_bench()
    async with bench.http() as client:
        text = "Hello [INST] é"
        plain = (await client.post("/tokenize", json={"model": "m", "prompt": text})).json()
        assert plain["tokens"] == [1, *bench.ids(text)] and plain["count"] == len(plain["tokens"])
        bare = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        answer = (await client.post("/tokenize", json=bare)).json()
        assert answer["tokens"] == bench.ids(text) and len(answer["token_strs"]) == answer["count"]
        back = await client.post("/detokenize", json={"tokens": plain["tokens"]})
        assert back.json() == {"prompt": "<s>" + text}
        chat = (await client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        await client.post("/v1/chat/completions", json=CHAT)
        assert tuple(chat["tokens"]) == bench.service.requests[0].prompt_token_ids
        for bad in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
            assert (await client.post("/tokenize", json=bad)).status_code == 400
        assert (await client.post("/detokenize", json={"tokens": [-1]})).status_code == 400


async def test_keys_guard_every_route_but_health(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, api_keys=("first", "sécond"))
    paths = [
        ("GET", path) for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/nowhere")
    ]
    paths += [("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/tokenize")]
    async with bench.http() as client:
        for method, path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert "WWW-Authenticate" in answer.headers
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
        basic = base64.b64encode("me:sécond".encode()).decode()
        allowed = await client.get("/v1/models", headers={"Authorization": f"Basic {basic}"})
        assert allowed.status_code == 200
    assert await bench.openai("first").chat.completions.create(**CHAT)
    with pytest.raises(openai.AuthenticationError):
        await bench.openai("firs").chat.completions.create(**CHAT)


async def test_no_route_but_liveness_is_open(make_bench: MakeBench) -> None:
    """By the routes that are there, so that a new one is asked for its key without being named."""
    bench = make_bench("x", EOS, api_keys=("k",))
    admin = create_admin(bench.app.state.backend, access_log=None)
    for app, least in ((bench.app, 14), (admin, 10)):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = [
                (method, re.sub(r"\{[^}]*\}", "x", route.path))
                for route in app.routes
                if isinstance(route, Route)
                for method in route.methods or ()
            ]
            assert len(asked) >= least
            open_ = {
                path
                for method, path in asked
                if (await client.request(method, path)).status_code != 401
            }
            # The page's own files hold no secret; what it does asks for the key.
            page = {"/", "/web/x"} if app is bench.app else set()
            assert open_ == {"/health", "/health/ready"} | page


async def test_health_shows_limits_and_death(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, facts=(("kv_cache_tokens", 123),))
    async with bench.http() as client:
        health = (await client.get("/health")).json()
        assert health["status"] == "ok" and health["kv_cache_tokens"] == 123
        assert health["limits"]["choices"] == 16 and health["engine"]["free_blocks"] == 100
        bench.service.is_alive = False
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert "halfbyte_engine_alive 0.0" in (await client.get("/metrics")).text


async def test_limits_of_the_queue_are_429_with_a_time(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, limits=Limits(queued_requests=2))
    async with bench.http() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "n": 3})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    bench = make_bench("x", EOS, limits=Limits(requests_per_key=1))
    async with bench.http() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        assert answer.status_code == 429


async def test_draining_refuses_new_requests(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    bench.app.state.backend.admission.is_draining = True
    async with bench.http() as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200


async def test_wall_clock_ends_an_answer(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS, service={"hang_at": 1}, limits=Limits(request_s=0.2))
    async with bench.http() as client:
        whole = await client.post("/v1/chat/completions", json=CHAT)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert streamed.status_code == 200 and '"timeout"' in streamed.text
    assert not bench.service.running and len(bench.service.aborted) == 2
    assert bench.app.state.backend.metrics.running == 0


async def test_metrics_count_what_happened(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS, vllm_metric_names=True)
    async with bench.http() as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1})
        await client.get("/secret/path")
        text = (await client.get("/metrics")).text
    lines = set(text.splitlines())
    assert 'vllm:kv_cache_usage_perc{model_name="m"} 0.0' in lines
    assert 'halfbyte_answers_total{reason="stop"} 1.0' in lines
    assert 'halfbyte_answers_total{reason="length"} 1.0' in lines
    assert 'halfbyte_http_requests_total{route="/v1/chat/completions",status="200"} 2.0' in lines
    assert f"halfbyte_completion_tokens_total {len(bench.ids('Hello')) + 2}.0" in lines
    assert "halfbyte_answers_running 0.0" in lines and "halfbyte_engine_free_blocks 100.0" in lines
    assert 'halfbyte_first_token_seconds_bucket{le="+Inf"} 2.0' in lines
    assert 'vllm:request_success_total{finished_reason="stop",model_name="m"} 1.0' in lines
    assert "secret" not in text


async def test_metrics_hold_times_sizes_and_cached_tokens(make_bench: MakeBench) -> None:
    bench = make_bench("Hello world", EOS, service={"delay_s": 0.03})
    started = time.perf_counter()
    async with bench.http() as client:
        for stream in (False, True):
            await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        took = time.perf_counter() - started
        text = (await client.get("/metrics")).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    num_answer = len(bench.ids("Hello world")) + 1
    num_prompt = len(bench.service.requests[0].prompt_token_ids)
    least = 0.03 * (num_answer - 1)
    assert 2 * least <= float(found["halfbyte_request_seconds_sum"]) <= took
    assert 2 * 0.03 <= float(found["halfbyte_first_token_seconds_sum"]) <= took - 2 * least + 0.06
    between = float(found["halfbyte_token_seconds_sum"])
    assert 2 * (least - 0.03) <= between <= took
    # What the scripted engine says of every answer.
    assert found["halfbyte_cached_prompt_tokens_total"] == "6.0"
    assert float(found["halfbyte_prompt_size_tokens_sum"]) == 2 * num_prompt
    assert float(found["halfbyte_answer_size_tokens_sum"]) == 2 * num_answer
    assert found["halfbyte_prompt_tokens_total"] == str(2.0 * num_prompt)
    for name in ("request_seconds", "prompt_size_tokens", "answer_size_tokens"):
        assert found[f"halfbyte_{name}_count"] == "2.0", name


async def test_request_ids_are_kept_or_made(make_bench: MakeBench) -> None:
    async with make_bench("x", EOS).http() as client:
        sent = await client.get("/v1/models", headers={"X-Request-Id": "abc-1"})
        assert sent.headers["x-request-id"] == "abc-1"
        hostile = await client.get("/v1/models", headers={"X-Request-Id": "a" * 500})
        assert hostile.headers["x-request-id"].startswith("req-")


async def test_openapi_describes_bodies_and_the_error(make_bench: MakeBench) -> None:
    async with make_bench().http() as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatRequest"
    assert "422" not in operation["responses"] and "429" in operation["responses"]
    text = str(document)
    for name in set(document["components"]["schemas"]):
        assert f"#/components/schemas/{name}" in text


async def test_lifespan_starts_and_drains_the_engine(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    async with bench.app.router.lifespan_context(bench.app):
        assert bench.service.calls == ["start"]
    assert bench.service.calls == ["start", "stop"]
    assert bench.app.state.backend.admission.is_draining


async def test_two_apps_do_not_share_anything(make_bench: MakeBench) -> None:
    one, two = make_bench("one", EOS), make_bench("two", EOS)
    first = await one.openai().chat.completions.create(**CHAT)
    second = await two.openai().chat.completions.create(**CHAT)
    assert (first.choices[0].message.content, second.choices[0].message.content) == ("one", "two")
    assert one.app.state.backend.metrics.finished == {"stop": 1}


def test_tokenizer_larger_than_the_model_is_refused(chatml: TemplateFormat) -> None:
    service = ScriptedService(lambda request: ())
    with pytest.raises(CheckpointError, match="435 tokens, the model only 400"):
        create_app(Supervisor(service, lambda: service), chatml, ServerConfig(("m",), 100, 400))


async def test_model_cards_have_what_each_client_reads(make_bench: MakeBench) -> None:
    bench = make_bench(model_names=("m", "n"))
    async with bench.http() as http:
        ours = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/n")).json()
        headers = {"anthropic-version": "2023-06-01"}
        theirs = (await http.get("/v1/models", headers=headers)).json()
    assert [card["id"] for card in ours["data"]] == ["m", "n"] and one == ours["data"][1]
    assert one["type"] == "base" and one["aliases"] == ["m"]
    assert one["capabilities"]["function_calling"] and one["max_context_length"] == 4096
    assert theirs["first_id"] == "m" and theirs["last_id"] == "n" and not theirs["has_more"]
    assert {card["type"] for card in theirs["data"]} == {"model"}


@pytest.mark.parametrize(
    "path, meant",
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", None),
        ("/v2/chat/completions", None),
        ("/embeddings", None),
    ],
)
async def test_a_wrong_base_url_is_told_the_right_one(
    make_bench: MakeBench, path: str, meant: str | None
) -> None:
    async with make_bench().http() as http:
        answer = await http.post(path, json={})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404
    assert (f"did you mean {meant}?" in message) if meant else ("mean" not in message)


async def test_harnesses_find_the_special_tokens(make_bench: MakeBench) -> None:
    async with make_bench().http() as http:
        told = (await http.get("/tokenizer_info")).json()
    assert told["bos_token"] == "<s>" and told["eos_token"] == "</s>"
    assert told["eos_token_id"] == 2
