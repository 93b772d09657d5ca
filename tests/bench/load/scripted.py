"""An OpenAI-compatible server that does what a test tells it to, behind httpx without a socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Answer = Callable[[dict[str, Any]], httpx.Response]


def chunk(text: str | None = None, *, finish: str | None = None, **delta: Any) -> str:
    if text is not None:
        delta["content"] = text
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice]}) + "\n\n"


def usage(prompt: int, answer: int, cached: int | None = None) -> str:
    told: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": answer}
    if cached is not None:
        told["prompt_tokens_details"] = {"cached_tokens": cached}
    return "data: " + json.dumps({"choices": [], "usage": told}) + "\n\n"


def stream(*frames: str | float | None) -> httpx.Response:
    """Frames in their order; a number is a pause in seconds, None ends the connection at once."""

    async def send() -> AsyncIterator[bytes]:
        for frame in frames:
            if frame is None:
                raise httpx.RemoteProtocolError("peer closed connection")
            if isinstance(frame, float):
                await asyncio.sleep(frame)
            else:
                yield frame.encode()

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=send())


def refusal(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "code": "x"}})


@dataclass
class Server:
    """Answers every chat with `max_tokens` pieces of text, and counts words as two tokens each.

    overrides  the next answers, in order
    fails      says which bodies are refused, and how
    """

    overrides: list[httpx.Response] = field(default_factory=list)
    fails: Callable[[dict[str, Any]], httpx.Response | None] = lambda body: None
    counts: bool = True
    pause_s: float = 0.0
    overhead: int = 7
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        words = sum(len(message["content"].split()) for message in body["messages"])
        return 2 * words + self.overhead + (50 if "tools" in body else 0)

    def handle(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.overrides:
            return self.overrides.pop(0)
        refused = self.fails(body)
        if refused is not None:
            return refused
        return self.answer(body)

    def answer(self, body: dict[str, Any]) -> httpx.Response:
        limit = body.get("max_tokens") or body["max_completion_tokens"]
        counted = self.counts and "stream_options" in body

        async def send() -> AsyncIterator[bytes]:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            yield chunk(role="assistant").encode()
            for number in range(limit):
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                yield chunk(f"w{number} ").encode()
            yield chunk(finish="length").encode()
            if counted:
                prompt = self.prompt_tokens(body)
                yield usage(prompt, limit, prompt // 2).encode()
            yield b"data: [DONE]\n\n"
            self.at_once -= 1

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=send())

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self.handle))
