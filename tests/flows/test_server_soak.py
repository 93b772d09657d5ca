"""The soak in small, in one process; `benchmarks/soak.py` is the large one, with its record."""

from pathlib import Path

import pytest
import torch
from benchmarks.soak_clients import Asked, answer_of, made_up, soak, streamed_answer

from flows.stand import write_model
from halfbyte.chat.mask_plan import MaskMaker
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.admin import create_admin
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import address, listen, serving


async def test_a_crowd_some_of_whom_leave(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    write_model(tmp_path / "tiny", vision=True)
    config = EngineConfig(max_model_len=1024, kv_cache_tokens=2048, max_sequences=16)
    engine = Engine.load(tmp_path / "tiny", config)
    chat = load_chat(tmp_path / "tiny")
    masks = MaskMaker(chat.vocabulary, chat.control)
    service = Supervisor(in_thread(engine, masks), lambda: in_thread(engine, masks))
    settings = ServerConfig(("tiny",), engine.max_model_len, engine.vocab_size)
    app = create_app(service, chat, settings, access_log=None)
    with listen("127.0.0.1", 0) as listener:
        admin = create_admin(app.state.backend, access_log=None)
        with serving(app, (admin, listener)) as url:
            asked = made_up(30, 1, "tiny")
            report = await soak(url, address(listener), asked, count=100, concurrent=32)
    assert not report.different, report.different[0]
    assert not report.leaks()
    assert report.outcomes["answered"] >= 40 and report.outcomes["left"] >= 15
    assert len(report.kinds) == 10
    engine.check()
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_a_wrong_answer_would_be_seen() -> None:
    """The sums that are compared tell apart what a client would."""
    asked = Asked("x", "/v1/chat/completions", {"stream": True})
    head = 'data: {"choices": [{"index": 0, "finish_reason": null, "delta": '

    def lines(*deltas: str, end: str = "stop") -> list[str]:
        last = f'data: {{"choices": [{{"index": 0, "delta": {{}}, "finish_reason": "{end}"}}]}}'
        return [*(f"{head}{delta}}}]}}" for delta in deltas), last, "", "data: [DONE]"]

    call = (
        '{"tool_calls": [{"index": 0, "id": "%s", "function": {"name": "f", "arguments": "%s"}}]}'
    )
    same = streamed_answer(asked, lines('{"content": "ab"}'))
    assert streamed_answer(asked, lines('{"content": "a"}', '{"content": "b"}')) == same
    whole = '{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "ab"}}]}'
    assert answer_of(asked, whole) == same
    others = [
        lines('{"content": "ac"}'),
        lines('{"content": "ab"}', end="length"),
        lines('{"content": "ab"}', '{"reasoning_content": "x"}'),
        lines('{"content": "ab"}', call % ("a", "1")),
        ['data: {"error": {"message": "x"}}'],
    ]
    for other in others:
        assert streamed_answer(asked, other) != same
    assert streamed_answer(asked, lines(call % ("a", "1"))) == streamed_answer(
        asked, lines(call % ("b", "1"))
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_made_up_requests_are_the_same_for_a_seed(seed: int) -> None:
    assert made_up(20, seed, "m") == made_up(20, seed, "m")
