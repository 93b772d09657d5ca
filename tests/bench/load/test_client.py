"""One exchange with a server that does what it should not, and how a server wants to be asked."""

import time
from typing import Any

import httpx
import pytest

from bench.load.scripted import Server, chunk, refusal, stream, usage
from halfbyte.bench.load.client import Client, Exchange, Manner, greet
from halfbyte.errors import UnsupportedError, UsageError

DONE = "data: [DONE]\n\n"
HELLO = [{"role": "user", "content": "Hello"}]


async def ask(answer: httpx.Response, *, stall_s: float = 5.0) -> Exchange:
    exchange = Exchange(time.perf_counter())
    server = Server(overrides=[answer])
    client = Client(server.client, "http://t/v1", "m", manner=Manner({}), stall_s=stall_s)
    await client.ask(exchange, HELLO, 4)
    await client.aclose()
    assert exchange.ended >= exchange.started
    return exchange


async def test_only_what_carries_text_is_a_token() -> None:
    frames = (
        chunk(role="assistant"), ": keep-alive\n\n", chunk(""), chunk("a"), chunk(reasoning="b"),
        chunk(reasoning_content="c"), chunk(tool_calls=[{"index": 0}]), chunk(finish="stop"),
        usage(9, 4, 3), DONE,
    )  # fmt: skip
    exchange = await ask(stream(*frames))
    assert exchange.is_whole
    assert len(exchange.events) == 4
    assert (exchange.prompt_tokens, exchange.answer_tokens, exchange.cached_tokens) == (9, 4, 3)
    assert (exchange.text, exchange.finish) == ("a", "stop")


async def test_pieces_have_the_times_they_came_at() -> None:
    frames = (0.05, chunk("a"), 0.1, chunk("b"), chunk("c"), chunk(finish="stop"), DONE)
    exchange = await ask(stream(*frames))
    first, second, third = (event - exchange.started for event in exchange.events)
    assert 0.05 <= first < second <= third
    assert second - first >= 0.1
    # In one piece of the network, and so at once.
    assert third - second < 0.1


@pytest.mark.parametrize(
    "answer, kind, said",
    [
        (lambda: stream(chunk("a"), None), "broken off", "peer closed"),
        (lambda: stream(chunk("a")), "broken off", "ended before the answer did"),
        (lambda: stream(chunk("a"), 'data: {"error": {"message": "out of cache"}}\n\n', DONE),
         "error in the stream", "out of cache"),
        (lambda: stream(chunk("a"), "data: {nonsense\n\n"), "unreadable stream", "nonsense"),
        (lambda: stream(chunk("a"), "data: [1]\n\n"), "unreadable stream", "[1]"),
        (lambda: stream(chunk(""), chunk(finish="stop"), DONE), "empty answer", "stop"),
        (lambda: refusal(429, "queue is full"), "status 429", "queue is full"),
        (lambda: refusal(400, "context_length_exceeded"), "status 400", "context_length"),
        (lambda: httpx.Response(500, text="<h1>oh</h1>"), "status 500", "<h1>oh</h1>"),
        (lambda: httpx.Response(200, json={"choices": []}), "no stream", "application/json"),
    ],
)  # fmt: skip
async def test_a_failure_has_its_kind_and_the_servers_words(
    answer: Any, kind: str, said: str
) -> None:
    exchange = await ask(answer())
    assert exchange.error == kind
    assert said in exchange.detail
    assert not exchange.is_whole


async def test_a_silent_stream_is_stalled_though_comments_keep_it_open() -> None:
    comments = [frame for _ in range(40) for frame in (0.02, ": keep-alive\n\n")]
    exchange = await ask(stream(chunk("a"), *comments, chunk("b"), DONE), stall_s=0.2)
    assert (exchange.error, len(exchange.events)) == ("stalled", 1)
    assert "0.2 s" in exchange.detail


async def test_a_slow_stream_is_not_stalled() -> None:
    pieces = [frame for _ in range(5) for frame in (0.1, chunk("a"))]
    exchange = await ask(stream(*pieces, chunk(finish="stop"), DONE), stall_s=0.4)
    assert exchange.is_whole


async def test_nobody_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    exchange = Exchange(time.perf_counter())

    def connect() -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(refuse))

    client = Client(connect, "http://t/v1", "m", manner=Manner({}))
    await client.ask(exchange, HELLO, 4)
    await client.aclose()
    assert (exchange.error, exchange.detail) == ("not reachable", "Connection refused")


# --- how a server wants to be asked ---------------------------------------------------------


async def greeted(server: Server) -> Manner:
    return await greet(server.client, "http://t/v1", "m", "salt")


async def test_a_server_that_takes_everything() -> None:
    server = Server(overhead=7)
    manner = await greeted(server)
    assert manner.fields == {
        "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}
    }  # fmt: skip
    assert (manner.limit, manner.tokens_per_word, manner.overhead_tokens) == ("max_tokens", 2.0, 7)
    assert manner.tools_tokens == 50
    assert manner.notes == ()
    assert manner.num_words(1000) == 500


@pytest.mark.parametrize("unknown", [
    ("ignore_eos",), ("temperature",), ("ignore_eos", "stream_options"), ("max_tokens",),
    ("max_tokens", "ignore_eos", "temperature"),
])  # fmt: skip
@pytest.mark.parametrize("names_it", [True, False])
async def test_fields_that_a_server_refuses_are_left_out_and_it_is_said(
    unknown: tuple[str, ...], names_it: bool
) -> None:
    def fails(body: dict[str, Any]) -> httpx.Response | None:
        bad = next((name for name in unknown if name in body), None)
        if bad is None:
            return None
        # The name of the limit is told by every server that wants another.
        said = bad if names_it or bad == "max_tokens" else "a field"
        return refusal(400, f"Unsupported: {said}")

    manner = await greeted(Server(fails=fails))
    assert not set(unknown) & {*manner.fields, manner.limit}
    for name in set(unknown) - {"max_tokens"}:
        assert any(name in note for note in manner.notes)
    if names_it:  # and nothing else is
        assert len(manner.fields) == 3 - len(set(unknown) - {"max_tokens"})


async def test_a_server_that_counts_nothing() -> None:
    manner = await greeted(Server(counts=False))
    assert manner.tokens_per_word is None
    assert manner.num_words(10) == 10
    assert "counts no tokens" in manner.notes[0]


async def test_a_model_without_tools_gets_results_as_the_users() -> None:
    def fails(body: dict[str, Any]) -> httpx.Response | None:
        return refusal(400, "no tools here") if "tools" in body else None

    manner = await greeted(Server(fails=fails))
    assert manner.tools_tokens is None
    assert "no tools here" in manner.notes[0]


@pytest.mark.parametrize("status, said", [
    (401, "asks for an API key .*--api-key-env"), (403, "--api-key-env"),
    (404, "no model 'm' for chats"), (400, "does not answer a short request: status 400: no"),
    (503, "status 503"),
])  # fmt: skip
async def test_a_server_that_refuses_whatever_it_is_sent(status: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        await greeted(Server(fails=lambda body: refusal(status, "no")))


async def test_a_server_that_does_not_stream() -> None:
    with pytest.raises(UnsupportedError, match="does not stream"):
        await greeted(Server(fails=lambda body: httpx.Response(200, json={})))
