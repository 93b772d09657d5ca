"""Sends a trace to a server, level after level, and keeps every exchange.

Users of a level are tasks of one event loop. Ctrl-C ends the level that runs: whole answers are
kept. A level begins nothing new after its time is up; what runs then may end.
"""

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.bench.load.client import Client, Exchange, Manner, tool_messages
from halfbyte.bench.load.traffic import Level, Session, Trace
from halfbyte.bench.load.words import words_of
from halfbyte.progress import ProgressLine, clock

# Text of each stream before the long prompt is sent, and how long they are then watched alone.
_WARM_EVENTS = 8
_ALONE_S = 3.0
_TICK_S = 0.1


@dataclass(slots=True)
class LevelExchange:
    """An exchange, whose it was, and what part it has in its level.

    part  "" an ordinary one; "long" the long prompt; "stream" what ran beside it
    """

    user: int
    turn: int
    exchange: Exchange
    part: str = ""


@dataclass(slots=True)
class Measured:
    """What one level of traffic gave: every exchange and its circumstances.

    started, ended  seconds of `time.perf_counter`
    alone           when the streams ran alone: first and last moment
    end             "" if all was asked; else why not: "interrupted", "time", "failed"
    skipped         requests that were not asked because their session had ended in a failure, its
                    history was full, or time was up: reason -> how many
    late_ms         how late this program's own clock tick came, at most and at its 99th percentile
    """

    level: Level
    started: float = 0.0
    ended: float = 0.0
    samples: list[LevelExchange] = field(default_factory=list)
    alone: tuple[float, float] | None = None
    end: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    late_ms: list[float] = field(default_factory=list)

    @property
    def whole(self) -> list[LevelExchange]:
        """The ordinary answers that came to their end."""
        return [one for one in self.samples if one.exchange.is_whole and one.part != "stream"]

    def skip(self, reason: str, count: int) -> None:
        """Note that so many requests more were not sent."""
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count


