"""Every limit: shown at /health, on by default, changeable, and what exceeds it gets its status."""

import asyncio
import base64
import dataclasses
import io
from typing import Any

import pytest
from PIL import Image

from halfbyte.errors import UsageError
from halfbyte.server.config import Limits, read_limits
from server.conftest import MakeBench

EOS = 2
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
# Other tests: drain_s in flows (the process), retry_after_s with each 429 and 503 here.
# Those of connections in flows (test_server_connections).
TESTED_ELSEWHERE = {"drain_s", "retry_after_s", "connections", "head_s", "body_s", "stall_s"}


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **change}


def picture(width: int, height: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 90).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def seen(*pictures: dict[str, Any]) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(pictures)}])


def said(num_parts: int) -> dict[str, Any]:
    part = {"type": "text", "text": "x"}
    return chat(messages=[{"role": "user", "content": [part] * num_parts}])


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def form(schema: dict[str, Any]) -> dict[str, Any]:
    inner = {"name": "x", "schema": schema, "strict": True}
    return chat(response_format={"type": "json_schema", "json_schema": inner})


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


long = {"type": "object", "description": "d" * 600}
CASES: list[tuple[str, int, str, Any, Any, int]] = [
    # limit, its value, path, a body within it, one over it, the status
    ("body_bytes", 300, CHAT, chat(), chat(user="u" * 300), 413),
    ("body_brackets", 3, CHAT, chat(), chat(user="["), 400),
    ("body_nodes", 3, CHAT, chat(user="[[[{{,:"), chat(metadata={}), 400),
    ("body_values", 9, CHAT, chat(user="," * 99), chat(metadata=[1] * 12), 400),
    ("body_keys", 6, CHAT, chat(user='":' * 99), chat(metadata={"a": 1, "b": 2, "c": 3}), 400),
    ("body_texts", 9, CHAT, chat(user='","' * 99), chat(metadata=["x"] * 9), 400),
    ("body_plain_bytes", 99, CHAT, chat(user=" " * 200), chat(metadata=[10**90]), 400),
    ("parts", 2, CHAT, said(2), said(3), 400),
    ("stop_tokens", 2, CHAT, chat(stop_token_ids=[5, 6]), chat(stop_token_ids=[5] * 3), 400),
    ("biased_tokens", 2, CHAT, chat(logit_bias={"5": 1, "6": 1}),
     chat(logit_bias={"5": 1, "6": 1, "7": 1}), 400),
    ("messages", 3, CHAT, chat(messages=HELLO * 3), chat(messages=HELLO * 4), 400),
    ("choices", 2, CHAT, chat(n=2), chat(n=3), 400),
    ("choices", 2, "/v1/completions", {"model": "m", "prompt": "x", "n": 2},
     {"model": "m", "prompt": "x", "n": 3}, 400),
    ("stops", 2, CHAT, chat(stop=["a", "b"]), chat(stop=["a", "b", "c"]), 400),
    ("stop_chars", 3, CHAT, chat(stop="abc"), chat(stop="abcd"), 400),
    ("prompts", 3, "/v1/completions", {"model": "m", "prompt": ["x"] * 3},
     {"model": "m", "prompt": ["x", "y"], "n": 2}, 400),
    ("tools", 1, CHAT, chat(tools=[tool("a")]), chat(tools=[tool("a"), tool("b")]), 400),
    ("images", 1, CHAT, seen(picture(28, 28)), seen(picture(28, 28), picture(28, 28)), 400),
    ("image_bytes", 9000, CHAT, seen(picture(28, 28)), seen(picture(280, 280)), 400),
    ("image_pixels", 800, CHAT, seen(picture(28, 28)), seen(picture(29, 28)), 400),
    ("request_pixels", 800, CHAT, seen(picture(28, 28)), seen(*[picture(21, 21)] * 2), 400),
    ("schema_bytes", 500, CHAT, form({"type": "object"}), form(long), 400),
    ("schema_bytes", 700, CHAT, chat(tools=[tool("a")]), chat(tools=[tool("a", long)]), 400),
    ("schema_depth", 4, CHAT, form(nested(3)), form(nested(5)), 400),
    ("schema_depth", 4, CHAT, chat(tools=[tool("a", {"properties": {"b": {}}})]),
     chat(tools=[tool("a", {"properties": {"b": nested(3)}})]), 400),
    ("queued_requests", 2, CHAT, chat(n=2), chat(n=3), 429),
    ("requests_per_key", 2, CHAT, chat(n=2), chat(n=3), 429),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "path", "within", "over", "status"),
    CASES,
    ids=[f"{case[0]} {number}" for number, case in enumerate(CASES)],
)
async def test_over_the_limit(
    make_bench: MakeBench, name: str, value: int, path: str, within: Any, over: Any, status: int
) -> None:
    limits = dataclasses.replace(Limits(), **{name: value, "retry_after_s": 7})
    bench = make_bench("x", EOS, limits=limits)
    async with bench.http() as client:
        assert (await client.get("/health")).json()["limits"][name] == value
        allowed = await client.post(path, json=within)
        assert allowed.status_code == 200, allowed.text
        for stream in (False, True):
            refused = await client.post(path, json={**over, "stream": stream})
            assert refused.status_code == status, refused.text
            error = refused.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
            assert refused.headers.get("retry-after") == ("7" if status == 429 else None)
        assert not bench.service.running and not bench.app.state.backend.running


