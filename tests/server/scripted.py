"""An engine service that replays scripted token ids through the engine's own event types.

For what needs exact tokens and exact moments: pieces, errors, disconnects. Whole stories run
against the real engine in tests/flows.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, fields

from halfbyte.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.engine.stats import EngineStats


@dataclass
class ScriptedService:
    """`script` gives the tokens of a request; the last may be an end of the model."""

    script: Callable[[GenerationRequest], Sequence[int]]
    tokens_per_event: int = 1
    delay_s: float = 0.0
    # Raised inside the stream, or reported by it, before this token.
    fail_at: int | None = None
    hang_at: int | None = None
    is_alive: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    told_to_abort: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self, drain_s: float = 0.0) -> None:
        self.calls.append("stop")

    def abort(self, request_id: str) -> None:
        self.told_to_abort.add(request_id)

    def clear_prefix_cache(self) -> None:
        self.calls.append("clear")

    async def stacks(self) -> str:
        return "scripted"

    def stats(self) -> EngineStats:
        nothing = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        running = len(self.running)
        known = {"running": running, "free_blocks": 100 - running, "total_blocks": 100}
        return EngineStats(**{**nothing, **known, "saturation": ()})  # type: ignore[arg-type]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        has_finished = False
        try:
            async for event in self._events(request):
                has_finished = isinstance(event, FinishEvent)
                yield event
        finally:
            self.running.discard(request.request_id)
            if not has_finished:
                self.aborted.append(request.request_id)

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        params = request.params
        ids = list(self.script(request))
        ends = set(params.stop_token_ids)
        stop = next((i for i, token_id in enumerate(ids) if token_id in ends), None)
        limit = params.max_tokens or len(ids)
        text = ids[:stop][:limit]
        if params.prompt_logprobs is not None:
            prompt = tuple(self._logprobs(i, 1) for i in request.prompt_token_ids[1:])
            yield TokensEvent(request.request_id, (), None, prompt)
        for start in range(0, len(text), self.tokens_per_event):
            if request.request_id in self.told_to_abort:
                yield self._finish(request, "abort", None, start)
                return
            if self.fail_at is not None and start >= self.fail_at:
                yield self._finish(request, "error", None, start, "the engine lost its mind")
                return
            if self.hang_at is not None and start >= self.hang_at:
                await asyncio.sleep(3600)
            await asyncio.sleep(self.delay_s)
            chunk = tuple(text[start : start + self.tokens_per_event])
            logprobs = None
            if params.logprobs is not None:
                logprobs = tuple(self._logprobs(i, params.logprobs) for i in chunk)
            yield TokensEvent(request.request_id, chunk, logprobs)
        if stop is not None and stop < limit:
            yield self._finish(request, "stop", ids[stop], stop + 1)
        else:
            yield self._finish(request, "length", None, len(text))

    def _finish(
        self,
        request: GenerationRequest,
        reason: FinishReason,
        stop: int | None,
        completion: int,
        message: str | None = None,
    ) -> FinishEvent:
        prompt = len(request.prompt_token_ids)
        return FinishEvent(
            request.request_id,
            reason,
            stop,
            prompt,
            3,
            completion,
            message,
            None if stop is None or request.params.logprobs is None else self._logprobs(stop, 1),
        )

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        top = tuple((100 + i, -1.0 - i) for i in range(num_top))
        return TokenLogprobs(token_id, -token_id / 1000, top)
