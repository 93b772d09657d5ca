"""Over 200 hostile requests against the real engine: the right status, and a healthy server."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows.hostile import CHAT, HELLO, Case, corpus
from halfbyte.chat.mask_plan import MaskMaker
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.server.config import Limits, ServerConfig
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import serving

DATA = Path(__file__).parent.parent / "data" / "chat"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=800)
    write_tiny_checkpoint(directory, config=dataclasses.replace(config, text=text))
    shutil.copy(DATA / "tekken" / "tekken.json", directory)
    engine = Engine.load(directory, EngineConfig(max_model_len=4096, kv_cache_tokens=8192))
    chat = load_chat(directory)
    masks = MaskMaker(chat.vocabulary, chat.control)
    service = Supervisor(in_thread(engine, masks), lambda: in_thread(engine, masks))
    settings = ServerConfig(
        ("tiny",), engine.max_model_len, engine.vocab_size, limits=Limits(body_bytes=2_000_000)
    )
    app = create_app(service, chat, settings, access_log=None)
    with serving(app) as url:
        yield url, engine


def test_hostile_requests_get_their_status_and_leave_nothing(stand: tuple[str, Engine]) -> None:
    url, engine = stand
    names = list(load_chat(DATA / "tekken").vocabulary.control)
    cases = corpus(names)
    assert len(cases) >= 200
    wrong: list[str] = []
    with httpx.Client(base_url=url, timeout=20) as client:
        for case in cases:
            wrong += check(client, case)
        _until_idle(engine)
        assert client.get("/health").json()["engine_restarts"] == 0
    assert not wrong, "\n".join(wrong)


def check(client: httpx.Client, case: Case) -> Iterator[str]:
    """What was wrong with the answer to one request, and with the server after it."""
    content = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    started = time.perf_counter()
    answer = client.request(case.method, case.path, content=content, headers=dict(case.headers))
    seconds = time.perf_counter() - started
    if answer.status_code not in case.statuses:
        yield f"{case.name}: {answer.status_code} {answer.text[:300]}"
    elif answer.status_code >= 400 and set(answer.json()) != {"error"}:
        yield f"{case.name}: not an error body: {answer.text[:300]}"
    if seconds > 8:
        yield f"{case.name}: took {seconds:.1f} s"
    health = client.get("/health")
    if health.status_code != 200 or not health.json()["ready"]:
        yield f"{case.name}: the server is not healthy after it"


async def test_broken_http_is_survived(stand: tuple[str, Engine]) -> None:
    url, engine = stand
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 2}).encode()
    requests = [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST " + CHAT.encode() + b" HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: "
        + str(len(body)).encode() + b"\r\n\r\n" + body[:-1],
    ]  # fmt: skip
    for request in requests:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(100), 0.3)
        writer.close()
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(CHAT, content=body)
        assert answer.status_code == 200
    _until_idle(engine)


def _until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while engine.has_work():
        assert time.monotonic() < deadline, "something still runs"
        time.sleep(0.01)
    stats = engine.stats()
    assert stats.free_blocks == stats.total_blocks