async def run_trace(
    client: Client,
    trace: Trace,
    *,
    salt: str,
    context_tokens: int | None = None,
    most_s: float = 300.0,
    line: ProgressLine | None = None,
    keep: Callable[[Measured], None],
) -> bool:
    """Send the levels in their order; False if Ctrl-C ended the run.

    salt    makes the words of this run others than those of every run before, which the server's
            prefix cache may still hold
    most_s  seconds after which a level begins nothing new
    keep    is given each level when it ends, interrupted ones too
    """
    stop = asyncio.Event()
    with _on_interrupt(stop):
        progress = _Progress(trace, most_s, line or ProgressLine())
        for number, level in enumerate(trace.levels):
            run = _LevelRun(
                client, level, f"{salt}/{number}", f"{salt}/shared", context_tokens, most_s
            )
            watch = asyncio.create_task(_watch(run, progress, number))
            work = asyncio.create_task(run.run())
            waits = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((work, waits), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                    run.measured.end = "interrupted"
                await asyncio.gather(work, return_exceptions=stop.is_set())
            finally:
                for task in (watch, waits, work):
                    task.cancel()
                await asyncio.gather(watch, waits, work, return_exceptions=True)
                progress.clear()
            keep(run.measured)
            if stop.is_set():
                return False
            if not run.measured.whole:
                return True  # a server that answers nobody now is not asked for more
    return True


def noting_tools(manner: Manner, trace: Trace) -> Manner:
    """The same, with a note where the tools are too long for system prompts of the trace."""
    lengths = [
        one.system_tokens for level in trace.levels for one in level.sessions if one.has_tools
    ]
    if manner.tools_tokens is None or all(manner.takes_tools_of(tokens) for tokens in lengths):
        return manner
    note = (
        f"the tools are {manner.tools_tokens:,} tokens, system prompts {min(lengths):,}: there are "
        "no tools, and their results are sent as the user's"
    )
    return replace(manner, notes=(*manner.notes, note))


@contextlib.contextmanager
def _on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop.set)
    except (NotImplementedError, RuntimeError):  # not the main thread: nobody sends it here
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _LevelRun:
    """The users of one level."""

    def __init__(
        self,
        client: Client,
        level: Level,
        salt: str,
        shared: str,
        context_tokens: int | None,
        most_s: float,
    ) -> None:
        self._client = client
        self._level = level
        self._salt = salt
        self._shared = shared
        self._context = context_tokens
        self._most_s = most_s
        self.measured = Measured(level)
        self._system: dict[int, str] = {}
        self._texts: dict[tuple[int, int], str] = {}

    async def run(self) -> None:
        """Run all sessions of the level to their ends."""
        measured = self.measured
        # Thousands of words take milliseconds, which would hold up the answers of others.
        for session in self._level.sessions:
            self._write(session)
        self._client.prepare(len(self._level.users) + 1)
        measured.started = time.perf_counter()
        try:
            if self._level.beside is not None:
                await self._run_beside(self._level.beside)
            else:
                async with asyncio.TaskGroup() as group:
                    for user, sessions in enumerate(self._level.users):
                        group.create_task(self._run_user(user, sessions))
        finally:
            measured.ended = time.perf_counter()

    def _write(self, session: Session) -> None:
        """Make the words of a session."""
        manner = self._client.manner
        has_tools = session.has_tools and manner.takes_tools_of(session.system_tokens)
        # The first message is shorter by what is not its text: the prompt is to have its length.
        beside = manner.overhead_tokens + (manner.tools_tokens or 0) * has_tools
        if session.system_tokens:
            length = manner.num_words(session.system_tokens - beside)
            seed = f"{self._shared}/{session.system_seed}"
            self._system[session.system_seed] = words_of(length, seed)
            beside = 0
        for number, turn in enumerate(session.turns):
            length = manner.num_words(turn.tokens - (0 if number else beside))
            self._texts[turn.seed, number] = words_of(length, f"{self._salt}/{turn.seed}")

    @property
    def _is_over(self) -> bool:
        return time.perf_counter() - self.measured.started > self._most_s

    async def _run_user(self, user: int, sessions: Sequence[Session]) -> None:
        for number, session in enumerate(sessions):
            if self._is_over:
                left = sum(len(one.turns) for one in sessions[number:])
                self.measured.skip("time was up", left)
                self.measured.end = "time"
                return
            await self._run_session(user, session, "")

    async def _run_session(self, user: int, session: Session, part: str, again: int = 0) -> None:
        """The turns of a session; its histories hold the server's own answers, as an agent's do."""
        manner = self._client.manner
        has_tools = session.has_tools and manner.takes_tools_of(session.system_tokens)
        messages: list[dict[str, Any]] = []
        if session.system_tokens:
            messages.append({"role": "system", "content": self._system[session.system_seed]})
        held = 0  # tokens of the prompt and the answer before
        answer = ""
        for number, turn in enumerate(session.turns):
            left = len(session.turns) - number
            if self._is_over and number:
                self.measured.skip("time was up", left)
                self.measured.end = "time"
                return
            if self._context is not None and held:
                needs = held + turn.tokens * 1.05 + turn.answer_tokens
                if needs > self._context:
                    self.measured.skip("the history filled the context", left)
                    return
            if turn.wait_s:
                await asyncio.sleep(turn.wait_s)
            words = self._texts[turn.seed, number]
            if again:
                words = words_of(words.count(" ") + 1, f"{self._salt}/{turn.seed}/{again}")
            if turn.role == "tool" and number:
                messages += tool_messages(answer, words, number, has_tools=has_tools)
            else:
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                messages.append({"role": "user", "content": words})
            exchange = await self._ask(user, number, messages, turn.answer_tokens, has_tools, part)
            if not exchange.is_whole:
                self.measured.skip("the session had failed", left - 1)
                return
            answer = exchange.text
            held = (exchange.prompt_tokens or 0) + (exchange.answer_tokens or 0)

    async def _ask(
        self,
        user: int,
        turn: int,
        messages: list[dict[str, Any]],
        answer_tokens: int,
        has_tools: bool,
        part: str,
    ) -> Exchange:
        exchange = Exchange(time.perf_counter())
        self.measured.samples.append(LevelExchange(user, turn, exchange, part))
        await self._client.ask(
            exchange, list(messages), answer_tokens, user=user, with_tools=has_tools
        )
        return exchange

    # --- a long prompt beside streams ---

    async def _run_beside(self, long: Session) -> None:
        streams = [
            asyncio.create_task(self._stream(user, sessions))
            for user, sessions in enumerate(self._level.users)
        ]
        try:
            if not await self._until_all_stream(streams):
                self.measured.end = "failed"
                self.measured.skip("not every stream ran beside it", len(long.turns))
                return
            begun = time.perf_counter()
            await asyncio.sleep(_ALONE_S)
            self.measured.alone = (begun, time.perf_counter())
            await self._run_session(len(streams), long, "long")
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _stream(self, user: int, sessions: Sequence[Session]) -> None:
        """Ask again and again, each time with other words, until cancelled or refused."""
        again = 0
        while True:
            for session in sessions:
                before = len(self.measured.samples)
                await self._run_session(user, session, "stream", again)
                mine = [one for one in self.measured.samples[before:] if one.user == user]
                if any(one.exchange.error for one in mine):
                    return
            again += 1

    async def _until_all_stream(self, streams: Sequence["asyncio.Task[None]"]) -> bool:
        """Wait until every user's answer has some text; False if one failed or time was up."""
        while True:
            if any(task.done() for task in streams) or self._is_over:
                return False
            texts = [0] * len(streams)
            for one in self.measured.samples:
                texts[one.user] += len(one.exchange.events)
            if min(texts) >= _WARM_EVENTS:
                return True
            await asyncio.sleep(0.02)


