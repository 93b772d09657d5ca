"""What a refused request leaves behind goes at once, not with a collection of garbage.

A full collection holds up everything that runs; a large request among the garbage makes it long.
"""

import gc
from typing import Any

import pytest

from server.conftest import MakeBench


def body_of(path: str, count: int) -> dict[str, Any]:
    """A request of so many messages, more than the context holds."""
    name = "input" if path.endswith("responses") else "messages"
    body: dict[str, Any] = {"model": "m", name: [{"role": "user", "content": "x"}] * count}
    if path == "/v1/messages":
        body["max_tokens"] = 5
    return body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_refused_requests_are_no_garbage(path: str, make_bench: MakeBench) -> None:
    bench = make_bench("x", max_model_len=800)
    collected = []
    async with bench.http() as client:
        for _ in range(3):
            body = body_of(path, 1000)
            gc.collect()
            gc.disable()
            try:
                answer = await client.post(path, json=body)
                collected.append(gc.collect())
            finally:
                gc.enable()
            assert answer.status_code == 400, answer.text
    # A handful of the framework's own objects; each message of the request would be another.
    assert max(collected) < 200
