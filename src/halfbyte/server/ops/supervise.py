"""Keeps an engine running: one that died is loaded again while requests get 503.

Three deaths within ten minutes are no accident; then the server stays dead and /health says so, for
whatever started the process to decide.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Generic, Protocol, TypeVar

from halfbyte.engine.request import Event, GenerationRequest
from halfbyte.engine.stats import EngineStats
from halfbyte.errors import CapacityError
from halfbyte.log import logger

_POLL_S = 0.25


class Supervised(Protocol):
    """What a supervisor keeps running: an engine's service, or the process of another server."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests; False once it has died."""

    async def start(self) -> None:
        """Begin to run; the supervisor calls this once."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Let running answers finish for this long, then end them."""

    def clear_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next step."""

    async def stacks(self) -> str:
        """Where every thread of the engine is, or why that is not known."""

    def stats(self) -> EngineStats | None:
        """The engine's figures; None if they are published elsewhere."""


class Answerer(Supervised, Protocol):
    """Answers prompts of tokens: engine.service.EngineService, or a scripted one in tests."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events of one answer. Closing the generator aborts it and frees its blocks."""

    def abort(self, request_id: str) -> None:
        """End an answer; its events go on to a FinishEvent with its counts."""


# An engine that dies so often within such a time is not started again.
_MAX_DEATHS, _WINDOW_S = 3, 600.0

_Kept = TypeVar("_Kept", bound=Supervised, covariant=True)


class Supervisor(Generic[_Kept]):
    """The engine as the server sees it: the same face, whichever one is behind it now."""

    def __init__(self, first: _Kept, load: Callable[[], _Kept]) -> None:
        """`load` makes another engine like `first`; it runs in a thread."""
        self._engine: _Kept | None = first
        self._load = load
        self._deaths: deque[float] = deque()
        self._watch: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests can run now: an engine is there and alive."""
        return self._engine is not None and self._engine.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether requests can run now, or soon: an engine is there or on its way."""
        return self.is_ready or (self._watch is not None and not self._watch.done())

    @property
    def num_restarts(self) -> int:
        """Number of deaths within the window so far."""
        return len(self._deaths)

    async def start(self) -> None:
        """Start the engine, and watch it from a task of its own."""
        assert self._engine is not None
        await self._engine.start()
        self._watch = asyncio.create_task(self._keep_running(), name="engine supervisor")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop watching, then let answers finish for `drain_s` seconds and stop the engine."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._engine is not None:
            await self._engine.stop(drain_s=drain_s)

    def generate(
        self: "Supervisor[Answerer]", request: GenerationRequest
    ) -> AsyncGenerator[Event, None]:
        """Events of one answer. CapacityError while there is no engine."""
        if self._engine is None or not self._engine.is_alive:
            raise CapacityError("the engine has failed and is being restarted; try again")
        return self._engine.generate(request)

    def abort(self: "Supervisor[Answerer]", request_id: str) -> None:
        """End an answer; its events go on to a FinishEvent with its counts."""
        if self._engine is not None:
            self._engine.abort(request_id)

    def clear_prefix_cache(self) -> None:
        """Forget all cached prefixes before the engine's next step."""
        if self._engine is not None:
            self._engine.clear_prefix_cache()

    async def stacks(self) -> str:
        """Where every thread of the engine is, or that there is no engine now."""
        return "there is no engine now" if self._engine is None else await self._engine.stacks()

    def stats(self) -> EngineStats | None:
        """The engine's figures; None while there is none, or none of ours."""
        return self._engine.stats() if self._engine is not None else None

    async def _keep_running(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            if self._engine is not None and self._engine.is_alive:
                continue
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > _WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) >= _MAX_DEATHS:
                logger.error("the engine died %d times; giving up", len(self._deaths))
                return
            await self._replace()

    async def _replace(self) -> None:
        logger.warning("the engine has died; loading another")
        dead, self._engine = self._engine, None
        if dead is not None:
            await dead.stop()
        # Two sets of weights may not fit: the dead engine goes before the new one comes.
        del dead
        engine = await asyncio.to_thread(self._load_or_log)
        if engine is None:
            return
        await engine.start()
        self._engine = engine
        logger.info("the engine runs again")

    def _load_or_log(self) -> _Kept | None:
        try:
            return self._load()
        # An exit or a panic is no Exception, and would end the server from within a task.
        except BaseException:
            logger.exception("the engine could not be loaded again")
            return None
