"""A server over the real engine on a small random model, and a hook that forces its tokens.

A random model says nothing sensible. Where an answer must have a certain shape, a hook on the
logits forces its tokens; everything else - masks, sampling, cache, scheduling - is as it is for
users. A model that really thinks and calls tools is not part of these tests.
"""

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
from torch import Tensor

from halfbyte.chat.mask_plan import MaskMaker
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.engine.request import GenerationRequest
from halfbyte.engine.service import EngineService
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor

DATA = Path(__file__).parent.parent / "data" / "chat"
THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
HELLO = [{"role": "user", "content": "Hello"}]


class Script:
    """The hook: tokens that an answer must have, by position; None leaves the model its choice."""

    def __init__(self) -> None:
        self.ids: list[int] | None = None
        self.dies = False

    def __call__(
        self, request: GenerationRequest, generated: Sequence[int], logits_V: Tensor
    ) -> None:
        if self.dies:
            raise RuntimeError("the card has fallen off the bus")
        if self.ids is not None and len(generated) < len(self.ids):
            logits_V[self.ids[len(generated)]] = 1e4


@dataclasses.dataclass
class Stand:
    """A running application."""

    http: httpx.AsyncClient
    client: Any
    engine: Engine
    service: Supervisor[EngineService]
    chat: ChatFormat
    script: Script

    def force(self, *parts: str | int) -> None:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.chat.vocabulary.encode_text(part)
        self.script.ids = ids

    async def idle(self) -> None:
        """Nothing runs and every block is back."""
        async with asyncio.timeout(5):
            while self.engine.stats().running or self.engine.stats().waiting:
                await asyncio.sleep(0.005)
        stats = self.engine.stats()
        assert stats.free_blocks == stats.total_blocks
        self.engine.check()


def write_model(
    directory: Path, *, vision: bool = False, dialect: Literal["none", "mistral-fp8"] = "none"
) -> None:
    """Two random layers under the small tokenizer; with `vision` a Pixtral encoder of two more."""
    config = tiny_config(layers=2, vision=vision)
    text = dataclasses.replace(config.text, vocab_size=800)
    config = dataclasses.replace(config, text=text)
    write_tiny_checkpoint(directory, config=config, dialect=dialect)
    shutil.copy(DATA / "tekken" / "tekken.json", directory)


@contextlib.asynccontextmanager
async def standing(directory: Path, **options: Any) -> AsyncIterator[Stand]:
    """The application over a checkpoint; `options` are the engine's."""
    script = Script()
    config = EngineConfig(**options)
    engine = Engine.load(directory, config, logits_hook=script)
    chat = load_chat(directory)
    masks = MaskMaker(chat.vocabulary, chat.control)

    def load() -> EngineService:
        return in_thread(Engine.load(directory, config, logits_hook=script), masks)

    service = Supervisor(in_thread(engine, masks), load)
    settings = ServerConfig(("tiny",), engine.max_model_len, engine.vocab_size)
    app = create_app(service, chat, settings, access_log=None)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        http: Any = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=50)
        client = openai.AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
        )
        yield Stand(http, client, engine, service, chat, script)


async def ask(stand: Stand, **options: Any) -> Any:
    request = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24, **options}
    return await stand.client.chat.completions.create(**request)


async def streamed_text(stand: Stand, **options: Any) -> str:
    stream = await ask(stand, stream=True, **options)
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
