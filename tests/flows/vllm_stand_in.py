"""What answers in vLLM's place in tests: its flags, its fields, its way to stream; no model.

Run as `vllm serve DIR ...` it refuses flags that vLLM does not have, and requests with fields that
vLLM does not know. Each request's body is kept at /seen.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# Name -> takes a value. From the help of vLLM 0.24.
FLAGS = {
    "served-model-name": True, "host": True, "port": True, "config-format": True,
    "load-format": True, "tokenizer-mode": True, "enable-auto-tool-choice": False,
    "tool-call-parser": True, "reasoning-parser": True, "reasoning-config": True,
    "limit-mm-per-prompt": True, "structured-outputs-config": True, "generation-config": True,
    "enable-prompt-tokens-details": False, "disable-uvicorn-access-log": False,
    "tensor-parallel-size": True, "pipeline-parallel-size": True,
    "distributed-executor-backend": True, "max-model-len": True, "max-num-seqs": True,
    "gpu-memory-utilization": True,
}  # fmt: skip
CHAT_FIELDS = {
    "model", "messages", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "logit_bias",
    "min_tokens", "ignore_eos", "max_completion_tokens", "stream", "stream_options", "logprobs",
    "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format",
    "structured_outputs", "reasoning_effort", "thinking_token_budget", "continue_final_message",
    "add_generation_prompt", "return_tokens_as_token_ids", "skip_special_tokens",
    "include_stop_str_in_output", "return_token_ids",
}  # fmt: skip
TEXT_FIELDS = (CHAT_FIELDS - {"messages", "max_completion_tokens", "top_logprobs"}) | {
    "prompt", "max_tokens", "prompt_logprobs", "add_special_tokens",
}  # fmt: skip


def _wrong_choice(body: dict[str, Any]) -> str | None:
    """What vLLM would refuse about a choice of tools; it knows no list of allowed ones."""
    choice = body.get("tool_choice", "none")
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    if isinstance(choice, dict):
        if set(choice) != {"type", "function"} or choice["type"] != "function":
            return f"tool_choice {choice} is not known"
        choice = choice["function"]["name"]
        return None if choice in names else f"tool {choice} is not in tools"
    if choice not in ("none", "auto", "required"):
        return f"tool_choice {choice} is not known"
    return None if names or choice == "none" else "tool_choice needs tools"


def read_flags(words: list[str]) -> dict[str, str]:
    """As vLLM reads them; exits for one that it does not have."""
    found, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("--")
        if not word.startswith("--") or name not in FLAGS:
            sys.exit(f"vllm: error: unrecognized arguments: {word}")
        found[name] = rest.pop(0) if FLAGS[name] else ""
    return found


class StandIn:
    """The application; `script` are the deltas of a chat answer.

    A delta's `tokens` are ids that its chunk has log-probs of, text or not; without them a chunk
    with content has one.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self.seen: list[dict[str, Any]] = []
        self.script: list[dict[str, Any]] = [{"content": "Hel"}, {"content": "lo"}]
        self.finish = "stop"
        self.last: dict[str, Any] = {}
        self.hang = False
        self.refuse: tuple[int, dict[str, Any]] | None = None
        self.num_open = 0
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/seen", self._seen),
                Route("/die", self._die, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _seen(self, request: Request) -> Response:
        return JSONResponse(self.seen)

    async def _die(self, request: Request) -> Response:
        os._exit(3)

    async def _read(self, request: Request, fields: set[str]) -> dict[str, Any] | Response:
        if request.headers.get("authorization") != f"Bearer {self._key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        body: dict[str, Any] = await request.json()
        self.seen.append(body)
        unknown = set(body) - fields
        if unknown:
            return JSONResponse({"error": {"message": f"unknown {unknown}"}}, 400)
        if self.refuse is not None:
            return JSONResponse(self.refuse[1], self.refuse[0])
        return body

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, CHAT_FIELDS)
        if isinstance(body, Response):
            return body
        wrong = _wrong_choice(body)
        if wrong is not None:
            return JSONResponse({"error": {"message": wrong, "param": "tool_choice"}}, 400)
        return StreamingResponse(self._chat_chunks(body), media_type="text/event-stream")

    async def _chat_chunks(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.num_open += 1
        try:
            for index in range(body.get("n", 1)):
                for delta in [{"role": "assistant", "content": ""}, *self.script]:
                    yield _event({"choices": [_chunk(index, delta, body)]})
                if self.hang:
                    await asyncio.sleep(3600)
                last = {"delta": {}, "finish_reason": self.finish, **self.last}
                yield _event({"choices": [{"index": index, **last}]})
            yield _event({"choices": [], "usage": _usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.num_open -= 1

    async def _text(self, request: Request) -> Response:
        body = await self._read(request, TEXT_FIELDS)
        if isinstance(body, Response):
            return body
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(body["prompt"] * body.get("n", 1)):
            choice: dict[str, Any] = {"index": number, "text": "abc", "finish_reason": "length"}
            if body.get("logprobs") is not None:
                choice["logprobs"] = {
                    "tokens": ["token_id:100"],
                    "token_logprobs": [-0.5],
                    "top_logprobs": [{"token_id:100": -0.5}],
                }
            if body.get("return_token_ids"):
                choice["token_ids"] = [100]
            if "prompt_logprobs" in body:
                scores = [{str(i): {"logprob": -i / 100, "rank": 1}} for i in prompt[1:]]
                choice["prompt_logprobs"] = [None, *scores]
            choices.append(choice)
        if not body.get("stream"):
            return JSONResponse({"choices": choices, "usage": _usage()})

        async def chunks() -> AsyncIterator[str]:
            for choice in choices:
                yield _event({"choices": [choice]})
            yield _event({"choices": [], "usage": _usage()})
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")


def _chunk(index: int, delta: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    delta = dict(delta)
    ids = delta.pop("tokens", [100] if delta.get("content") else [])
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
    if body.get("logprobs") and ids:
        choice["logprobs"] = {"content": token_rows(ids)}
    if body.get("return_token_ids"):
        choice["token_ids"] = ids
    return choice


def token_rows(ids: list[int]) -> list[dict[str, Any]]:
    """Log-probs as vLLM writes them when it is asked for ids."""
    top = [{"token": "token_id:101", "logprob": -1.5}]
    return [{"token": f"token_id:{i}", "logprob": -i / 200, "top_logprobs": top} for i in ids]


def _usage() -> dict[str, Any]:
    return {
        "prompt_tokens": 40,
        "completion_tokens": 7,
        "total_tokens": 47,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'x', 'created': 1, **body})}\n\n"


def main() -> None:
    """`vllm serve DIR FLAGS`."""
    assert sys.argv[1] == "serve", sys.argv
    flags = read_flags(sys.argv[3:])
    stand_in = StandIn(os.environ["VLLM_API_KEY"])
    uvicorn.run(stand_in.app, host=flags["host"], port=int(flags["port"]), log_level="error")


if __name__ == "__main__":
    main()
