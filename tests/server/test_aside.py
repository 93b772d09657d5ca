"""Long requests are read in other processes: with the same result, and their death is one's own."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.errors import RequestError
from halfbyte.server.api import aside as module
from halfbyte.server.api import wire
from halfbyte.server.api.aside import Aside
from halfbyte.server.api.reader import Conversation, Reader, Shape
from halfbyte.server.api.stream import SHORT_BODY, Body
from halfbyte.server.config import ServerConfig

CONFIG = ServerConfig(("m",), 200_000, 800, api_keys=("secret",))


@pytest.fixture(autouse=True, scope="module")
def kept() -> None:
    """Nothing is: the processes themselves are looked at."""


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def is_there(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(10):
        while any(map(is_there, pids)):
            await asyncio.sleep(0.02)


@pytest.fixture
def reader(mistral: MistralFormat) -> Reader:
    return Reader(mistral, CONFIG)


@pytest.fixture
async def aside(mistral: MistralFormat, reader: Reader) -> AsyncIterator[Aside]:
    made = Aside(reader, mistral.directory, CONFIG)
    yield made
    made.close()


async def read(aside: Aside, reader: Reader, body: bytes) -> Any:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(body)
        return await aside.do_apart(
            len(body),
            reader.read,
            wire.ChatRequest,
            "/v1/chat/completions",
            "x",
            file=file.fileno(),
        )


def process_of(aside: Aside) -> int:
    assert aside._process is not None
    return aside._process.pid


@pytest.mark.timeout(60)
async def test_results_are_those_of_the_same_work_here(aside: Aside, reader: Reader) -> None:
    path, agent = "/v1/chat/completions", "mistral-client-python/1"
    good = {"model": "m", "messages": [{"role": "user", "content": "é" * 50_000}], "odd": 1}
    wrong: list[Any] = [
        {"model": "m", "messages": [{"role": "user", "content": 5}]},
        {"model": "m"},
        [],
        {"model": "m", "messages": [{"role": "user", "content": "a" * 5_000_000}]},
    ]
    for number, value in enumerate([good, *wrong]):
        body = json.dumps(value).encode()
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(body)

            async def there(file: Any = file, body: bytes = body) -> Any:
                return await aside.do_apart(
                    len(body), reader.read, wire.ChatRequest, path, agent, file=file.fileno()
                )

            if number == 0:
                assert await there() == reader.read(wire.ChatRequest, path, agent, body)
                continue
            with pytest.raises(RequestError) as here:
                reader.read(wire.ChatRequest, path, agent, body)
            with pytest.raises(RequestError) as found:
                await there()
        assert str(found.value) == str(here.value)
        assert vars(found.value) == vars(here.value)
    text = "word, " * 5000
    apart = await aside.do_apart(len(text), reader.encode_plain, text, True)
    assert (
        apart
        == reader.encode_plain(text, True)
        == await aside.do(1, reader.encode_plain, text, True)
    )
    ids = list(apart)
    assert await aside.do_apart(1, reader.text_body, ids) == reader.text_body(ids)
    assert await aside.do_apart(1, reader.tokens_body, ids, True) == reader.tokens_body(ids, True)
    told = json.loads(reader.tokens_body(ids, True))
    assert (told["tokens"], told["count"]) == (list(ids), len(ids))
    assert len(told["token_strs"]) == len(ids)
    assert json.loads(reader.tokens_body(ids, False))["token_strs"] is None
    assert "prompt" in json.loads(reader.text_body(ids))


@pytest.mark.timeout(60)
async def test_pictures_are_encoded_by_their_shapes(
    aside: Aside, reader: Reader, mistral: MistralFormat
) -> None:
    def conversation(image: object, other: object) -> Conversation:
        parts = [{"type": "text", "text": "a"}, {"type": "image", "image": image}]
        parts += [{"type": "image", "image": other}, {"type": "text", "text": "b"}]
        return Conversation([{"role": "user", "content": parts}], (), None, None, False)

    pixels = [np.ones((3, 56, 28), np.uint8), np.ones((3, 28, 84), np.uint8)]
    whole = mistral.encode(conversation(*pixels).messages)
    apart = await aside.do_apart(1, reader.encode, conversation(Shape(56, 28), Shape(28, 84)))
    assert apart.token_ids == whole.token_ids
    places = [(one.offset, one.num_tokens) for one in apart.images]
    assert places == [(one.offset, one.num_tokens) for one in whole.images]
    assert sum(one.pixels.nbytes for one in apart.images) == 0


@pytest.mark.timeout(60)
async def test_a_process_that_dies_takes_its_own_request_along(
    aside: Aside, reader: Reader
) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    await read(aside, reader, body)
    process = process_of(aside)
    # While nobody asks: nobody notices.
    for pid in children_of(process):
        os.kill(pid, signal.SIGKILL)
    await read(aside, reader, body)
    # Amid a question that takes long.
    busy = asyncio.create_task(aside.do_apart(10**6, reader.encode_plain, "ab ,.;:" * 80_000, True))
    while not aside._turns["long"].locked():
        await asyncio.sleep(0)
    deaths = 0
    while not busy.done():
        await asyncio.sleep(0.05)
        for pid in children_of(process):
            deaths += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with pytest.raises(RequestError) as found:
        await busy
    assert found.value.code in ("reader_died", "readers_busy") and deaths
    await read(aside, reader, body)
    # And the one that they come from.
    os.kill(process, signal.SIGKILL)
    await until_gone(process)
    await read(aside, reader, body)
    assert process_of(aside) != process


@pytest.mark.timeout(60)
async def test_without_descriptors_others_are_told_to_come_back(
    aside: Aside, reader: Reader
) -> None:
    await aside.do_apart(1, reader.encode_plain, "x", True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RequestError) as asked:
            await aside.do_apart(1, reader.encode_plain, "x", True)
        body = Body()
        with pytest.raises(RequestError) as read:
            body.add(b"x" * (SHORT_BODY + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (asked.value.status, read.value.status) == (503, 503)
    assert await aside.do_apart(1, reader.encode_plain, "x", True)


@pytest.mark.timeout(60)
async def test_a_client_that_leaves_keeps_nobody_waiting(aside: Aside, reader: Reader) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    for _ in range(5):
        task = asyncio.create_task(read(aside, reader, body))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    found = await read(aside, reader, body)
    assert found.asked.model == "m"


@pytest.mark.timeout(60)
async def test_no_process_stays_behind_and_none_knows_the_keys(
    mistral: MistralFormat, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Aside(reader, mistral.directory, CONFIG)
    assert b"secret" not in made._setting
    await made.do_apart(1, reader.encode_plain, "x", True)
    process = process_of(made)
    others = children_of(process)
    assert len(others) == 2 * module._num_processes()
    made.close()
    await until_gone(process, *others)
