"""A client that leaves: over real sockets, at every stage of a request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn

from server.conftest import Bench, MakeBench

EOS = 2


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(bench.app, port=0, log_level="warning", ws="none"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


def request(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def send(
    port: int, body: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(body))
    await writer.drain()
    return reader, writer


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("hang_at", [0, 2])
async def test_leaving_aborts_at_once(
    make_bench: MakeBench, stream: bool, n: int, hang_at: int
) -> None:
    """Before the first token (queued, prefill) and in the middle; one choice and several."""
    bench = make_bench("Hello you", EOS, service={"hang_at": hang_at})
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream, "n": n}
    metrics = bench.app.state.backend.metrics
    async with running(bench) as port:
        reader, writer = await send(port, body)
        await until(lambda: len(bench.service.running) == n)
        if stream and hang_at:
            await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: not bench.service.running)
        await until(lambda: metrics.running == 0)
        assert len(bench.service.aborted) == n
        assert metrics.disconnects == 1
    assert len(asyncio.all_tasks()) == 1


async def test_leaving_inside_the_body_leaves_nothing(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS)
    async with running(bench) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: bench.app.state.backend.metrics.disconnects == 1)
    assert not bench.service.requests


async def test_stream_is_sent_as_it_comes_and_the_connection_is_kept(make_bench: MakeBench) -> None:
    bench = make_bench("a b c", EOS, service={"delay_s": 0.05})
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with running(bench) as port:
        reader, writer = await send(port, body)
        await reader.readuntil(b'"content":"a"')
        assert bench.service.running
        await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
        writer.write(request({**body, "stream": False}))
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in answer
        writer.close()
