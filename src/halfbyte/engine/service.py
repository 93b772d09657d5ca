"""The engine's asyncio face: a stream of events per request, one thread that runs the steps.

Calls arrive on the event loop and become commands; the engine's thread takes them between steps.
Events travel back in one hop a step. What a slow reader has not fetched is merged; a reader that
fetches nothing for too long loses its answer, so that no mailbox grows without end.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from halfbyte.engine.core import Engine, EngineStats
from halfbyte.engine.request import Event, FinishEvent, GenerationRequest, TokensEvent
from halfbyte.errors import CapacityError, RequestError
from halfbyte.log import logger

Argument = TypeVar("Argument")

# Tokens, and alternatives reported with them, that may wait for one reader: some 2 MB. A reader
# that is alive takes them within a step or two; sockets hold a thousand more.
MAX_UNREAD = 8192


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _ClearPrefixCache:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class _Mailbox:
    """Events of one request on their way to its reader. Lives on the event loop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._has_mail = asyncio.Event()
        self._num_unread = 0
        self.num_tokens = 0
        # The last event is in; what comes late is dropped.
        self.is_closed = False

    @property
    def is_overfull(self) -> bool:
        """Whether more events wait than any reader should leave unread."""
        return self._num_unread > MAX_UNREAD

    def put(self, event: Event) -> None:
        if self.is_closed:
            return
        if isinstance(event, TokensEvent):
            self.num_tokens += len(event.token_ids)
            self._num_unread += len(event.token_ids)
            self._num_unread += sum(len(one.top) for one in event.logprobs or ())
        else:
            self.is_closed = True
        last = self._events[-1] if self._events else None
        if isinstance(last, TokensEvent) and isinstance(event, TokensEvent):
            self._events[-1] = _joined(last, event)
        else:
            self._events.append(event)
        self._has_mail.set()

    async def take(self) -> list[Event]:
        """Everything that has come since the last time, waiting for something."""
        await self._has_mail.wait()
        self._has_mail.clear()
        events, self._events = self._events, []
        self._num_unread = 0
        return events

    def give_up(self, finish: FinishEvent) -> None:
        """Drop the events that wait and end the stream."""
        self._events.clear()
        self.put(finish)


def _joined(first: TokensEvent, second: TokensEvent) -> TokensEvent:
    """Two events as one; only the first of a request carries prompt log-probs."""
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return TokensEvent(
        first.request_id, first.token_ids + second.token_ids, logprobs, first.prompt_logprobs
    )


