"""The asking side of an engine: a stream of events per request, on an event loop. No torch.

The engine runs elsewhere, in a process of its own, and is `host` there; `wire` lies between. Events
travel in one message a step. What a slow reader has not fetched is merged; a reader that fetches
nothing for too long loses its answer, so that no mailbox grows without end.
"""

import asyncio
import collections
import queue
import socket
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace

from halfbyte.engine import wire
from halfbyte.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    TokensEvent,
)
from halfbyte.engine.stats import EngineStats
from halfbyte.errors import CapacityError, RequestError
from halfbyte.log import logger

# Tokens, and alternatives reported with them, that may wait for one reader: some 2 MB. A reader
# that is alive takes them within a step or two; sockets hold a thousand more.
MAX_UNREAD = 8192
# How long an engine may take to end the step that it is in.
_END_S = 30.0
_STACKS_S = 2.0


class _Mailbox:
    """Events of one request on their way to its reader. Lives on the event loop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._refusal: RequestError | None = None
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

    def refuse(self, error: RequestError) -> None:
        """End the stream with an error instead of events."""
        self._refusal = error
        self.is_closed = True
        self._has_mail.set()

    async def take(self) -> list[Event]:
        """Everything that has come since the last time, waiting for something.

        Raises RequestError if the engine will not run the request.
        """
        await self._has_mail.wait()
        self._has_mail.clear()
        if self._refusal is not None:
            raise self._refusal
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


class _Sender:
    """Sends commands from a thread, so that an event loop never waits for the engine to read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[wire.Command | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="engine-sender", daemon=True).start()

    def hang_up(self) -> None:
        """End the thread and the connection, whatever still waits to be sent."""
        self._commands.put(None)
        wire.hang_up(self._connection)

    def put(self, command: wire.Command) -> None:
        """Send this when what came before is sent."""
        self._commands.put(command)

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                wire.send(self._connection, command)
            except OSError:
                # It has gone, which its reader sees.
                logger.debug("a command for an engine that has gone")
                return
            del command


