"""An engine of several processes gives the answers of one, and its deaths are seen and clean."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine_driver import (
    GREEDY,
    Answer,
    Mixed,
    assert_same,
    drain,
    load,
    prompt_of,
    request,
    run,
    run_alone,
)
from follower_processes import followers_of, until_gone
from halfbyte.engine import workers
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.engine.request import FinishEvent, SamplingParams
from halfbyte.engine.workers import check_devices
from halfbyte.errors import CapacityError, UsageError, WorkerError
from halfbyte.model.tiny import tiny_config
from mixed_checkpoint import write_mixed

LONG = replace(GREEDY, max_tokens=100)
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 16, 33, 90))]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed") / "tiny"
    write_mixed(directory, tiny_config(layers=2))
    return directory


@pytest.fixture(scope="module")
def pair(mixed: Path) -> Iterator[Engine]:
    """Two ranks with small chunks and a small cache; one pair for the tests of this file."""
    engine = load(mixed, tensor_parallel_size=2, max_batch_tokens=24, max_sequences=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def solo(mixed: Path) -> Engine:
    return load(mixed, max_batch_tokens=24, max_sequences=4)


def test_two_ranks_give_the_answers_of_one(pair: Engine, solo: Engine) -> None:
    """Chunked prompts, a batch of four, an FP8 cache of which each rank holds its heads."""
    requests = [request(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    found, wanted = run(pair, requests), run(solo, requests)
    for name, answer in wanted.items():
        assert_same(found[name], answer)
    ours, theirs = pair.stats(), solo.stats()
    assert ours.cache_bytes == theirs.cache_bytes
    # Norms are held twice; everything else once.
    norms = 2 * tiny_config(layers=2).text.width * (2 * 2 + 1)
    assert theirs.weight_bytes <= ours.weight_bytes - norms <= theirs.weight_bytes + 4096


def test_sampled_answers_are_those_of_one_process(pair: Engine, solo: Engine) -> None:
    """Rank 0 alone draws; equal logits and seeds give equal tokens."""
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    wanted = run_alone(solo, PROMPTS[2], params)
    assert run_alone(pair, PROMPTS[2], params).token_ids == wanted.token_ids


def test_cached_prefix_is_found_on_every_rank(pair: Engine, solo: Engine) -> None:
    prompt = prompt_of(48, 77)
    first, again = run_alone(pair, prompt), run_alone(pair, prompt)
    assert_same(again, first)
    assert_same(first, run_alone(solo, prompt))
    assert again.finish is not None and again.finish.cached_tokens == 32


def test_scoring_runs_on_all_ranks(pair: Engine, solo: Engine) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, max_tokens=1, ignore_eos=True)
    found, wanted = (run_alone(engine, PROMPTS[3], params) for engine in (pair, solo))
    assert found.prompt_logprobs is not None and wanted.prompt_logprobs is not None
    ours = [one.logprob for one in found.prompt_logprobs]
    assert ours == pytest.approx([one.logprob for one in wanted.prompt_logprobs], abs=2.0**-5)
    for logits, expected in zip(pair.score(PROMPTS[3]), solo.score(PROMPTS[3]), strict=True):
        assert logits.shape == expected.shape == (90, 512)


def test_aborted_answer_leaves_the_others_alone(pair: Engine, solo: Engine) -> None:
    answers = {name: Answer([], []) for name in ("kept", "dropped")}
    for index, name in enumerate(answers):
        pair.add(request(name, PROMPTS[index + 1], LONG if name == "dropped" else GREEDY))
    for _ in range(6):
        for event in pair.step():
            answers[event.request_id].take(event)
    finish = pair.abort("dropped")
    assert finish is not None and finish.reason == "abort" and 0 < finish.completion_tokens < 100
    drain(pair, answers)
    assert_same(answers["kept"], run_alone(solo, PROMPTS[1]))
    assert pair.stats().free_blocks == pair.stats().total_blocks


def test_guessed_tokens_are_checked_on_all_ranks(pair: Engine, solo: Engine) -> None:
    wanted = run_alone(solo, PROMPTS[2])
    config = replace(
        pair.config, speculative="ngram", num_speculative_tokens=4, adaptive_speculation=False
    )
    engine = Engine(pair._runner, config, guesser=Mixed({"alone": wanted.token_ids}))
    assert_same(run_alone(engine, PROMPTS[2]), wanted)
    assert engine.stats().steps < len(wanted.token_ids)


def test_sizes_that_cannot_be_are_refused_before_processes_start(mixed: Path) -> None:
    with pytest.raises(UsageError, match=r"size 4: 6 heads.*sizes that work: 1, 2, 6"):
        load(mixed, tensor_parallel_size=4)
    with pytest.raises(UsageError, match="one GPU; 2 tensor-parallel ranks"):
        check_devices(EngineConfig(device="cuda:1", tensor_parallel_size=2))
    with pytest.raises(CapacityError, match="size 99 needs as many GPUs"):
        check_devices(EngineConfig(device="cuda", tensor_parallel_size=99))


def test_failure_to_load_leaves_no_process(mixed: Path) -> None:
    """The cache does not fit: rank 0 says so, the rank that has loaded ends."""
    with pytest.raises(CapacityError, match="free after the weights"):
        load(mixed, tensor_parallel_size=2, kv_cache_tokens=10**9)
    assert until_gone(followers_of(os.getpid())[1:])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_lost_rank_ends_the_engine_with_its_reason(
    mixed: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or silent: the stream ends with an error, and the process is gone afterwards."""
    if number == signal.SIGSTOP:
        monkeypatch.setattr(workers, "_GRACE_S", 0.2)
    before = set(followers_of(os.getpid()))
    engine = load(mixed, tensor_parallel_size=2, collective_timeout_s=2.0)
    (pid,) = set(followers_of(os.getpid())) - before
    service = in_thread(engine)
    await service.start()
    stream = service.generate(request("cut off", PROMPTS[1], LONG))
    await anext(stream)
    os.kill(pid, number)
    started = time.monotonic()
    events = [event async for event in stream]
    assert time.monotonic() - started < 30
    finish = events[-1]
    assert isinstance(finish, FinishEvent) and finish.reason == "error"
    reason = "SIGKILL" if number == signal.SIGKILL else "not answered within 2 s"
    assert reason in (finish.message or "")
    assert not service.is_alive and reason in (service.failure or "")
    await service.stop()
    assert until_gone([pid])


