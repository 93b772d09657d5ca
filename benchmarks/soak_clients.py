"""Many clients at once, some of whom leave: is every answer the same, and nothing left behind?

Requests of all kinds are made up from a seed; each is first asked alone, greedily, then all of them
many times in company. Called by `benchmarks/soak.py`, and in small by the tests.
"""

import asyncio
import base64
import io
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from halfbyte.errors import CapacityError, RequestError

_WORDS = "the a sun river house runs blue 7 42 é 漢 and of but never always x y z ( ) ; token"
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
_CHAT, _TEXT, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its kind, for the report, where it goes and what it says."""

    kind: str
    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Report:
    """What came of a run.

    before, after   the server's own figures, idle: process and engine
    resident_bytes  through the run, in order
    different       descriptions of answers that were not what the request got alone
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    resident_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> float:
        """Resident memory of the last quarter over that of the second, medians, minus 1."""
        quarter = len(self.resident_bytes) // 4
        early = statistics.median(self.resident_bytes[quarter : 2 * quarter])
        return statistics.median(self.resident_bytes[-quarter:]) / early - 1

    def leaks(self) -> dict[str, tuple[int, int]]:
        """Figures that should be as before and are not: name -> (before, after).

        Workers of thread pools are bounded by the pools, not by what was before.
        """
        engine = self.after["engine"]
        found = {
            name: (self.before["process"][name], self.after["process"][name])
            for name in ("open_files", "threads", "tasks")
            if self.after["process"][name] > self.before["process"][name]
        }
        if engine["free_blocks"] != engine["total_blocks"]:
            found["blocks"] = (engine["total_blocks"], engine["free_blocks"])
        return found


def made_up(count: int, seed: int, model: str) -> list[Asked]:
    """Distinct requests of every kind, in turn. Greedy, so that each has one right answer."""
    dice = random.Random(seed)
    makers = (
        _plain,
        _long,
        _several,
        _picture,
        _tools,
        _schema,
        _form,
        _stopped,
        _text,
        _responses,
    )
    asked = []
    for number in range(count):
        maker = makers[number % len(makers)]
        one = maker(dice)
        body = {"model": model, "temperature": 0, **one.body}
        asked.append(Asked(one.kind, one.path, body))
    return asked


def _said(dice: random.Random, words: int) -> str:
    return " ".join(dice.choice(_WORDS.split()) for _ in range(words))


def _chat(dice: random.Random, kind: str, content: Any, **change: Any) -> Asked:
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": dice.randint(2, 40),
        "stream": dice.random() < 0.6,
        **change,
    }
    return Asked(kind, _CHAT, body)


def _plain(dice: random.Random) -> Asked:
    return _chat(dice, "plain", _said(dice, dice.randint(1, 30)))


def _long(dice: random.Random) -> Asked:
    # Common beginnings, so that prefixes are found while others are computed.
    start = "Read this. " * dice.randint(1, 3)
    return _chat(dice, "long", start + _said(dice, dice.randint(50, 200)))


def _several(dice: random.Random) -> Asked:
    return _chat(dice, "several choices", _said(dice, 12), n=dice.randint(2, 3))


def _picture(dice: random.Random) -> Asked:
    parts: list[dict[str, Any]] = [{"type": "text", "text": _said(dice, 4)}]
    for _ in range(dice.randint(1, 2)):
        size = (dice.randint(20, 150), dice.randint(20, 150))
        buffer = io.BytesIO()
        pixels = dice.randbytes(size[0] * size[1] * 3)
        Image.frombytes("RGB", size, pixels).save(buffer, dice.choice(["PNG", "WEBP"]))
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}})
    return _chat(dice, "picture", parts)


def _tools(dice: random.Random) -> Asked:
    choice = dice.choice(
        ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}]
    )
    return _chat(
        dice, "tools", _said(dice, 6), tools=[_TOOL], tool_choice=choice, parallel_tool_calls=False
    )


