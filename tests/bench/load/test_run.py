"""A trace sent to a scripted server: everybody asks, nothing repeats, nothing is lost silently."""

import asyncio
import itertools
import os
import signal
from dataclasses import replace
from typing import Any

import httpx
import pytest

from bench.load.scripted import Server, chunk, refusal, stream
from halfbyte.bench.load import run as run_module
from halfbyte.bench.load.client import Client, Manner
from halfbyte.bench.load.results import summarise_level
from halfbyte.bench.load.run import Measured, noting_tools, run_trace
from halfbyte.bench.load.traffic import Trace, TrafficSizes, make_trace

SMALL = TrafficSizes(
    users=(1, 3), agents=(2,), requests=2, turns=3, streams=2, prompt_tokens=40, answer_tokens=5,
    wait_s=(0.001, 0.002), long_tokens=300,
)  # fmt: skip
MANNER = Manner({"stream_options": {}}, tokens_per_word=2.0, overhead_tokens=7, tools_tokens=50)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_ALONE_S", 0.1)


def trace(*profiles: Any, **changes: Any) -> Trace:
    return make_trace(1, replace(SMALL, profiles=profiles, **changes), None)


async def measure(
    server: Server, traffic: Trace, *, salt: str = "s", manner: Manner = MANNER, **options: Any
) -> list[Measured]:
    kept: list[Measured] = []
    client = Client(server.client, "http://t/v1", "m", manner=manner, stall_s=5.0)
    options = {"salt": salt, "keep": kept.append, **options}
    assert await run_trace(client, traffic, **options) == (
        not any(one.end == "interrupted" for one in kept)
    )
    await client.aclose()
    return kept


def contents(server: Server) -> list[str]:
    return [body["messages"][-1]["content"] for body in server.bodies]


async def test_every_user_asks_at_once_and_no_prompt_repeats() -> None:
    server = Server(pause_s=0.01)
    one, three = await measure(server, trace("fixed"))
    assert [len(m.samples) for m in (one, three)] == [2, 6]
    assert server.most_at_once == 3
    assert all(sample.exchange.is_whole for m in (one, three) for sample in m.samples)
    assert all(body["max_tokens"] == 5 for body in server.bodies)
    assert len(set(contents(server))) == 8
    # As many tokens as were asked for, by the server's own count.
    assert {s.exchange.prompt_tokens for m in (one, three) for s in m.samples} <= {39, 40, 41}


async def test_another_run_of_a_trace_sends_other_words_of_the_same_sizes() -> None:
    first, second, again = Server(), Server(), Server()
    await measure(first, trace("fixed", "agents"), salt="a")
    await measure(second, trace("fixed", "agents"), salt="b")
    await measure(again, trace("fixed", "agents"), salt="a")

    def sizes(server: Server) -> list[int]:
        return sorted(server.prompt_tokens(body) for body in server.bodies)

    assert not set(contents(first)) & set(contents(second))
    assert sizes(first) == sizes(second)
    assert sorted(contents(first)) == sorted(contents(again))
    starts = {content[:20] for content in contents(first)}
    assert not starts & {content[:20] for content in contents(second)}


async def test_an_agents_history_grows_by_the_servers_answers_and_the_tools_results() -> None:
    server = Server()
    (level,) = await measure(server, trace("agents", agents=(1,), turns=4))
    bodies = [body["messages"] for body in server.bodies]
    assert [len(messages) for messages in bodies] == [2, 4, 6, 8]
    for before, after in itertools.pairwise(bodies):
        assert after[: len(before)] == before
        answer, result = after[len(before) :]
        assert answer["role"] == "assistant"
        assert answer["content"].startswith("w0 w1 ")
        assert result["role"] == "tool"
        assert result["tool_call_id"] == answer["tool_calls"][0]["id"]
    assert all(body["tools"] and body["tool_choice"] == "none" for body in server.bodies)
    asked = level.level.users[0][0]
    first = server.prompt_tokens(server.bodies[0])
    assert first == pytest.approx(asked.system_tokens + asked.turns[0].tokens, abs=4)