async def test_wall_clock_is_504_before_and_an_error_frame_after_the_start(
    make_bench: MakeBench,
) -> None:
    bench = make_bench("one two", EOS, service={"hang_at": 0}, limits=Limits(request_s=0.05))
    async with bench.http() as client:
        for stream in (False, True):
            late = await client.post(CHAT, json=chat(stream=stream))
            assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        bench.service.hang_at = 1
        cut = await client.post(CHAT, json=chat(stream=True))
        assert cut.status_code == 200 and '"code":"timeout"' in cut.text
        assert cut.text.endswith("data: [DONE]\n\n")
    assert not bench.service.running


async def test_compiling_too_long_is_400(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench("{}", EOS, limits=Limits(compile_s=0.05))
    compiler = bench.app.state.backend.preparer.compiler
    compile_now = compiler.compile
    waiting = asyncio.get_running_loop()

    def slowly(*arguments: Any, **options: Any) -> Any:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), waiting).result()
        return compile_now(*arguments, **options)

    monkeypatch.setattr(compiler, "compile", slowly)
    async with bench.http() as client:
        slow = await client.post(CHAT, json=form({"type": "object"}))
    assert slow.status_code == 400 and slow.json()["error"]["code"] == "schema_too_complex"


async def test_token_requests_have_their_own_room(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, limits=Limits(token_requests=1, queued_requests=1))
    text = "word " * 2000
    async with bench.http() as client:
        for path, body in (
            ("/tokenize", {"prompt": text}),
            ("/detokenize", {"tokens": [5] * 1000}),
        ):
            both = await asyncio.gather(*(client.post(path, json=body) for _ in range(2)))
            assert sorted(answer.status_code for answer in both) == [200, 429]
            assert "retry-after" in max(both, key=lambda answer: answer.status_code).headers
        assert (await client.post("/tokenize", json={"prompt": text})).status_code == 200


async def test_keys_have_their_own_room(make_bench: MakeBench) -> None:
    bench = make_bench(
        "x", EOS, service={"hang_at": 0}, api_keys=("a", "b"), limits=Limits(requests_per_key=1)
    )
    async with bench.http() as client:

        def ask(key: str) -> asyncio.Task[Any]:
            headers = {"Authorization": f"Bearer {key}"}
            return asyncio.create_task(client.post(CHAT, json=chat(), headers=headers))

        first = ask("a")
        while not bench.service.running:
            await asyncio.sleep(0)
        refused = await ask("a")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        other = ask("b")
        while len(bench.service.running) < 2:
            await asyncio.sleep(0)
        for task in (first, other):
            task.cancel()
        await asyncio.gather(first, other, return_exceptions=True)


def test_every_limit_is_tested_and_on() -> None:
    names = {one.name for one in dataclasses.fields(Limits)}
    tested = {case[0] for case in CASES} | {"request_s", "compile_s", "token_requests"}
    assert tested | TESTED_ELSEWHERE == names
    assert all(getattr(Limits(), name) > 0 for name in names)


def test_limits_are_read_strictly() -> None:
    changed = read_limits(["images=4", "request_s=1.5", "choices=0"], Limits(drain_s=3))
    assert (changed.images, changed.request_s, changed.choices) == (4, 1.5, 0)
    assert changed.drain_s == 3 and changed.messages == Limits().messages
    for wrong in (
        "images",
        "images=",
        "images=x",
        "images=1.5",
        "images=-1",
        "request_s=nan",
        "x=1",
    ):
        with pytest.raises(UsageError, match="--limit"):
            read_limits([wrong], Limits())