class EngineService:
    """One engine, wherever it runs. Every method belongs to the event loop that called `start`."""

    def __init__(
        self,
        connection: socket.socket,
        loaded: wire.Loaded,
        end: Callable[[], str],
        *,
        max_requests: int = 1024,
    ) -> None:
        """Ask the engine that runs behind a connection.

        loaded        what it said when it was ready
        end           wait for its end when the connection has closed, and say how it ended
        max_requests  running and queued together; beyond it `generate` raises
        """
        self.loaded = loaded
        self._connection = connection
        self._end = end
        self._max_requests = max_requests
        self._mailboxes: dict[str, _Mailbox] = {}
        # Of the pictures that the engine keeps: running requests with it.
        self._num_users: collections.Counter[bytes] = collections.Counter()
        self._sender = _Sender(connection)
        self._has_started = False
        self._reader = wire.Reader(connection)
        self._stats = loaded.stats
        self._is_stopping = False
        self._failure: str | None = None
        self._has_ended = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._stacks: asyncio.Future[str] | None = None
        # Whoever forgets the service lets the engine go: it leaves when its connection closes.
        self._hang_up = weakref.finalize(self, self._sender.hang_up)

    @property
    def is_alive(self) -> bool:
        """The engine runs and takes requests; False for ever once it has failed."""
        return self._has_started and self._failure is None and not self._has_ended.is_set()

    @property
    def failure(self) -> str | None:
        """What the engine died of; None while it lives."""
        return self._failure

    async def start(self) -> None:
        """Listen to the engine from now on; call this once."""
        assert not self._has_started, "started twice"
        self._has_started = True
        self._sender.start()
        asyncio.get_running_loop().add_reader(self._connection, self._listen)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `drain_s`, abort the rest, end."""
        self._is_stopping = True
        if not self._has_started:
            self._hang_up()
            await asyncio.to_thread(self._end)
            return
        if self.is_alive and drain_s > 0:
            try:
                await asyncio.wait_for(self._is_idle.wait(), drain_s)
            except TimeoutError:
                logger.warning("%d requests aborted after draining", len(self._mailboxes))
        self._put(wire.Stop())
        try:
            await asyncio.wait_for(self._has_ended.wait(), _END_S)
        except TimeoutError:
            logger.warning("the engine has not ended its step within %g s", _END_S)
            self._close("it did not end its step")
        await asyncio.to_thread(self._end)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events of one request; the last one is a FinishEvent.

        Closing the generator before that aborts the request; its blocks are free before the next
        step. Raises RequestError if the request can never run, CapacityError if the service is
        full or stopping. A request that the engine's death cuts off ends with reason "error".
        """
        request_id = request.request_id
        if request_id in self._mailboxes:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        if self._is_stopping or not self._has_started:
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
        self._add(request)
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
            if not mailbox.is_closed:
                self._put(wire.Abort(request_id))
            self._release(request)

    def abort(self, request_id: str) -> None:
        """End a request; its stream still gets the FinishEvent, reason "abort", with its counts."""
        self._put(wire.Abort(request_id))

    def clear_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next step."""
        self._put(wire.ClearPrefixCache())

    def stats(self) -> EngineStats:
        """Figures of the engine after its last step."""
        return self._stats

    async def stacks(self) -> str:
        """Where every thread of the engine's process is, or that it does not say."""
        if self._stacks is None:
            self._stacks = asyncio.get_running_loop().create_future()
            self._put(wire.TellStacks())
        try:
            return await asyncio.wait_for(asyncio.shield(self._stacks), _STACKS_S)
        except TimeoutError:
            return "the engine's process does not say where it is"

    def _put(self, command: wire.Command) -> None:
        if self._has_started and not self._has_ended.is_set():
            self._sender.put(command)

    def _add(self, request: GenerationRequest) -> None:
        for image in request.images:
            self._num_users[image.digest] += 1
            if self._num_users[image.digest] == 1:
                self._put(wire.Keep(image.digest, image.pixels))
        pictures = tuple(
            wire.Picture(image.digest, image.offset, image.num_tokens) for image in request.images
        )
        self._put(wire.Add(replace(request, images=()), pictures))

    def _release(self, request: GenerationRequest) -> None:
        """Let the engine forget pictures that no other request has."""
        self._num_users.subtract(image.digest for image in request.images)
        unused = {image.digest for image in request.images if not self._num_users[image.digest]}
        if unused:
            self._put(wire.Forget(tuple(unused)))
            for digest in unused:
                del self._num_users[digest]

    def _death_of(self, request: GenerationRequest) -> FinishEvent:
        message = self.failure or "the engine has ended"
        num_prompt = len(request.prompt_token_ids)
        return FinishEvent(request.request_id, "error", None, num_prompt, 0, 0, message)

    def _listen(self) -> None:
        try:
            reports = self._reader.read()
        except (EOFError, OSError):
            self._close(None)
            return
        for report in reports:
            if isinstance(report, wire.Stepped):
                self._stats = report.stats
                self._deliver(report.events)
            elif isinstance(report, wire.Refused):
                mailbox = self._mailboxes.get(report.request_id)
                if mailbox is not None and not mailbox.is_closed:
                    mailbox.refuse(report.error)
            elif isinstance(report, wire.Stacks):
                waiting, self._stacks = self._stacks, None
                if waiting is not None and not waiting.done():
                    waiting.set_result(report.text)
            else:
                assert isinstance(report, wire.Died), f"unexpected {report}"
                self._failure = report.text
                self._fail_all("error", report.text)

    def _close(self, said: str | None) -> None:
        """The connection is of no use any more: the engine has ended, or is given up."""
        if self._has_ended.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._connection)
        self._has_ended.set()
        self._hang_up()
        if self._is_stopping:
            self._fail_all("abort", None)
            return
        if self._failure is None:
            self._failure = f"the engine has failed: {said or self._end()}"
            logger.error("%s", self._failure)
        self._fail_all("error", self._failure)

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
                self._put(wire.Abort(event.request_id))

    def _fail_all(self, reason: FinishReason, message: str | None) -> None:
        for request_id, mailbox in self._mailboxes.items():
            mailbox.put(FinishEvent(request_id, reason, None, 0, 0, 0, message))