async def test_rank_that_dies_while_nothing_runs_is_noticed(mixed: Path) -> None:
    before = set(followers_of(os.getpid()))
    engine = load(mixed, tensor_parallel_size=2)
    (pid,) = set(followers_of(os.getpid())) - before
    service = in_thread(engine)
    await service.start()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while service.is_alive:
            await asyncio.sleep(0.01)
    assert "SIGKILL" in (service.failure or "")
    engine.add(request("late", PROMPTS[1]))
    with pytest.raises(WorkerError, match="rank 1"):
        engine.step()
    await service.stop()


def test_forgotten_engine_takes_its_ranks_along(mixed: Path) -> None:
    before = set(followers_of(os.getpid()))
    engine = load(mixed, tensor_parallel_size=2)
    pids = list(set(followers_of(os.getpid())) - before)
    assert len(pids) == 1
    del engine
    gc.collect()
    assert until_gone(pids)


LEADER = """
import dataclasses, sys
from engine_driver import GREEDY, load, prompt_of, request
engine = load(sys.argv[1], tensor_parallel_size=2, kv_cache_tokens=4096, max_model_len=4000)
engine.add(request("a", prompt_of(9), dataclasses.replace(GREEDY, max_tokens=3900)))
print("running", flush=True)
while engine.has_work():
    engine.step()
"""


def test_no_rank_outlives_a_killed_leader(mixed: Path) -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, str(mixed)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with leader:
        assert leader.stdout is not None and leader.stdout.readline() == b"running\n"
        pids = followers_of(leader.pid)
        assert len(pids) == 1
        leader.kill()
    assert until_gone(pids)
