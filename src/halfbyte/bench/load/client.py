"""Asks an OpenAI-compatible server by streams, and notes when each piece of an answer came.

Nothing is judged here: an exchange says when it began, when its text came, what the server counted,
and how it failed if it did. `greet` finds out how a server wants to be asked.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from halfbyte.bench.load.words import words_of
from halfbyte.errors import UnsupportedError, UsageError

# What agents have in their system prompts.
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": says} for key, says in keys},
                "required": [key for key, _ in keys],
            },
        },
    }
    for name, what, keys in (
        ("run_command", "Run a command in the project's folder and give what it prints.",
         (("command", "the command line"),)),
        ("read_file", "Give the text of a file.", (("path", "relative to the project"),)),
        ("edit_file", "Put other words in place of a text that stands once in a file.",
         (("path", "relative to the project"), ("old", "the text"), ("new", "the other words"))),
        ("search", "Find the lines of all files that match a regular expression.",
         (("pattern", "the regular expression"),)),
    )
)  # fmt: skip
# Left out one after another, in this order, where a server refuses a request that has them all.
_OPTIONAL = ("ignore_eos", "temperature", "stream_options")
# In which a connection is to end its answer after the last frame.
_END_S = 1.0


# Makes what holds the connections of one user.
Connect = Callable[[], httpx.AsyncClient]


@dataclass(slots=True)
class Exchange:
    """One request and what came of it; times are seconds of `time.perf_counter`.

    events         when each piece of text came, a thought's and a call's included
    prompt_tokens  as the server counts (None if it does not), as are the next two
    error          the kind of failure, or ""; `detail` is the server's own words
    is_stopped     we ended it ourselves, so that it is neither whole nor a failure
    """

    started: float
    ended: float = 0.0
    events: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cached_tokens: int | None = None
    text: str = ""
    finish: str = ""
    error: str = ""
    detail: str = ""
    is_stopped: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the exchange brought an answer that can be measured."""
        return not self.error and not self.is_stopped


@dataclass(frozen=True, slots=True)
class Manner:
    """How a server is asked, as `greet` found out.

    fields           what every request has beside model, messages and the limit
    limit            name of the field that says how long an answer may be
    tokens_per_word  of our words; None if the server does not count
    overhead_tokens  what its template adds to a prompt
    tools_tokens     what the tools add; None if it takes no tools
    notes            what it does not do
    """

    fields: Mapping[str, Any]
    limit: str = "max_tokens"
    tokens_per_word: float | None = None
    overhead_tokens: int = 0
    tools_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def num_words(self, tokens: int) -> int:
        """The number of words that make about so many tokens, one at least."""
        return max(round(tokens / (self.tokens_per_word or 1.0)), 1)

    def takes_tools_of(self, system_tokens: int) -> bool:
        """Whether a system prompt of that length has tools: they are not to be most of it."""
        return self.tools_tokens is not None and self.tools_tokens <= system_tokens


