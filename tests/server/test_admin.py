"""The admin listener's routes, and what the access log and traces say of a request."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from halfbyte.server.http.admin import create_admin
from halfbyte.server.http.app import create_app
from server.conftest import Bench, MakeBench

EOS = 2
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def admin_of(bench: Bench) -> httpx.AsyncClient:
    app = create_admin(bench.app.state.backend, access_log=None)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://admin")


async def until_running(admin: httpx.AsyncClient) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while True:
            found = (await admin.get("/requests")).json()["requests"]
            if found and found[0]["first_token_ms"] is not None:
                return dict(found[0])
            await asyncio.sleep(0.01)


async def test_a_running_answer_is_seen_and_aborted(make_bench: MakeBench) -> None:
    bench = make_bench("one two three", EOS, service={"delay_s": 0.02})
    bench.service.script = lambda request: bench.ids("one two three " * 300)
    async with bench.http() as client, admin_of(bench) as admin:
        asked = asyncio.create_task(
            client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
        )
        seen = await until_running(admin)
        assert seen["request_id"] == "mine" and seen["key"] == "anyone"
        assert seen["prompt_tokens"] > 0 and seen["completion_tokens"] > 0 and seen["age_s"] >= 0
        assert (await admin.post("/requests/none/abort")).status_code == 404
        assert (await admin.post(f"/requests/{seen['answer_id']}/abort")).status_code == 200
        answer = await asked
        assert answer.status_code == 503 and "aborted" in answer.json()["error"]["message"]
        assert (await admin.get("/requests")).json() == {"requests": []}


async def test_draining_and_back(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    async with bench.http() as client, admin_of(bench) as admin:
        assert (await admin.post("/drain")).json() == {"draining": True, "running": 0}
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        await admin.post("/resume")
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_state_stacks_metrics_and_cache(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS)
    async with admin_of(bench) as admin:
        state = (await admin.get("/state")).json()
        assert state["process"]["threads"] >= 1 and state["process"]["tasks"] >= 1
        assert state["engine"]["total_blocks"] == 100 and state["running"] == 0
        told = (await admin.get("/stacks")).text
        assert "MainThread" in told and told.endswith("scripted")
        assert "halfbyte_process_threads" in (await admin.get("/metrics")).text
        await admin.post("/prefix-cache/clear")
        assert bench.service.calls == ["clear"]
        missing = await admin.get("/v1/models")
        assert missing.status_code == 404 and set(missing.json()) == {"error"}


async def test_admin_routes_are_not_on_the_public_listener_and_ask_for_the_key(
    make_bench: MakeBench,
) -> None:
    bench = make_bench("x", EOS, api_keys=("sesame",))
    key = {"Authorization": "Bearer sesame"}
    async with bench.http() as client, admin_of(bench) as admin:
        for path in ("/drain", "/resume", "/prefix-cache/clear", "/requests/x/abort"):
            assert (await client.post(path, headers=key)).status_code == 404
            assert (await admin.post(path)).status_code == 401
        for path in ("/requests", "/state", "/stacks"):
            assert (await client.get(path, headers=key)).status_code == 404
            assert (await admin.get(path)).status_code == 401
            assert (await admin.get(path, headers=key)).status_code == 200


async def test_access_log_says_what_became_of_a_request(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS)
    backend = bench.app.state.backend
    lines: list[dict[str, Any]] = []
    bench.app = create_app(
        backend.service,
        bench.chat,
        backend.config,
        access_log=lambda s: lines.append(json.loads(s)),
    )
    async with bench.http() as client:
        await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        await client.post("/v1/responses", json={"model": "m", "input": "x"})
        await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    for line, choices in zip(lines, (2, 1, 1, 1), strict=True):
        assert line["model"] == "m" and line["cached_tokens"] == 3
        assert line["finish_reasons"] == ["stop"] * choices
        assert line["completion_tokens"] == choices * (len(bench.ids("Hello")) + 1)
        assert line["prompt_tokens"] > 0 and line["first_token_ms"] >= 0 and line["time"]
    assert len({line["answer_id"] for line in lines}) == 4


async def test_spans_carry_the_callers_trace_and_the_tokens(make_bench: MakeBench) -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from halfbyte.server.ops.tracing import Tracing

    exporter = export.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    bench = make_bench("Hello", EOS)
    backend = bench.app.state.backend
    bench.app = create_app(
        backend.service, bench.chat, backend.config, access_log=None, tracing=Tracing(provider)
    )
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with bench.http() as client:
        await client.post(
            "/v1/chat/completions",
            json={**CHAT, "stream": True},
            headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-Id": "r"},
        )
        await client.post("/v1/chat/completions", json={})
        bench.service.fail_at = 0
        await client.post("/v1/chat/completions", json=CHAT)
    first, second, third = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == trace
    said = dict(first.attributes)
    assert said["http.route"] == "/v1/chat/completions" and said["halfbyte.request_id"] == "r"
    assert said["gen_ai.usage.output_tokens"] == len(bench.ids("Hello")) + 1
    assert said["gen_ai.response.finish_reasons"] == ("stop",)
    assert second.attributes["http.response.status_code"] == 400
    assert not third.status.is_ok and first.status.is_ok
