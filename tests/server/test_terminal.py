import asyncio
import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.client.client import ChatClient
from halfbyte.client.terminal import Terminal
from halfbyte.errors import UsageError
from halfbyte.server.run import serving
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench("Hello é", EOS)


@pytest.fixture
def terminal(bench: Bench) -> Iterator[Terminal]:
    with serving(bench.app) as url:
        client = ChatClient(f"{url}/v1/")
        yield Terminal(client, client.first_model(), out=io.StringIO())
        client.close()


def said(terminal: Terminal) -> str:
    assert isinstance(terminal.out, io.StringIO)
    return terminal.out.getvalue()


def run(terminal: Terminal, *lines: str) -> str:
    waiting = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    terminal.loop(read_line)
    return said(terminal)


def test_conversation_is_kept_and_commands_work(bench: Bench, terminal: Terminal) -> None:
    text = run(
        terminal, "/help", "Hi \\", "there", "/again", "/system Be kind.", "/temp 0",
        "/effort high", "More", "/nonsense", "/temp x", "/quit", "never sent",
    )  # fmt: skip
    assert text.count("Hello é") == 3
    assert "no command /nonsense" in text and "'x' is not a number" in text
    assert "tokens, first after" in text
    assert [turn["role"] for turn in terminal.turns] == ["user", "assistant"] * 2
    assert terminal.turns[0]["content"] == "Hi \nthere"
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[-1].prompt_token_ids, keep_control=True
    )
    assert "Be kind." in prompt and '"high"' in prompt
    assert bench.service.requests[-1].params.temperature == 0


def test_new_forgets_and_again_needs_a_question(terminal: Terminal) -> None:
    assert "no question yet" in run(terminal, "/again", "Hi", "/new", "/again")
    assert not terminal.turns


def test_thoughts_and_calls_are_shown(bench: Bench, terminal: Terminal) -> None:
    ids = bench.ids(THINK, "hm", END_THINK, "So.", CALLS, "f", ARGS, '{"a": 1}', EOS)
    bench.service.script = lambda request: ids
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    terminal.settings |= {"reasoning_effort": "high", "tools": [tool]}
    answer = terminal.ask("Hi")
    assert answer.reasoning == "hm" and answer.content == "So."
    assert answer.calls == [{"name": "f", "arguments": '{"a": 1}'}]
    assert said(terminal).startswith("hm\nSo.\nf ") and '{"a": 1}' in said(terminal)


def test_refusal_is_said_and_not_kept(bench: Bench, terminal: Terminal) -> None:
    terminal.settings["temperature"] = 9
    assert "error: the server says: temperature" in run(terminal, "Hi")
    assert not terminal.turns
    bench.service.fail_at = 1
    terminal.settings.clear()
    assert "lost its mind" in run(terminal, "Hi")
    assert not terminal.turns


def test_leaving_the_iterator_ends_the_request(bench: Bench, terminal: Terminal) -> None:
    bench.service.hang_at = 1
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    stream = terminal.client.stream(body)
    next(stream)
    stream.close()  # type: ignore[attr-defined]

    async def gone() -> None:
        async with asyncio.timeout(3):
            while bench.service.running:
                await asyncio.sleep(0.01)

    asyncio.run(gone())
    assert bench.service.aborted


def test_a_server_that_is_not_there() -> None:
    client = ChatClient("http://127.0.0.1:9")
    with pytest.raises(UsageError, match="does not answer"):
        client.first_model()
    client.close()


class Says(ChatClient):
    """A server that says what a test gives, in any field that is shown."""

    def __init__(self, *deltas: dict[str, Any]) -> None:
        self.deltas = deltas

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for delta in self.deltas:
            yield {"choices": [{"delta": delta, "finish_reason": None}]}


CONTROLS = st.text(
    st.sampled_from("\x1b\x07\x9b\x9d\x90\r\b\x7f\0[]0;52c2JmH\u202e\u2066\ud800 a\n")
)


@settings(deadline=None)
@given(st.lists(CONTROLS, min_size=1, max_size=6), st.booleans())
def test_no_answer_commands_the_terminal(pieces: list[str], is_terminal: bool) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    call = {"index": 0, "id": "c", "function": {"name": pieces[0], "arguments": ""}}
    more = {"index": 0, "function": {"arguments": pieces[-1]}}
    deltas: list[dict[str, Any]] = [{"reasoning_content": piece} for piece in pieces]
    deltas += [{"content": piece} for piece in pieces]
    deltas += [{"tool_calls": [call]}, {"tool_calls": [more]}]
    terminal = Terminal(Says(*deltas), pieces[0], out=Screen())
    waiting = iter(["Hi", "/" + pieces[0], "/quit"])
    terminal.loop(lambda prompt: next(waiting))
    shown = said(terminal).replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert all(c in "\n\t" or c.isprintable() for c in shown)
    # What is kept and sent back is what was said.
    assert terminal.turns[-1]["content"] == "".join(pieces) or not "".join(pieces)
