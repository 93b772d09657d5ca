import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from engine_driver import GREEDY, Answer, load, prompt_of, request, run_alone
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.engine.request import FinishEvent, GenerationRequest, TokensEvent
from halfbyte.engine.service import EngineService
from halfbyte.errors import CapacityError, RequestError

PROMPT = prompt_of(40)
LONG = replace(GREEDY, max_tokens=100)


@pytest.fixture
def engine(tiny: Path) -> Engine:
    return load(tiny)


@pytest_asyncio.fixture
async def service(engine: Engine) -> AsyncIterator[EngineService]:
    made = in_thread(engine)
    await made.start()
    yield made
    await made.stop()


async def answer_of(service: EngineService, item: GenerationRequest) -> Answer:
    answer = Answer([], [])
    async for event in service.generate(item):
        answer.take(event)
    return answer


async def until_idle(service: EngineService) -> None:
    """Nothing runs any more, and every block is back."""
    for _ in range(500):
        stats = service.stats()
        if not stats.running + stats.waiting and stats.free_blocks == stats.total_blocks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still working: {service.stats()}")


async def test_streams_give_the_solo_answers(service: EngineService, tiny: Path) -> None:
    prompts = [prompt_of(20 + i, i) for i in range(6)]
    items = [request(str(i), prompt) for i, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(answer_of(service, item) for item in items))
    engine = load(tiny)
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.token_ids == run_alone(engine, prompt).token_ids
        assert answer.finish is not None and answer.finish.reason == "length"


async def test_slow_reader_gets_everything_merged(service: EngineService) -> None:
    events = []
    async with aclosing(service.generate(request("slow", PROMPT, LONG))) as stream:
        events.append(await anext(stream))
        await until_idle(service)
        events += [event async for event in stream]
    tokens = [event for event in events if isinstance(event, TokensEvent)]
    assert sum(len(event.token_ids) for event in tokens) == 100
    assert sum(len(event.logprobs or ()) for event in tokens) == 100
    assert len(tokens) < 10
    assert isinstance(events[-1], FinishEvent)


async def test_what_nobody_reads_is_not_kept(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.engine.service.MAX_UNREAD", 100)
    with_alternatives = replace(LONG, logprobs=20)
    async with aclosing(service.generate(request("unread", PROMPT, with_alternatives))) as stream:
        # On a busy machine the first look may come when it is over already.
        first = await anext(stream)
        reading = asyncio.create_task(answer_of(service, request("read", PROMPT, LONG)))
        # The engine goes on for others, and this one's blocks are free long before its end.
        answer = await reading
        assert answer.finish is not None and answer.finish.reason == "length"
        await until_idle(service)
        rest = [first, *[event async for event in stream]]
    assert isinstance(rest[-1], FinishEvent) and rest[-1].reason == "abort"
    assert "not read" in (rest[-1].message or "")
    read = [event for event in rest if isinstance(event, TokensEvent)]
    assert sum(len(event.token_ids) for event in read) <= 100
    assert service.stats().generated_tokens < 200


async def test_closing_a_stream_frees_its_blocks(service: EngineService) -> None:
    stream = service.generate(request("gone", PROMPT, LONG))
    await anext(stream)
    assert service.stats().running == 1
    await stream.aclose()
    await until_idle(service)
    stats = service.stats()
    assert stats.free_blocks == stats.total_blocks
    assert stats.generated_tokens < 100
    # The id is free again at once.
    assert len((await answer_of(service, request("gone", PROMPT))).token_ids) == 12


async def test_cancelled_reader_aborts(service: EngineService) -> None:
    task = asyncio.create_task(answer_of(service, request("a", PROMPT, LONG)))
    while not service.stats().running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(service)
    assert service.stats().free_blocks == service.stats().total_blocks


async def test_abort_ends_the_stream_with_its_counts(service: EngineService) -> None:
    answer = Answer([], [])
    async for event in service.generate(request("a", PROMPT, LONG)):
        answer.take(event)
        service.abort("a")
    assert answer.finish is not None and answer.finish.reason == "abort"
    assert answer.finish.completion_tokens == len(answer.token_ids) < 100


async def test_invalid_request_raises_before_any_event(service: EngineService) -> None:
    with pytest.raises(RequestError, match="160 tokens"):
        await anext(service.generate(request("a", [5] * 160)))
    assert service.stats().requests == 0


async def test_full_service_refuses(tiny: Path) -> None:
    service = in_thread(load(tiny), max_requests=1)
    await service.start()
    async with aclosing(service.generate(request("a", PROMPT, LONG))) as stream:
        await anext(stream)
        with pytest.raises(RequestError, match="in use"):
            await anext(service.generate(request("a", PROMPT)))
        with pytest.raises(CapacityError, match="at most 1"):
            await anext(service.generate(request("b", PROMPT)))
    await service.stop()


class Panic(BaseException):
    """What a library in another language raises: no Exception."""


@pytest.mark.parametrize("kind", [MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit, Panic])
async def test_death_of_the_engine_reaches_everyone(tiny: Path, kind: type[BaseException]) -> None:
    def die(item: GenerationRequest, generated: Sequence[int], logits_V: torch.Tensor) -> None:
        if item.request_id == "deadly" and len(generated) == 3:
            raise kind("no more")

    service = in_thread(load(tiny, die))
    await service.start()
    assert service.is_alive
    items = [request("deadly", PROMPT), request("victim", PROMPT, LONG)]
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(answer_of(service, item) for item in items))
    for answer in answers:
        assert answer.finish is not None and answer.finish.reason == "error"
        assert "no more" in (answer.finish.message or "")
    assert not service.is_alive
    late = await answer_of(service, request("late", PROMPT))
    assert late.finish is not None and late.finish.reason == "error"
    await service.stop()


async def test_draining_lets_answers_finish_and_takes_no_more(tiny: Path) -> None:
    service = in_thread(load(tiny))
    await service.start()
    running = asyncio.create_task(answer_of(service, request("a", PROMPT, LONG)))
    while not service.stats().running:
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(service.stop(drain_s=20.0))
    await asyncio.sleep(0)
    with pytest.raises(CapacityError, match="shutting down"):
        await anext(service.generate(request("b", PROMPT)))
    await stopping
    answer = await running
    assert answer.finish is not None and answer.finish.reason == "length"
    assert not service.is_alive


async def test_stop_aborts_what_does_not_finish(tiny: Path) -> None:
    engine = load(tiny)
    service = in_thread(engine)
    await service.start()
    running = asyncio.create_task(answer_of(service, request("a", PROMPT, LONG)))
    while not service.stats().running:
        await asyncio.sleep(0.001)
    await service.stop()
    answer = await running
    assert answer.finish is not None and answer.finish.reason == "abort"
    assert service.stats().free_blocks == service.stats().total_blocks
    assert engine.request_ids() == ()
