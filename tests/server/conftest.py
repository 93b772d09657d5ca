"""An app over a scripted engine, and the official client talking to it in process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

import kept_processes
from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from server.scripted import ScriptedService

DATA = Path(__file__).parent.parent / "data" / "chat"


@pytest.fixture(autouse=True, scope="module")
def kept() -> Iterator[None]:
    with kept_processes.kept_processes():
        yield


@pytest.fixture(scope="session")
def mistral() -> MistralFormat:
    chat = load_chat(DATA / "tekken")
    assert isinstance(chat, MistralFormat)
    return chat


@pytest.fixture(scope="session")
def chatml() -> TemplateFormat:
    chat = load_chat(DATA / "chatml")
    assert isinstance(chat, TemplateFormat)
    return chat


@dataclass
class Bench:
    """One app, its engine, and ways to talk to it."""

    app: FastAPI
    service: ScriptedService
    chat: ChatFormat

    def ids(self, *parts: str | int) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.chat.vocabulary.encode_text(part)
        return ids

    def http(self, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", **options)

    def openai(self, key: str = "none") -> openai.AsyncOpenAI:
        # The client may bring its own copy of httpx; the same methods are what it needs.
        http: Any = self.http()
        return openai.AsyncOpenAI(
            api_key=key, base_url="http://test/v1", http_client=http, max_retries=0
        )


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(mistral: MistralFormat) -> MakeBench:
    def make(
        *script: str | int,
        chat: ChatFormat = mistral,
        service: dict[str, Any] | None = None,
        **config: Any,
    ) -> Bench:
        scripted = ScriptedService(lambda request: (), **(service or {}))
        settings = {
            "model_names": ("m",),
            "max_model_len": 4096,
            "vocab_size": 800,
            # A misspelt field in a test is a mistake of the test.
            "unknown_fields": "refuse",
            "strict_effort": True,
            **config,
        }
        app = create_app(
            Supervisor(scripted, lambda: scripted), chat, ServerConfig(**settings), access_log=None
        )
        bench = Bench(app, scripted, chat)
        ids: Sequence[int] = bench.ids(*script)
        scripted.script = lambda request: ids
        return bench

    return make