async def test_without_tools_results_are_the_users_and_it_is_noted() -> None:
    large = Manner({}, tokens_per_word=2.0, tools_tokens=7000)
    traffic = trace("agents", agents=(1,))
    noted = noting_tools(large, traffic)
    assert "7,000 tokens, system prompts 6,000" in noted.notes[0]
    assert noting_tools(MANNER, traffic).notes == ()
    server = Server()
    await measure(server, traffic, manner=noted)
    roles = [message["role"] for message in server.bodies[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert not any("tools" in body for body in server.bodies)


async def test_all_agents_share_one_beginning() -> None:
    server = Server()
    await measure(server, trace("agents", agents=(2, 3)))
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 1
    tasks = {body["messages"][1]["content"] for body in server.bodies}
    assert len(tasks) == 5


async def test_a_failed_session_goes_on_for_nobody_and_is_counted() -> None:
    calls = 0

    def fails(body: dict[str, Any]) -> httpx.Response | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            return stream(chunk("a"), 'data: {"error": {"message": "lost"}}\n\n')
        return refusal(429, "full") if calls == 4 else None

    (level,) = await measure(Server(fails=fails), trace("agents", agents=(3,)))
    found = summarise_level(level)
    failures = {one.kind: (one.count, one.example) for one in found.failures}
    assert failures == {"error in the stream": (1, "lost"), "status 429": (1, "full")}
    asked, planned = len(level.samples), level.level.num_requests
    assert found.skipped == {"the session had failed": planned - asked}
    assert found.answered == asked - 2


async def test_a_server_that_answers_nobody_is_not_asked_for_more() -> None:
    server = Server(fails=lambda body: refusal(500, "broken"))
    levels = await measure(server, trace("fixed", "agents"))
    assert len(levels) == 1
    assert summarise_level(levels[0]).failed == 2


async def test_time_is_up_and_the_rest_is_counted() -> None:
    server = Server(pause_s=0.01)
    (level,) = await measure(server, trace("fixed", users=(1,), requests=40), most_s=0.2)
    assert level.end == "time"
    asked = len(level.samples)
    assert 1 <= asked < 40
    assert level.skipped == {"time was up": 40 - asked}
    assert summarise_level(level).answered == asked
    assert summarise_level(level).is_sound


async def test_a_history_that_fills_the_context_ends_its_session() -> None:
    traffic = trace("agents", agents=(1,), turns=6)
    (level,) = await measure(Server(), traffic, context_tokens=12_000)
    asked = len(level.samples)
    assert 1 <= asked < 6
    assert level.skipped == {"the history filled the context": 6 - asked}


async def test_ctrl_c_keeps_what_was_measured() -> None:
    server = Server(pause_s=0.02)
    asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
    levels = await measure(server, trace("fixed", users=(1, 2), requests=15))
    last = levels[-1]
    assert last.end == "interrupted"
    assert sum(len(one.whole) for one in levels) >= 2
    found = summarise_level(last)
    assert not found.is_sound
    assert found.failed == 0


async def test_a_long_prompt_beside_streams() -> None:
    class Slow(Server):
        def answer(self, body: dict[str, Any]) -> httpx.Response:
            self.pause_s = 0.05 if self.prompt_tokens(body) > 200 else 0.005
            return super().answer(body)

    server = Slow()
    traffic = trace("beside", stream_tokens=40)
    (level,) = await measure(server, traffic)
    parts = [one.part for one in level.samples]
    assert parts.count("long") == 1
    assert parts.count("stream") >= 2
    assert all(one.exchange.is_stopped for one in level.samples if one.part == "stream")
    found = summarise_level(level)
    assert found.answered == found.planned == 1
    assert found.alone is not None
    assert found.beside is not None
    assert found.first_token is not None
    assert found.timeline
    assert found.failed == 0


async def test_streams_that_end_are_asked_again_with_other_words() -> None:
    server = Server(pause_s=0.01)
    traffic = trace("beside", stream_tokens=40)
    level = traffic.levels[0]
    short = tuple(
        tuple(replace(s, turns=(replace(s.turns[0], answer_tokens=4),)) for s in user)
        for user in level.users
    )
    await measure(server, replace(traffic, levels=(replace(level, users=short),)))
    asked = contents(server)
    assert len(asked) > 3
    assert len(set(asked)) == len(asked)


async def test_a_stream_that_fails_beside_is_said_and_measures_nothing() -> None:
    def fails(body: dict[str, Any]) -> httpx.Response | None:
        return refusal(429, "full") if len(server.bodies) == 2 else None

    server = Server(fails=fails, pause_s=0.01)
    (level,) = await measure(server, trace("beside", stream_tokens=40))
    found = summarise_level(level)
    assert (level.end, found.answered, found.failed) == ("failed", 0, 1)
    assert not found.is_sound
    assert found.skipped == {"not every stream ran beside it": 1}
