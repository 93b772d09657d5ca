"""A scripted OpenAI-compatible server on a thread of its own, for tests that need the wire."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reply = tuple[int, dict[str, Any]]
Script = Callable[[dict[str, Any]], Reply]


def completion(
    content: str,
    *,
    reasoning: str | None = None,
    finish_reason: str = "stop",
    tokens: int = 8,
) -> Reply:
    """A 200 with one choice."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return 200, {
        "id": "x", "object": "chat.completion", "created": 1, "model": "stub",
        "choices": [choice], "usage": usage,
    }  # fmt: skip


def refusal(status: int, message: str, code: str = "server_error") -> Reply:
    """An OpenAI error body."""
    return status, {"error": {"message": message, "type": code, "param": None, "code": code}}


@dataclass
class Stub:
    """Where the server listens and what it was asked."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(
    script: Script,
    *,
    delay_s: float = 0.0,
    context_tokens: int | None = None,
    tried: Script = lambda request: completion("A"),
) -> Iterator[Stub]:
    """Serve until the block ends; `script` maps a request body to a reply.

    tried  does so for those of the start-up check, which ask for one token
    """
    stub = Stub()
    ready, stop = threading.Event(), threading.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                size = next(
                    (int(line.split(":")[1]) for line in head.lower().split("\r\n")
                     if line.startswith("content-length:")), 0,
                )  # fmt: skip
                body = await reader.readexactly(size)
                status, answer = await respond(head.split(" ")[1], body)
                data = json.dumps(answer).encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(data)}\r\n\r\n".encode()
                    + data
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()

    async def respond(path: str, body: bytes) -> Reply:
        if path.endswith("/models"):
            entry: dict[str, Any] = {"id": "stub", "object": "model"}
            if context_tokens:
                entry["max_model_len"] = context_tokens
            return 200, {"object": "list", "data": [entry]}
        if not path.endswith("/chat/completions"):
            return refusal(404, path)
        request = json.loads(body)
        if request.get("max_tokens") == 1:
            stub.tried.append(request)
            return tried(request)
        stub.requests.append(request)
        if delay_s:
            await asyncio.sleep(delay_s)
        return script(request)

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield stub
    finally:
        stop.set()
        thread.join(5)
