r"""A server for clients that others wrote: the real application on a small random model.

A random model says nothing sensible, so a hook on the logits plays a scripted one. It reads lines
of the last user message that has any: `@say TEXT`, `@think TEXT`, `@call NAME {..}`; several on one
line are joined by ` ;; `, and `\n` in what is said ends a line. Each line is one turn of the assistant's. Everything else - the chat
format, masks, streams, caches, the wire - is as users get it.

    python clients/server.py --port 8123 --model build/clients/model --record requests.jsonl
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "data" / "chat"))

from make_fixtures import make_tekken  # noqa: E402

from halfbyte.chat.tokens import load_chat  # noqa: E402
from halfbyte.chat.vocabulary import Vocabulary  # noqa: E402
from halfbyte.engine.config import EngineConfig  # noqa: E402
from halfbyte.engine.core import Engine  # noqa: E402
from halfbyte.engine.request import GenerationRequest  # noqa: E402
from halfbyte.engine.service import EngineService  # noqa: E402
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint  # noqa: E402
from halfbyte.server.http.app import create_app  # noqa: E402
from halfbyte.server.config import Limits, ServerConfig  # noqa: E402
from halfbyte.server.run import listen, serve  # noqa: E402
from halfbyte.server.ops.supervise import Supervisor  # noqa: E402

CONTEXT = 131_072
# The whole vocabulary that mistral-common ships: agents send prompts of 30,000 tokens and more.
RANKS, SPECIALS = 130_072, 1000


def write_model(directory: Path) -> None:
    """Two random layers with a vision tower, under the full tokenizer."""
    config = tiny_config(layers=2, vision=True)
    text = dataclasses.replace(
        config.text, vocab_size=RANKS + SPECIALS, max_positions=CONTEXT, num_heads=2, num_kv_heads=1
    )
    write_tiny_checkpoint(
        directory, config=dataclasses.replace(config, text=text), dialect="none"
    )
    make_tekken(directory, RANKS, SPECIALS)


class Player:
    """The hook: what the script in the prompt wants, token by token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        control = vocabulary.control
        self._begin, self._end = control["[INST]"], control["[/INST]"]
        self._eos = vocabulary.eos_token_ids[0]
        # What brings an answer to its end soonest where no script says anything, or where the mask
        # does not allow what it says: each is tried before the next.
        self._closing = [self._eos, *map(self._one, ('"}', '"', "}", "]", ",", ":", "1", "{", "["))]
        self._scripts: dict[str, list[int]] = {}

    def _one(self, text: str) -> int:
        (token_id,) = self._vocabulary.encode_text(text)
        return token_id

    def __call__(
        self, request: GenerationRequest, generated: Sequence[int], logits_V: Tensor
    ) -> None:
        script = self._scripts.get(request.request_id)
        if script is None:
            script = self._script(request.prompt_token_ids)
            self._scripts = {request.request_id: script, **self._scripts}
            for old in list(self._scripts)[64:]:
                del self._scripts[old]
        place = len(generated)
        if place < len(script) and list(generated) == script[:place]:
            logits_V[script[place]] = 1e6
            return
        for rank, token_id in enumerate(self._closing):
            logits_V[token_id] = 1e6 - 1e4 * rank

    def _script(self, prompt: Sequence[int]) -> list[int]:
        """Tokens of the turn that comes next."""
        ends = [index for index, token_id in enumerate(prompt) if token_id == self._end]
        for end in reversed(ends):
            start = max(index for index in range(end) if prompt[index] == self._begin)
            text = self._vocabulary.decode(tuple(prompt[start:end]))
            lines = [line.strip() for line in text.splitlines()]
            lines = [line for line in lines if line.startswith(("@say ", "@think ", "@call "))]
            if lines:
                turn = sum(token_id == self._eos for token_id in prompt[end:])
                return self._tokens(lines[turn] if turn < len(lines) else "@say Done.")
        return self._tokens("@say Hello.")

    def _tokens(self, line: str) -> list[int]:
        control, encode = self._vocabulary.control, self._vocabulary.encode_text
        ids: list[int] = []
        for part in line.split(" ;; "):
            verb, _, text = part.partition(" ")
            if verb == "@think":
                ids += [control["[THINK]"], *encode(text), control["[/THINK]"]]
            elif verb == "@call":
                name, _, arguments = text.partition(" ")
                ids += [control["[TOOL_CALLS]"], *encode(name)]
                ids += [control["[ARGS]"], *encode(arguments)]
            else:
                ids += encode(text.replace("\\n", "\n"))
        return [*ids, self._eos]


class Recorder:
    """Writes each request and the status and warnings of its answer, a line each."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app = app
        self._file = path.open("a", encoding="utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        told: dict[str, Any] = {}
        answer = b""

        async def receive_kept() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def send_kept(message: Message) -> None:
            nonlocal answer
            if message["type"] == "http.response.start":
                headers = {name.decode(): value.decode() for name, value in message["headers"]}
                told["status"] = message["status"]
                told["warning"] = headers.get("x-halfbyte-warning")
            else:
                answer = (answer + message.get("body", b""))[:20_000]
            await send(message)

        try:
            await self._app(scope, receive_kept, send_kept)
        finally:
            try:
                sent: Any = json.loads(body) if body else None
            except ValueError:
                sent = body.decode(errors="replace")[:1000]
            line = {
                "request": f"{scope['method']} {scope['path']}",
                "query": scope["query_string"].decode(),
                "headers": {name.decode(): value.decode() for name, value in scope["headers"]},
                "body": sent,
                **told,
                "answer": answer.decode(errors="replace"),
            }
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True, help="made there if it is not")
    parser.add_argument("--record", type=Path, help="a file that gets a line for each request")
    args = parser.parse_args()
    if not (args.model / "tekken.json").exists():
        write_model(args.model)
    chat = load_chat(args.model)
    player = Player(chat.vocabulary)
    config = EngineConfig(max_model_len=CONTEXT, kv_cache_tokens=2 * CONTEXT, max_sequences=16)
    engine = Engine.load(args.model, config, logits_hook=player)

    def again() -> EngineService:
        return EngineService(Engine.load(args.model, config, logits_hook=player))

    settings = ServerConfig(("tiny",), engine.max_model_len, engine.vocab_size, limits=Limits())
    app = create_app(Supervisor(EngineService(engine), again), chat, settings, access_log=None)
    app.state.backend.compiler.start()
    if args.record is not None:
        app.add_middleware(Recorder, path=args.record)
    serve(app, listen("127.0.0.1", args.port), lambda url: print(f"ready at {url}", flush=True))


if __name__ == "__main__":
    main()
