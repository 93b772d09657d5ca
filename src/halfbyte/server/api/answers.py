"""What makes the pieces of a job's answers: the engine behind this server, or another server.

`running` shows a job among those in work and asks `Answers` for its pieces.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from halfbyte.engine.request import FinishEvent
from halfbyte.errors import RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.admission import Admission
from halfbyte.server.api.completion import Choice, Job
from halfbyte.server.api.pieces import Piece, Usage
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.supervise import Answerer, Supervisor


class Answers(Protocol):
    """Makes the pieces of checked jobs. Closing a generator of them ends what it asked for."""

    @property
    def reads_messages(self) -> bool:
        """Whether it needs a conversation's messages, images decoded, rather than its tokens."""

    def check(self, request: wire.ChatRequest, *, is_begun: bool) -> None:
        """Raise RequestError (400) for a conversation that it cannot answer as asked.

        is_begun  the answer has a beginning, and a format or tools hold it from there
        """

    def pieces(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """Pieces of all answers of a job; each list is one event of a stream.

        Fills in the job's usage and the ends of its choices.
        """

    def abort(self, job: Job) -> None:
        """End a job's answers; whoever reads its pieces gets an error."""


class EngineAnswers:
    """`Answers` of the engine that this server runs."""

    reads_messages = False

    def __init__(
        self, engine: Supervisor[Answerer], metrics: Metrics, admission: Admission
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._admission = admission

    def check(self, request: wire.ChatRequest, *, is_begun: bool) -> None:
        """Refuse nothing: the engine does whatever a checked request asks for."""

    def abort(self, job: Job) -> None:
        """End a job's answers in the engine; their readers get an error."""
        for choice in job.choices:
            self._engine.abort(choice.request.request_id)

    async def pieces(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """Pieces of all choices as the engine's events come."""
        if len(job.choices) == 1:
            pieces = self._of_choice(job, job.choices[0])
            async with contextlib.aclosing(pieces):
                async for batch in pieces:
                    yield batch
            return
        # Bounded, so that what a slow client leaves waits in the engine's bounded mailboxes.
        queue: asyncio.Queue[list[Piece] | BaseException | None] = asyncio.Queue(len(job.choices))

        async def feed_queue(choice: Choice) -> None:
            try:
                async with contextlib.aclosing(self._of_choice(job, choice)) as pieces:
                    async for batch in pieces:
                        await queue.put(batch)
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(feed_queue(choice)) for choice in job.choices]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _of_choice(self, job: Job, choice: Choice) -> AsyncGenerator[list[Piece], None]:
        metrics = self._metrics
        start = previous = time.perf_counter()
        reason = "abort"
        try:
            async with contextlib.aclosing(self._engine.generate(choice.request)) as events:
                async for event in events:
                    if isinstance(event, FinishEvent):
                        choice.finish = event
                        reason = self.finish_reason(choice, event)
                        break
                    if event.token_ids:
                        now = time.perf_counter()
                        if choice.num_tokens:
                            metrics.token_seconds.observe(now - previous)
                        else:
                            choice.first_token_s = now - start
                            metrics.first_token_seconds.observe(now - start)
                        previous = now
                    if choice.router.stopped_by is not None:
                        continue
                    pieces = choice.feed(event)
                    if choice.router.stopped_by is not None:
                        # Its last event still says what the prompt cost.
                        self._engine.abort(choice.request.request_id)
                    if pieces:
                        yield pieces
                else:
                    raise RequestError("the engine has stopped", code="engine_dead", status=503)
            _count_usage(job.usage, choice)
            pieces = choice.end(reason)
            choice.reason = reason = pieces[-1].finish_reason or reason
            yield pieces
        finally:
            metrics.request_seconds.observe(time.perf_counter() - start)
            metrics.count_finish(reason)
            _count_metrics(metrics, choice)

    def finish_reason(self, choice: Choice, event: FinishEvent) -> str:
        """ "stop" or "length"; RequestError for an answer that ended otherwise."""
        if choice.router.stopped_by is not None:
            return "stop"
        if event.mask_problem is not None:
            # It ended because the grammar did, not because it was complete: never an answer.
            raise RequestError(
                f"after {event.completion_tokens} tokens the answer could not be held to the "
                f"request's grammar any longer: {event.mask_problem}",
                code="grammar_failed",
            )
        if event.reason in ("stop", "length"):
            return event.reason
        is_draining = event.reason == "abort" and self._admission.is_draining
        ended = "the server is shutting down" if is_draining else "the answer was aborted"
        is_passing = event.reason == "abort" or not self._engine.is_ready
        raise RequestError(
            event.message or ended,
            code="shutting_down" if is_draining else "engine_error",
            status=503 if is_passing else 500,
        )


def _count_usage(usage: Usage, choice: Choice) -> None:
    finish = choice.finish
    usage.completion_tokens += choice.num_completion_tokens
    usage.reasoning_tokens += choice.router.num_reasoning_tokens
    if finish is not None and choice.has_own_prompt:
        usage.cached_tokens += finish.cached_tokens


def _count_metrics(metrics: Metrics, choice: Choice) -> None:
    finish = choice.finish
    num_prompt = len(choice.request.prompt_token_ids)
    num_answer = choice.num_completion_tokens
    metrics.prompt_tokens += num_prompt
    metrics.completion_tokens += num_answer
    metrics.reasoning_tokens += choice.router.num_reasoning_tokens
    metrics.cached_prompt_tokens += finish.cached_tokens if finish is not None else 0
    metrics.prompt_size_tokens.observe(num_prompt)
    metrics.answer_size_tokens.observe(num_answer)