class EngineService:
    """One engine and its thread. Every method belongs to the event loop that called `start`."""

    def __init__(self, engine: Engine, *, max_requests: int = 1024) -> None:
        """`max_requests` running and queued together; beyond it `generate` raises."""
        self.engine = engine
        self._max_requests = max_requests
        self._commands: queue.SimpleQueue[_Add | _Abort | _ClearPrefixCache | _Stop] = (
            queue.SimpleQueue()
        )
        self._mailboxes: dict[str, _Mailbox] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._failure: str | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_alive(self) -> bool:
        """The thread runs and takes requests; False for ever once the engine has failed."""
        thread = self._thread
        return thread is not None and thread.is_alive() and self.failure is None

    @property
    def failure(self) -> str | None:
        """What the engine died of; None while it lives."""
        return self._failure or self.engine.failure

    async def start(self) -> None:
        """Start the thread that runs the engine's steps; call this once."""
        assert self._thread is None, "started twice"
        self._loop = asyncio.get_running_loop()
        # A daemon: a process that is told to exit must not wait for a step.
        self._thread = threading.Thread(target=self._run, name="halfbyte-engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `drain_s`, abort the rest, end."""
        self._is_stopping = True
        if self._thread is None:
            return
        if self.is_alive and drain_s > 0:
            try:
                await asyncio.wait_for(self._is_idle.wait(), drain_s)
            except TimeoutError:
                logger.warning("%d requests aborted after draining", len(self._mailboxes))
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        # The thread's last events are on their way through the loop.
        await asyncio.sleep(0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events of one request; the last one is a FinishEvent.

        Closing the generator before that aborts the request; its blocks are free before the next
        step. Raises RequestError if the request can never run, CapacityError if the service is
        full or stopping. A request that the engine's death cuts off ends with reason "error".
        """
        self.engine.validate(request)
        request_id = request.request_id
        if request_id in self._mailboxes:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        if self._is_stopping or self._thread is None:
            raise CapacityError("the engine is shutting down")
        if len(self._mailboxes) >= self._max_requests:
            raise CapacityError(
                f"{len(self._mailboxes)} requests are running or queued; at most "
                f"{self._max_requests} may be"
            )
        if not self.is_alive:
            yield self._death_of(request)
            return
        mailbox = _Mailbox()
        self._mailboxes[request_id] = mailbox
        self._is_idle.clear()
        self._commands.put(_Add(request))
        is_finished = False
        try:
            while not is_finished:
                for event in await mailbox.take():
                    is_finished = isinstance(event, FinishEvent)
                    yield event
        finally:
            del self._mailboxes[request_id]
            if not self._mailboxes:
                self._is_idle.set()
            if not is_finished:
                self._commands.put(_Abort(request_id))

    def abort(self, request_id: str) -> None:
        """End a request; its stream still gets the FinishEvent, reason "abort", with its counts."""
        self._commands.put(_Abort(request_id))

    def clear_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next step."""
        self._commands.put(_ClearPrefixCache())

    def stats(self) -> EngineStats:
        """Figures of the engine, as `Engine.stats` gives them."""
        return self.engine.stats()

    def _death_of(self, request: GenerationRequest) -> FinishEvent:
        message = self.failure or "the engine's thread has ended"
        num_prompt = len(request.prompt_token_ids)
        return FinishEvent(request.request_id, "error", None, num_prompt, 0, 0, message)

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            # None: the reader has gone, its abort is on the way.
            if mailbox is None:
                continue
            mailbox.put(event)
            if mailbox.is_overfull and not mailbox.is_closed:
                message = (
                    f"the answer was ended after {mailbox.num_tokens} tokens: they were not read, "
                    "and this many are not kept"
                )
                mailbox.give_up(
                    FinishEvent(event.request_id, "abort", None, 0, 0, mailbox.num_tokens, message)
                )
                self._commands.put(_Abort(event.request_id))

    def _fail_all(self, message: str) -> None:
        for request_id, mailbox in self._mailboxes.items():
            mailbox.put(FinishEvent(request_id, "error", None, 0, 0, 0, message))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.has_work():
                    self._send(self.engine.step())
        # Whatever it is, it must be seen by those who wait, not only in a log: an exit called
        # for by a library and a panic of foreign code are no Exception.
        except BaseException as error:
            logger.exception("the engine has failed")
            self._failure = f"the engine has failed: {type(error).__name__}: {error}"
            self._call(self._fail_all, self._failure)
        finally:
            self.engine.close()

    def _obey(self) -> bool:
        """Execute the commands that have arrived, waiting for one if idle; False to end."""
        wait = not self.engine.has_work()
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, _Add):
                self.engine.add(command.request, is_validated=True)
            elif isinstance(command, _Abort):
                self._send(self.engine.abort(command.request_id))
            elif isinstance(command, _ClearPrefixCache):
                self.engine.clear_prefix_cache()
            else:
                for request_id in self.engine.request_ids():
                    self._send(self.engine.abort(request_id))
                return False

    def _send(self, events: list[Event] | FinishEvent | None) -> None:
        if isinstance(events, FinishEvent):
            events = [events]
        if events:
            self._call(self._deliver, events)

    def _call(self, function: Callable[[Argument], None], argument: Argument) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            # The loop is closed: nobody is left to be told.
            logger.debug("events after the event loop was closed")
