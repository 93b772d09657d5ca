"""Chunks of prompts carried through the layers between the steps of running answers."""

import gc
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_driver import (
    GREEDY,
    Answer,
    Mixed,
    assert_equal,
    assert_same,
    drain,
    load,
    needs_exact_kernels,
    prompt_of,
    request,
    run_alone,
    speculating,
)
from halfbyte.engine import core
from halfbyte.engine.core import Engine
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from halfbyte.engine.slices import CHUNK_TOKENS
from halfbyte.model.decoder import DecoderLayer
from halfbyte.model.parts import Part
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint, write_tiny_eagle

ROOM: dict[str, Any] = {"max_model_len": 2200, "kv_cache_tokens": 2560}
# Nothing but the least, everything at once, and what the clock makes of times in between.
PLANS: dict[str, Sequence[float]] = {
    "least": [0.0],
    "whole": [math.inf],
    "turns": [0.0, 0.0002, 0.0, math.inf, 0.001],
}
STREAM = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)


class Plan:
    """A pacer that allows what it is told, and counts the steps in which it was asked."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = itertools.cycle(seconds)
        self.num_asked = 0
        self.observed: list[tuple[int, bool]] = []

    def allowance_s(self, num_decodes: int) -> float:
        assert num_decodes > 0
        self.num_asked += 1
        return next(self._seconds)

    def observe(self, num_decodes: int, decode_s: float, prompt_s: float) -> None:
        assert decode_s > 0
        self.observed.append((num_decodes, prompt_s > 0))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Plan:
    """How every engine that is loaded afterwards paces its chunks."""
    seconds = PLANS[getattr(request, "param", "least")]
    plan = Plan(seconds)
    monkeypatch.setattr(core, "SlicePacer", lambda target_gap_s: plan)
    return plan


def beside_a_stream(engine: Engine, *requests: GenerationRequest) -> dict[str, Answer]:
    """Requests that arrive while another generates, which ends when they have ended."""
    answers = {"stream": Answer([], [])}
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    for _ in range(3):
        for event in engine.step():
            answers[event.request_id].take(event)
    for item in requests:
        engine.add(item)
        answers[item.request_id] = Answer([], [])
    while any(answers[item.request_id].finish is None for item in requests):
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    engine.abort("stream")
    engine.check()
    stats = engine.stats()
    assert stats.free_blocks == stats.total_blocks
    return answers


@needs_exact_kernels
@pytest.mark.parametrize("kv_cache", ["fp8", "bf16"])
@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_slices_change_no_bit(tiny: Path, plan: Plan, kv_cache: str) -> None:
    params = [GREEDY, SamplingParams(max_tokens=9, seed=4, logprobs=3, ignore_eos=True)]
    # Contexts of one span and of two, and what is left of a chunk.
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1090, 33, 70, 2))]
    requests = [request(str(i), prompt, params[i % 2]) for i, prompt in enumerate(prompts)]
    whole = load(tiny, kv_cache=kv_cache, target_gap_ms="none", **ROOM)
    wanted = beside_a_stream(whole, *requests)
    assert plan.num_asked == 0
    found = beside_a_stream(load(tiny, kv_cache=kv_cache, **ROOM), *requests)
    assert plan.num_asked > 1190 // CHUNK_TOKENS
    for name in map(str, range(len(prompts))):
        assert_equal(found[name], wanted[name])
    streamed = min(len(found["stream"].token_ids), len(wanted["stream"].token_ids))
    assert streamed > 8
    assert found["stream"].token_ids[:streamed] == wanted["stream"].token_ids[:streamed]


@needs_exact_kernels
def test_a_stream_gets_a_token_in_every_step(tiny: Path, plan: Plan) -> None:
    engine = load(tiny, **ROOM)
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    engine.step()
    engine.add(request("long", prompt_of(300, 1), GREEDY))
    before = engine.stats().generated_tokens
    for num_steps in range(1, 100):
        assert [event.request_id for event in engine.step()] == ["stream"]
        assert engine.stats().generated_tokens == before + num_steps
    # Three parts a layer at least, and those of rows in four pieces each.
    assert engine.stats().steps == 100


@pytest.mark.parametrize("plan", ["least", "whole"], indirect=True)
def test_the_pacer_sees_every_step_that_generates(tiny: Path, plan: Plan) -> None:
    """Those in which a chunk ends, too: at first each step begins one and ends it."""
    engine = load(tiny, **ROOM)
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    for _ in range(4):
        engine.step()
    alone = len(plan.observed)
    assert plan.observed == [(1, False)] * alone and alone >= 3
    engine.add(request("long", prompt_of(300, 1), GREEDY))
    for _ in range(5):
        engine.step()
    assert plan.observed[alone:] == [(1, True)] * 5


@needs_exact_kernels
def test_prompt_logprobs_come_from_every_slice(tiny: Path, plan: Plan) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    prompt = prompt_of(100, 3)
    alone = run_alone(load(tiny, **ROOM), prompt, params)
    found = beside_a_stream(load(tiny, **ROOM), request("told", prompt, params))["told"]
    assert found.prompt_logprobs is not None
    assert_equal(found, alone)


@needs_exact_kernels
@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_pictures_go_through_slices(tmp_path: Path, plan: Plan) -> None:
    """Two of them, larger than a chunk; again from the cache, and one with other pixels."""
    write_tiny_checkpoint(tmp_path / "seeing", layers=2, vision=True)
    generator = torch.Generator().manual_seed(3)
    # 6 rows of 7 image tokens, each row closed by a break, the last by the end of the image.
    layout = [*([10] * 7 + [12]) * 6]
    layout[-1] = 13
    text = [token for token in prompt_of(60, 4) if token not in (10, 12, 13)]
    prompt = [*text[:20], *layout, *text[20:40], *layout, *text[40:]]
    size = 3, 6 * 28, 7 * 28
    pictures = [
        torch.randint(256, size, dtype=torch.uint8, generator=generator).numpy() for _ in range(3)
    ]
    offsets = 20, 40 + len(layout)

    def asked(name: str, *numbers: int) -> GenerationRequest:
        pairs = zip(numbers, offsets, strict=True)
        seen = tuple(ImageInput.of(pictures[i], at, len(layout)) for i, at in pairs)
        params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, ignore_eos=True)
        return GenerationRequest(name, tuple(prompt), params, images=seen)

    whole = load(tmp_path / "seeing", target_gap_ms="none", **ROOM)
    sliced = load(tmp_path / "seeing", **ROOM)
    for requests in (
        [asked("ab", 0, 1)],
        [asked("ab", 0, 1), asked("ac", 0, 2), asked("bb", 1, 1)],
    ):
        wanted = beside_a_stream(whole, *requests)
        assert plan.num_asked == 0 or requests[1:]
        found = beside_a_stream(sliced, *requests)
        for item in requests:
            assert_equal(found[item.request_id], wanted[item.request_id])
    assert plan.num_asked > 2 * len(prompt) // CHUNK_TOKENS
    answers = [found[name].logprobs for name in ("ab", "ac", "bb")]
    assert answers[0] != answers[1] != answers[2]
    assert sliced.stats().cached_tokens == whole.stats().cached_tokens > len(prompt)


def test_a_chunk_is_finished_at_once_when_the_streams_end(
    tiny: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny, **ROOM)
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    engine.step()
    engine.add(request("long", prompt_of(80, 1), GREEDY))
    for _ in range(5):
        engine.step()
    rows = []
    project = DecoderLayer.project

    def counted(self: DecoderLayer, delta: Any, residual: torch.Tensor, tap: Any = None) -> Any:
        rows.append(len(residual))
        return project(self, delta, residual, tap)

    monkeypatch.setattr(DecoderLayer, "project", counted)
    engine.abort("stream")
    num_asked = plan.num_asked
    engine.step()
    # The first layer had been projected: its rows are not computed again.
    assert sum(rows) == CHUNK_TOKENS
    answers = {"long": Answer([], [])}
    drain(engine, answers)
    assert plan.num_asked == num_asked
    assert_same(answers["long"], run_alone(load(tiny, **ROOM), prompt_of(80, 1)))


@pytest.mark.parametrize("num_steps", [1, 4, 9, 15])
def test_an_abort_in_a_chunk_frees_its_blocks_and_hurts_nobody(
    tiny: Path, plan: Plan, num_steps: int
) -> None:
    engine = load(tiny, max_model_len=320, kv_cache_tokens=320, block_tokens=4)
    alone = run_alone(engine, prompt_of(120, 8))
    answers = {name: Answer([], []) for name in ("stream", "gone", "next", "beside")}
    engine.add(request("stream", prompt_of(5, 77), GREEDY))
    engine.step()
    # Two prompts share the chunk: the second must not lose its place with the first.
    engine.add(request("gone", prompt_of(17, 7)))
    engine.add(request("beside", prompt_of(24, 9)))
    for _ in range(num_steps):
        for event in engine.step():
            answers[event.request_id].take(event)
    engine.abort("gone")
    engine.check()
    # Takes over the blocks that the chunk was being written to.
    engine.add(request("next", prompt_of(120, 8)))
    drain(engine, answers)
    assert_same(answers["next"], alone)
    assert_same(answers["beside"], run_alone(engine, prompt_of(24, 9)))
    stats = engine.stats()
    assert stats.free_blocks == stats.total_blocks


@needs_exact_kernels
def test_a_prompt_that_is_preempted_in_a_chunk_starts_again(tiny: Path, plan: Plan) -> None:
    options: dict[str, Any] = {"max_model_len": 160, "kv_cache_tokens": 160, "block_tokens": 4}
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, logprobs=2)
    prompts = {"old": prompt_of(20, 1), "young": prompt_of(84, 2)}
    wanted = {
        name: run_alone(load(tiny, **options), prompt, params if name == "old" else GREEDY)
        for name, prompt in prompts.items()
    }
    engine = load(tiny, prefix_cache=False, **options)
    answers = {name: Answer([], []) for name in prompts}
    engine.add(request("old", prompts["old"], params))
    for event in engine.step():
        answers[event.request_id].take(event)
    engine.add(request("young", prompts["young"]))
    drain(engine, answers)
    assert engine.stats().preemptions > 0
    for name, answer in answers.items():
        assert_equal(answer, wanted[name])


def test_a_prefix_is_shared_only_behind_the_last_layer(tiny: Path, plan: Plan) -> None:
    engine = load(tiny, **ROOM)
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    engine.step()
    cached = engine.stats().cached_blocks
    prompt = prompt_of(64, 5)
    answers = {name: Answer([], []) for name in ("stream", "first", "second")}
    engine.add(request("first", prompt))
    engine.add(request("second", [*prompt, 9]))
    for _ in range(4):
        engine.step()
    assert engine.stats().cached_blocks == cached
    while answers["second"].finish is None:
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    finish = answers["second"].finish
    assert finish.cached_tokens == 64
    assert_same(answers["second"], run_alone(load(tiny, **ROOM), [*prompt, 9]))


@needs_exact_kernels
@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_guesses_beside_a_chunk_change_no_answer(tiny: Path, plan: Plan) -> None:
    prompt = prompt_of(90, 6)
    stream = run_alone(load(tiny, **ROOM), prompt_of(5, 77), STREAM)
    wanted = run_alone(load(tiny, **ROOM), prompt)
    guesser = Mixed({"stream": stream.token_ids, "late": wanted.token_ids})
    engine = speculating(tiny, guesser, **ROOM)
    found = beside_a_stream(engine, request("late", prompt))
    assert_equal(found["late"], wanted)
    num_streamed = len(found["stream"].token_ids)
    assert found["stream"].token_ids == stream.token_ids[:num_streamed]
    assert engine.stats().accepted_tokens > 0 and plan.num_asked > 0


# --- pictures


# 6 rows of 7 image tokens, each row closed by a break, the last by the end of the image: 168
# patches, more than a block of any kind.
LAYOUT = [*([10] * 7 + [12]) * 5, *[10] * 7, 13]
WORDS = [token for token in prompt_of(60, 4) if token not in (10, 12, 13)]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "seeing"
    write_tiny_checkpoint(directory, layers=2, vision=True)
    return directory


def pixels_of(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    size = 3, 6 * 28, 7 * 28
    return torch.randint(256, size, dtype=torch.uint8, generator=generator).numpy()


def asked(name: str, *seeds: int, words: int = 20) -> GenerationRequest:
    """Words, and behind each so many of them a picture."""
    token_ids: list[int] = []
    images = []
    for seed in seeds:
        token_ids += WORDS[:words]
        images.append(ImageInput.of(pixels_of(seed), len(token_ids), len(LAYOUT)))
        token_ids += LAYOUT
    return GenerationRequest(name, (*token_ids, *WORDS[40:]), GREEDY, images=tuple(images))


def watch_encoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units of work that the engine's encoder does, one entry a call; 0 where it begins."""
    encoder = engine._runner.images
    assert encoder is not None
    done: list[int] = []
    begin = encoder._vision.begin

    def watched(*arguments: Any) -> Any:
        done.append(0)
        encoding = begin(*arguments)
        parts = encoding.parts

        def counted() -> Iterator[Part]:
            for part in parts():

                def compute(start: int, stop: int, inner: Any = part.compute) -> None:
                    done.append(stop - start)
                    inner(start, stop)

                yield part._replace(compute=compute)

        monkeypatch.setattr(encoding, "parts", counted)
        return encoding

    monkeypatch.setattr(encoder._vision, "begin", watched)
    return done