def _schema(dice: random.Random) -> Asked:
    properties = {
        f"p{i}": dice.choice([{"type": "integer"}, {"type": "boolean"}, {"enum": ["a", "b"]}])
        for i in range(dice.randint(1, 5))
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    return _chat(dice, "schema", _said(dice, 6), response_format=form, max_tokens=60)


def _form(dice: random.Random) -> Asked:
    forms = [
        {"type": "regex", "regex": "[a-f]{3,9}-[0-9]{2}"},
        {"type": "choice", "choices": ["Yes", "No", "Perhaps"]},
        {"type": "json_object"},
    ]
    return _chat(dice, "form", _said(dice, 6), response_format=dice.choice(forms))


def _stopped(dice: random.Random) -> Asked:
    return _chat(dice, "stop strings", _said(dice, 6), stop=["e", "a", "1"], max_tokens=60)


def _text(dice: random.Random) -> Asked:
    body = {
        "prompt": [_said(dice, dice.randint(1, 20)) for _ in range(dice.randint(1, 3))],
        "max_tokens": dice.randint(1, 30),
        "stream": dice.random() < 0.5,
        "echo": dice.random() < 0.3,
        "logprobs": dice.choice([None, 2]),
    }
    return Asked("completions", _TEXT, body)


def _responses(dice: random.Random) -> Asked:
    body = {
        "input": _said(dice, dice.randint(1, 20)),
        "max_output_tokens": dice.randint(2, 30),
        "stream": dice.random() < 0.6,
    }
    return Asked("responses", _RESPONSES, body)


# --- answers --------------------------------------------------------------------------------


def answer_of(asked: Asked, text: str) -> Any:
    """What an answer says, without what may differ: ids, times, log-probs, cached tokens."""
    return _sum(asked, [json.loads(text)])


def streamed_answer(asked: Asked, lines: Sequence[str]) -> Any:
    """The same, of the lines of a stream."""
    chunks = [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
    return _sum(asked, chunks)


def _sum(asked: Asked, chunks: Sequence[dict[str, Any]]) -> Any:
    for chunk in chunks:
        if "error" in chunk and chunk["error"] is not None:
            return {"error": chunk["error"]}
    if asked.path == _RESPONSES:
        whole = chunks[-1].get("response", chunks[-1])
        return [
            [item["type"], item.get("name"), item.get("arguments"), item.get("content")]
            for item in whole["output"]
        ] + [whole["status"], whole["usage"]["output_tokens"]]
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for told in chunk["choices"]:
            mine = choices.setdefault(
                told["index"], {"text": "", "reasoning": "", "calls": {}, "finish": None}
            )
            delta = told.get("delta") or told.get("message") or {"content": told.get("text")}
            mine["text"] += delta.get("content") or ""
            mine["reasoning"] += delta.get("reasoning_content") or ""
            for place, call in enumerate(delta.get("tool_calls") or ()):
                kept = mine["calls"].setdefault(call.get("index", place), ["", ""])
                kept[0] += call["function"].get("name") or ""
                kept[1] += call["function"].get("arguments") or ""
            mine["finish"] = told["finish_reason"] or mine["finish"]
    return choices


# --- the run --------------------------------------------------------------------------------


async def soak(
    url: str,
    admin_url: str,
    asked: Sequence[Asked],
    *,
    count: int,
    concurrent: int = 64,
    share_leaving: float = 0.3,
    seed: int = 0,
) -> Report:
    """Ask everything alone, then `count` times in company. The server should be otherwise idle."""
    dice = random.Random(seed)
    report = Report()
    started = time.monotonic()
    async with _client(url, concurrent) as client:
        expected = [await _whole(client, one) for one in asked]
        for one, answer in zip(asked, expected, strict=True):
            if "error" in answer:
                raise RequestError(f"a request that should be answered is refused: {one}: {answer}")
        # Thread pools and caches fill up before the figures are taken.
        await _crowd(
            client, asked, expected, report=None, count=count // 10, of=concurrent, dice=dice
        )
    report.before = await _idle_state(admin_url)
    async with _client(url, concurrent) as client:
        watch = asyncio.create_task(_watch(admin_url, report))
        try:
            await _crowd(
                client,
                asked,
                expected,
                report=report,
                count=count,
                of=concurrent,
                dice=dice,
                share_leaving=share_leaving,
            )
        finally:
            watch.cancel()
    report.after = await _idle_state(admin_url)
    report.seconds = time.monotonic() - started
    return report


async def _crowd(
    client: httpx.AsyncClient,
    asked: Sequence[Asked],
    expected: Sequence[Any],
    *,
    report: Report | None,
    count: int,
    of: int,
    dice: random.Random,
    share_leaving: float = 0.3,
) -> None:
    """`of` clients that take the next request as soon as they are free, until `count` are asked."""
    plan = [(dice.randrange(len(asked)), _moment(dice, share_leaving)) for _ in range(count)]
    remaining = iter(plan)

    async def one_client() -> None:
        for index, leaves_at in remaining:
            outcome, answer = await _one(client, asked[index], leaves_at)
            if report is None:
                continue
            if outcome == "answered" and answer != expected[index]:
                outcome = "different"
                report.different.append(f"{asked[index]}: {answer} instead of {expected[index]}")
            report.outcomes[outcome] += 1
            report.kinds[asked[index].kind] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(of):
            group.create_task(one_client())


@dataclass(frozen=True, slots=True)
class _Leaving:
    """When a client goes: after some seconds, or after some lines of a stream."""

    seconds: float
    lines: int


def _moment(dice: random.Random, share: float) -> _Leaving | None:
    if dice.random() >= share:
        return None
    return _Leaving(
        dice.choice([0.0, 0.001, 0.01, 0.1, 0.5, 2.0]) * dice.random(), dice.randint(0, 9)
    )


async def _one(
    client: httpx.AsyncClient, asked: Asked, leaving: _Leaving | None
) -> tuple[str, Any]:
    """("answered" or "left", the answer)."""
    if leaving is None:
        return "answered", await _whole(client, asked)
    try:
        async with asyncio.timeout(leaving.seconds + 0.001):
            if not asked.body.get("stream"):
                return "answered", await _whole(client, asked)
            lines = []
            async for line in _lines(client, asked):
                lines.append(line)
                if len(lines) > 3 * leaving.lines:
                    return "left", None
            return "answered", streamed_answer(asked, lines)
    except TimeoutError:
        return "left", None


async def _whole(client: httpx.AsyncClient, asked: Asked) -> Any:
    if asked.body.get("stream"):
        return streamed_answer(asked, [line async for line in _lines(client, asked)])
    response = await client.post(asked.path, json=asked.body)
    return answer_of(asked, response.text)


async def _lines(client: httpx.AsyncClient, asked: Asked) -> AsyncIterator[str]:
    async with client.stream("POST", asked.path, json=asked.body) as response:
        async for line in response.aiter_lines():
            yield line


async def _watch(admin_url: str, report: Report) -> None:
    async with _client(admin_url, 1) as client:
        while True:
            state = (await client.get("/state")).json()
            report.resident_bytes.append(state["process"]["resident_bytes"])
            await asyncio.sleep(0.5)


async def _idle_state(admin_url: str, wait_s: float = 30.0) -> dict[str, Any]:
    """The server's figures once nothing runs. CapacityError if something goes on for too long."""
    deadline = time.monotonic() + wait_s
    state: dict[str, Any] = {}
    calm = 0
    while calm < 3:
        if time.monotonic() > deadline:
            raise CapacityError(f"the server does not come to rest: {state}")
        async with _client(admin_url, 1) as client:
            state = (await client.get("/state")).json()
        engine = state["engine"]
        calm = 0 if engine["running"] or engine["waiting"] or state["running"] else calm + 1
        await asyncio.sleep(0.2)
    return state


def _client(url: str, concurrent: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=concurrent, max_keepalive_connections=concurrent)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)