# --- what is shown meanwhile ----------------------------------------------------------------


class _Progress:
    """Which level runs, how far it is, how long the whole will take."""

    def __init__(self, trace: Trace, most_s: float, line: ProgressLine) -> None:
        self._trace = trace
        self._most_s = most_s
        self._line = line

    def show(self, number: int, run: _LevelRun) -> None:
        if self._line.is_due():
            self._line.show(self.text(number, run))

    def text(self, number: int, run: _LevelRun) -> str:
        """The line; tokens are pieces of text here, which is what can be seen meanwhile."""
        level, measured = self._trace.levels[number], run.measured
        passed = max(time.perf_counter() - measured.started, 1e-3)
        name = f"level {number + 1} of {len(self._trace.levels)}: {level.title}"
        done = sum(1 for one in measured.samples if one.exchange.ended)
        failed = sum(1 for one in measured.samples if one.exchange.error)
        pieces = sum(len(one.exchange.events) for one in measured.samples)
        parts = [name, f"{done}/{level.num_requests} answers", f"{pieces / passed:,.1f} tokens/s"]
        if level.beside is not None:
            waits = [one.exchange.started for one in measured.samples if one.part == "long"]
            since = time.perf_counter() - waits[0] if waits else 0.0
            parts[1] = f"the prompt was sent {since:.0f} s ago" if waits else "the streams begin"
        if failed:
            parts.append(f"{failed} failed")
        left_s = self._left_s(number, pieces, passed)
        if left_s is not None and (level.beside is None or number + 1 < len(self._trace.levels)):
            parts.append(f"about {clock(left_s)} left")
        return "  ".join(parts)

    def _left_s(self, number: int, pieces: int, passed: float) -> float | None:
        """Seconds that the answers still to come will take at the pace of now, if that is known.

        Each level counts at most as long as a level may take.
        """
        if not pieces:
            return None
        wanted = [
            # Streams beside a prompt end with it: some hundred tokens of their thousands.
            level.answer_tokens if level.beside is None else 200 * len(level.users)
            for level in self._trace.levels[number:]
        ]
        pace = pieces / passed
        here = min(max(wanted[0] - pieces, 0) / pace, max(self._most_s - passed, 0))
        return here + sum(min(tokens / pace, self._most_s) for tokens in wanted[1:])

    def clear(self) -> None:
        self._line.clear()


async def _watch(run: _LevelRun, progress: _Progress, number: int) -> None:
    """Show the progress, and note how late this very task is woken: so late are the times."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        run.measured.late_ms.append((time.perf_counter() - before - _TICK_S) * 1000)
        progress.show(number, run)


def lateness(late_ms: Sequence[float]) -> float:
    """Milliseconds that this program was usually late by at its worst: the 99th percentile."""
    ordered = sorted(late_ms) or [0.0]
    return statistics.quantiles(ordered, n=100)[-1] if len(ordered) > 1 else ordered[0]
