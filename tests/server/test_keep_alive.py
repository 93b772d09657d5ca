"""A stream is never silent for long: proxies cut connections that look dead."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from halfbyte.errors import RequestError
from halfbyte.server.api.stream import DONE, EventStream, frame


async def sent(frames: AsyncGenerator[bytes, None], **options: Any) -> httpx.Response:
    response = EventStream(
        frames,
        deadline_s=5,
        headers={"x-own": "yes"},
        on_disconnect=lambda: None,
        retry_after_s=1,
        **{"head_wait_s": 0.05, "keep_alive_s": 0.1, **options},
    )
    transport = httpx.ASGITransport(app=response)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post("/v1/chat/completions")


async def slow(wait_s: float, error: Exception | None = None) -> AsyncGenerator[bytes, None]:
    await asyncio.sleep(wait_s)
    if error is not None:
        raise error
    yield frame({"a": 1})
    yield DONE


async def test_quick_answers_have_no_comments() -> None:
    answer = await sent(slow(0))
    assert answer.status_code == 200 and answer.text == 'data: {"a":1}\n\ndata: [DONE]\n\n'
    assert answer.headers["x-own"] == "yes"


async def test_comments_fill_the_wait_for_the_first_token() -> None:
    answer = await sent(slow(0.5))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    comments = answer.text.count(": keep-alive\n\n")
    assert 2 <= comments <= 6
    assert answer.text.endswith('data: {"a":1}\n\ndata: [DONE]\n\n')


async def test_an_answer_that_comes_steadily_has_no_comments() -> None:
    """However long it takes: a comment stands for silence alone."""

    async def steady() -> AsyncGenerator[bytes, None]:
        for number in range(13):
            yield frame({"a": number})
            await asyncio.sleep(0.1)

    answer = await sent(steady(), keep_alive_s=1.0)
    assert answer.text.count("data: ") == 13 and ": keep-alive" not in answer.text


async def test_an_error_that_comes_soon_keeps_its_status() -> None:
    answer = await sent(slow(0, RequestError("no", status=404)), head_wait_s=2)
    assert answer.status_code == 404 and answer.json()["error"]["message"] == "no"


async def test_an_error_that_comes_late_is_in_the_stream() -> None:
    answer = await sent(slow(0.2, RequestError("no", status=404)))
    assert answer.status_code == 200
    assert '"message":"no"' in answer.text and answer.text.endswith("data: [DONE]\n\n")


async def test_a_silence_between_tokens_is_filled_too() -> None:
    async def frames() -> AsyncGenerator[bytes, None]:
        yield frame({"a": 1})
        await asyncio.sleep(0.35)
        yield DONE

    answer = await sent(frames())
    assert 1 <= answer.text.count(": keep-alive\n\n") <= 4