def started(engine: Engine) -> dict[str, Answer]:
    """A stream that has its first token."""
    engine.add(request("stream", prompt_of(5, 77), STREAM))
    engine.step()
    return {"stream": Answer([], [])}


@needs_exact_kernels
def test_a_stream_gets_a_token_in_every_step_while_a_picture_is_encoded(
    seeing: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(seeing, **ROOM)
    started(engine)
    done = watch_encoder(engine, monkeypatch)
    engine.add(asked("seen", 1))
    generated = engine.stats().generated_tokens
    num_steps = 0
    # Angles, 2 blocks of each part but 6 of queries, two layers: 25 units.
    while sum(done) < 24:
        assert [event.request_id for event in engine.step()] == ["stream"]
        num_steps += 1
        assert done[1:] == [1] * num_steps
    assert engine.stats().generated_tokens == generated + num_steps


def test_an_abort_lets_go_of_a_picture_that_was_begun(seeing: Path, plan: Plan) -> None:
    engine = load(seeing, **ROOM)
    started(engine)
    gone = asked("gone", 1)
    pixels = weakref.ref(gone.images[0].pixels)
    engine.add(gone)
    del gone
    for _ in range(9):
        engine.step()
    encoder = engine._runner.images
    assert encoder is not None and encoder.has_begun and pixels() is not None
    gc.disable()  # nothing that was begun may wait for a collection
    try:
        engine.abort("gone")
        assert not encoder.has_begun and pixels() is None
    finally:
        gc.enable()
    engine.check()
    again = beside_a_stream_that_runs(engine, asked("again", 1))
    assert_same(again, alone(seeing, asked("alone", 1)))


def alone(directory: Path, item: GenerationRequest) -> Answer:
    engine = load(directory, prefix_cache=False, target_gap_ms="none", **ROOM)
    return run_alone(engine, item.prompt_token_ids, item.params, images=item.images)


def beside_a_stream_that_runs(engine: Engine, item: GenerationRequest) -> Answer:
    answers = {name: Answer([], []) for name in ("stream", item.request_id)}
    engine.add(item)
    while answers[item.request_id].finish is None:
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    return answers[item.request_id]


@needs_exact_kernels
@pytest.mark.parametrize("num_steps", [2, 9, 20])
def test_who_leaves_a_chunk_costs_no_other_the_picture_that_was_begun(
    seeing: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    engine = load(seeing, **ROOM)
    started(engine)
    done = watch_encoder(engine, monkeypatch)
    # Both begin in one chunk; only the second has a picture there.
    engine.add(request("gone", prompt_of(5, 7)))
    engine.add(asked("seen", 1))
    for _ in range(num_steps):
        engine.step()
    before = sum(done)
    assert before == num_steps
    engine.abort("gone")
    encoder = engine._runner.images
    assert encoder is not None and encoder.has_begun
    answers = {name: Answer([], []) for name in ("stream", "seen")}
    while answers["seen"].finish is None:
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    assert done.count(0) == 1
    assert_equal(answers["seen"], alone(seeing, asked("alone", 1)))


@needs_exact_kernels
def test_a_preempted_picture_goes_on_where_it_was(
    seeing: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run out while it is encoded: its sequence waits, is admitted again, and answers."""
    options: dict[str, Any] = {"max_model_len": 128, "kv_cache_tokens": 128, "block_tokens": 4}
    engine = load(seeing, prefix_cache=False, **options)
    done = watch_encoder(engine, monkeypatch)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    engine.add(request("old", prompt_of(20, 1), params))
    engine.step()
    item = asked("young", 1)
    engine.add(item)
    answers = {name: Answer([], []) for name in ("old", "young")}
    while engine.stats().preemptions == 0:
        engine.step()
    # It is in the midst of the picture.
    encoder = engine._runner.images
    assert encoder is not None and encoder.has_begun and len(done) > 1
    while answers["young"].finish is None:
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    assert done.count(0) == 1 and not encoder.has_begun
    assert_equal(answers["young"], alone(seeing, asked("alone", 1)))


@needs_exact_kernels
@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_pictures_at_once_are_encoded_once_each(
    seeing: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(seeing, **ROOM)
    done = watch_encoder(engine, monkeypatch)
    requests = [asked("a", 1), asked("ab", 1, 2), asked("c", 3), asked("a again", 1)]
    found = beside_a_stream(engine, *requests)
    assert done.count(0) == 3
    for item in requests:
        wanted = alone(seeing, item)
        assert found[item.request_id].logprobs == wanted.logprobs


@needs_exact_kernels
def test_a_draft_model_finds_the_picture_behind_a_chunk(
    seeing: Path, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last entry of a chunk is made of the token behind, which here is a picture's first."""
    write_tiny_eagle(tmp_path / "head", tiny_config(layers=2, vision=True), seed=2)
    engine = load(seeing, speculative=str(tmp_path / "head"), max_sequences=4, **ROOM)
    done = watch_encoder(engine, monkeypatch)
    item = asked("seen", 1, words=CHUNK_TOKENS)
    found = beside_a_stream(engine, item)["seen"]
    assert set(done) == {0, 1}
    assert found.token_ids == alone(seeing, item).token_ids


@needs_exact_kernels
def test_a_picture_alone_is_encoded_in_short_steps(
    seeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anybody to wait for a token: a client that leaves need not wait for the tower."""
    monkeypatch.setattr(core, "_ENCODE_S", 0.0)
    engine = load(seeing, **ROOM)
    done = watch_encoder(engine, monkeypatch)
    engine.add(asked("gone", 1))
    for num_steps in range(1, 6):
        assert engine.step() == []
        assert done == [0, *[1] * num_steps]
    engine.abort("gone")
    engine.check()
    encoder = engine._runner.images
    assert encoder is not None and not encoder.has_begun
    answers = {"seen": Answer([], [])}
    engine.add(asked("seen", 2))
    drain(engine, answers)
    assert_equal(answers["seen"], alone(seeing, asked("alone", 2)))
