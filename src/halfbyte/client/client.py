"""A small streaming client of the chat API, for the terminal. Standard library and httpx only."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from halfbyte.errors import UsageError, in_words


@dataclass(slots=True)
class StreamedAnswer:
    """What the chunks of one answer have said so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def add(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """Take one chunk; ("content" | "reasoning" | "call" | "", its new text)."""
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            delta = choice["delta"]
            if delta.get("content"):
                self.content += delta["content"]
                return "content", delta["content"]
            if delta.get("reasoning_content"):
                self.reasoning += delta["reasoning_content"]
                return "reasoning", delta["reasoning_content"]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    self.calls.append({"name": call["function"]["name"], "arguments": ""})
                    return "call", f"{call['function']['name']} "
                self.calls[call["index"]]["arguments"] += call["function"]["arguments"]
                return "call", call["function"]["arguments"]
        return "", ""


class ChatClient:
    """One server; raises UsageError with its own words when it refuses."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` with or without /v1 at its end."""
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=base, headers=headers, timeout=None)

    def close(self) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The name of the model that the server has."""
        with self._explained():
            response = self._http.get("/v1/models")
            _check(response)
            return str(response.json()["data"][0]["id"])

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of one chat completion; closing the iterator ends the request."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with (
            self._explained(),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
                _check(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    raise UsageError(f"the server says: {chunk['error']['message']}")
                yield chunk

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise UsageError(f"{self._http.base_url} does not answer: {in_words(error)}") from error


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}"
    hint = "; give --api-key-env NAME or --api-key" if response.status_code == 401 else ""
    raise UsageError(f"the server says: {message}{hint}")