class Client:
    """One server and one model of it, asked over connections that each user has of its own.

    A pool for all of them would look at every connection whenever one request begins or ends: with
    64 users that alone made the last of them wait.
    """

    def __init__(
        self,
        connect: Connect,
        url: str,
        model: str,
        *,
        manner: Manner,
        stall_s: float = 600.0,
    ) -> None:
        """`url` ends before /chat/completions; a silence of `stall_s` ends an answer."""
        self._connect = connect
        self._connections: dict[int, httpx.AsyncClient] = {}
        self._url = f"{url}/chat/completions"
        self._model = model
        self._stall_s = stall_s
        self.manner = manner

    def prepare(self, num_users: int) -> None:
        """Make what holds the users' connections, before anything is timed."""
        for user in range(num_users):
            if user not in self._connections:
                self._connections[user] = self._connect()

    async def aclose(self) -> None:
        """Close all connections that the client's users have open."""
        while self._connections:
            await self._connections.popitem()[1].aclose()

    async def ask(
        self,
        exchange: Exchange,
        messages: Sequence[Mapping[str, Any]],
        answer_tokens: int,
        *,
        user: int = 0,
        with_tools: bool = False,
    ) -> None:
        """Ask and read to the end; everything is noted in `exchange`, failures too.

        Cancelled, it leaves what has come so far.
        """
        body: dict[str, Any] = {
            "model": self._model, "messages": messages, "stream": True, **self.manner.fields,
            self.manner.limit: answer_tokens,
        }  # fmt: skip
        if with_tools:
            # Told and not to be called: a call would end the answer before its length.
            body |= {"tools": TOOLS, "tool_choice": "none"}
        try:
            self.prepare(user + 1)
            await self._read(exchange, body, self._connections[user])
        except TimeoutError:
            _fail(exchange, "stalled", f"no text for {self._stall_s:g} s")
        except httpx.ConnectError as error:
            _fail(exchange, "not reachable", str(error))
        except httpx.HTTPError as error:
            _fail(exchange, "broken off", f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            exchange.is_stopped = True
            raise
        finally:
            exchange.ended = time.perf_counter()

    async def _read(
        self, exchange: Exchange, body: Mapping[str, Any], http: httpx.AsyncClient
    ) -> None:
        is_done = False
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        exchange.started = time.perf_counter()
        async with (
            asyncio.timeout(self._stall_s) as silence,
            http.stream("POST", self._url, content=content, headers=headers) as response,
        ):
            if response.is_error:
                _fail(exchange, f"status {response.status_code}", _words(await response.aread()))
                return
            if "event-stream" not in response.headers.get("content-type", ""):
                kind = response.headers.get("content-type", "nothing")
                _fail(exchange, "no stream", f"the answer is {kind}, not an event stream")
                return
            lines = response.aiter_lines()
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                came = time.perf_counter()
                told = line[5:].strip()
                if told == "[DONE]":
                    is_done = True
                    break
                if not _take(exchange, told, came):
                    return
                # Comments that keep a connection open are no text.
                silence.reschedule(asyncio.get_running_loop().time() + self._stall_s)
            # Read to the end, a connection serves the next request, too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    async for _ in lines:
                        pass
        if not is_done and not exchange.finish:
            _fail(exchange, "broken off", "the stream ended before the answer did")
        elif not exchange.events:
            _fail(exchange, "empty answer", f"it ended with {exchange.finish or 'no reason'}")


def _take(exchange: Exchange, told: str, came: float) -> bool:
    """Note one chunk; False if it ends the stream with an error."""
    try:
        chunk = json.loads(told)
        if chunk.get("error"):
            _fail(exchange, "error in the stream", _said(chunk["error"]))
            return False
        usage = chunk.get("usage")
        if usage:
            exchange.prompt_tokens = _count(usage.get("prompt_tokens"))
            exchange.answer_tokens = _count(usage.get("completion_tokens"))
            details = usage.get("prompt_tokens_details") or {}
            exchange.cached_tokens = _count(details.get("cached_tokens"))
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if text or thought or delta.get("tool_calls"):
                exchange.events.append(came)
            # Half a surrogate pair could not be sent back as part of the history.
            exchange.text += text.encode("utf-8", "replace").decode("utf-8")
            exchange.finish = choice.get("finish_reason") or exchange.finish
    except (ValueError, AttributeError, TypeError) as error:
        _fail(exchange, "unreadable stream", f"{error}: {told[:80]}")
        return False
    return True


def _fail(exchange: Exchange, kind: str, detail: str) -> None:
    exchange.error, exchange.detail = kind, " ".join(detail.split())[:300]


def _words(body: bytes) -> str:
    """What an error's body says."""
    try:
        return _said(json.loads(body))
    except (ValueError, RecursionError):
        return body[:300].decode("utf-8", "replace")


def _said(told: Any) -> str:
    while isinstance(told, dict):
        inner = told.get("error") or told.get("message") or told.get("detail")
        if inner is None:
            break
        told = inner
    return told if isinstance(told, str) else json.dumps(told)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- before the run -------------------------------------------------------------------------

_FEW, _MANY = 40, 168
# Stands in a history for an answer of which nothing could be read.
_NO_TEXT = "Go on."


async def greet(connect: Connect, url: str, model: str, salt: str) -> Manner:
    """Find out what a server takes and how it counts, with four or more short requests.

    Raises UsageError with the server's own words where it refuses whatever it is sent, and
    UnsupportedError where it does not stream.
    """
    client = Client(connect, url, model, manner=Manner({}), stall_s=120.0)
    try:
        return await _greeted(client, url, model, salt)
    finally:
        await client.aclose()


async def _greeted(client: Client, url: str, model: str, salt: str) -> Manner:
    manner = client.manner = await _accepted(client, url, model, salt)
    counts = []
    for words in (_FEW, _MANY):
        prompt = words_of(words, f"{salt}/greet/{words}")
        exchange = await _asked(client, [{"role": "user", "content": prompt}])
        counts.append(exchange.prompt_tokens)
    few, many = counts
    notes = list(manner.notes)
    per_word, overhead = None, 0
    if few is None or many is None:
        notes.append(
            "the server counts no tokens, so that rates and sizes are not known: a word is taken "
            "for a token"
        )
    else:
        per_word = max((many - few) / (_MANY - _FEW), 0.05)
        overhead = max(round(few - _FEW * per_word), 0)
    probe = [
        {"role": "system", "content": "You work with tools."},
        {"role": "user", "content": "Begin."},
        *tool_messages("", words_of(8, f"{salt}/tool"), 0, has_tools=True),
    ]
    plain = await _asked(client, _without_tools(probe))
    called = await _asked(client, probe, with_tools=True, may_fail=True)
    tools_tokens = None
    if called.error:
        notes.append(
            f"the server takes no tools ({called.error}: {called.detail[:80]}): results of tools "
            "are sent as the user's"
        )
    else:
        tools_tokens = max((called.prompt_tokens or 0) - (plain.prompt_tokens or 0), 0)
    return Manner(manner.fields, manner.limit, per_word, overhead, tools_tokens, tuple(notes))


def tool_messages(
    answer: str, result: str, number: int, *, has_tools: bool
) -> list[dict[str, Any]]:
    """An agent's history goes on: its answer with a call, and what the tool gave."""
    if not has_tools:
        return [
            {"role": "assistant", "content": answer or _NO_TEXT},
            {"role": "user", "content": result},
        ]
    call_id = f"{number:09d}"
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "run_command", "arguments": json.dumps({"command": "make"})},
    }
    return [
        {"role": "assistant", "content": answer or _NO_TEXT, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": result},
    ]


def _without_tools(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    result = str(messages[-1]["content"])
    return [*messages[:-2], *tool_messages("", result, 0, has_tools=False)]


async def _accepted(client: Client, url: str, model: str, salt: str) -> Manner:
    """The fields that a server does not refuse."""
    fields: dict[str, Any] = {
        "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}
    }  # fmt: skip
    limits = ["max_tokens", "max_completion_tokens"]
    refused: list[str] = []
    prompt = [{"role": "user", "content": words_of(8, f"{salt}/first")}]
    while True:
        client.manner = Manner(dict(fields), limits[0])
        exchange = Exchange(time.perf_counter())
        await client.ask(exchange, prompt, 4)
        if exchange.error not in ("status 400", "status 422"):
            break
        if len(limits) > 1 and limits[0] in exchange.detail:
            limits.pop(0)
            continue
        named = [name for name in fields if name in exchange.detail]
        left = named or [name for name in _OPTIONAL if name in fields]
        if not left:
            break
        refused.append(left[0])
        del fields[left[0]]
    _refuse(exchange, url, model)
    notes = [_LACKS[name] for name in refused]
    return Manner(fields, limits[0], notes=tuple(notes))


_LACKS = {
    "ignore_eos": "the server does not take ignore_eos: answers may end before their length",
    "temperature": "the server does not take temperature 0: answers are sampled as it likes",
    "stream_options": "the server does not take stream_options",
}


async def _asked(
    client: Client,
    messages: Sequence[Mapping[str, Any]],
    *,
    with_tools: bool = False,
    may_fail: bool = False,
) -> Exchange:
    exchange = Exchange(time.perf_counter())
    await client.ask(exchange, messages, 1, with_tools=with_tools)
    if not may_fail:
        _refuse(exchange, "the server", "")
    return exchange


def _refuse(exchange: Exchange, url: str, model: str) -> None:
    """Raise what a failed first request means for the user; a token without text is no failure."""
    error, detail = exchange.error, exchange.detail
    if not error or error == "empty answer":
        return
    if error == "no stream":
        raise UnsupportedError(f"{url} does not stream: {detail}")
    if error in ("status 401", "status 403"):
        raise UsageError(
            f"{url} asks for an API key ({error}: {detail}); put it into an environment variable "
            "and name that with --api-key-env"
        )
    if error == "status 404":
        raise UsageError(f"{url} has no model {model!r} for chats ({error}: {detail})")
    raise UsageError(f"{url} does not answer a short request: {error}: {detail}")
