"""Runs an engine in tests: load with small defaults, run requests, collect their answers."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import Generated, generate, steps
from halfbyte.engine.plan.sequence import Sequence as EngineSequence
from halfbyte.engine.plan.speculation import Guesser
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import LogitsHook
from halfbyte.kernels import dispatch
from tolerances import SAME_LOGPROB

Answer = Generated
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)


def load(
    directory: Path,
    hook: LogitsHook | None = None,
    guesser: Guesser | None = None,
    **options: Any,
) -> Engine:
    defaults: dict[str, Any] = {"max_model_len": 160, "kv_cache_tokens": 640, "kv_cache": "fp8"}
    config = replace(EngineConfig(), **(defaults | options))
    return Engine.load(directory, config, logits_hook=hook, guesser=guesser)


def request(
    request_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), params, **more)


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, Answer]:
    """Run requests that arrive together, checking the books after every step."""
    return generate(engine, requests, engine.check)


def drain(engine: Engine, answers: dict[str, Answer]) -> None:
    for events in steps(engine):
        for event in events:
            answers[event.request_id].take(event)
        engine.check()


def run_alone(
    engine: Engine, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> Answer:
    return run(engine, [request("alone", prompt, params, **more)])["alone"]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 512, (length,), generator=generator).tolist()
    return token_ids


# Speculation computes k + 1 rows where a plain step computes one; only kernels whose rows do not
# depend on each other then give the same bits (and so the same draws).
needs_exact_kernels = pytest.mark.skipif(
    dispatch.chosen(torch.device("cpu")) != "native",
    reason="equality to the last bit needs the native kernels",
)


class Mixed:
    """Guesses the known answers of requests, each token wrong with a chance of one in four."""

    def __init__(self, answers: Mapping[str, Sequence[int]], seed: int = 0) -> None:
        self.answers = answers
        self.random = random.Random(seed)
        self.forgotten: list[int] = []

    def confidence(self, sequence: EngineSequence) -> int | None:
        return 0 if sequence.request.request_id in self.answers else None

    def guess(self, wanted: Sequence[tuple[EngineSequence, int]]) -> list[list[int]]:
        return [self.guess_one(sequence, count) for sequence, count in wanted]

    def guess_one(self, sequence: EngineSequence, count: int) -> list[int]:
        answer = self.answers[sequence.request.request_id]
        known = sequence.num_generated
        right = [*answer[known : known + count], *[5] * count][:count]
        return [
            self.random.randrange(3, 512) if self.random.random() < 0.25 else token_id
            for token_id in right
        ]

    def forget(self, sequence: EngineSequence) -> None:
        self.forgotten.append(sequence.arrival)


def speculating(directory: Path, guesser: Any, *, most: int = 4, **options: Any) -> Engine:
    return load(
        directory,
        guesser=guesser,
        speculative="ngram",
        num_speculative_tokens=most,
        adaptive_speculation=False,
        **options,
    )


def assert_equal(found: Answer, wanted: Answer) -> None:
    """The same in everything a client can see, to the last bit of a log-prob."""
    assert found.token_ids == wanted.token_ids
    assert found.logprobs == wanted.logprobs
    assert found.prompt_logprobs == wanted.prompt_logprobs
    assert found.finish is not None and wanted.finish is not None
    ours = replace(found.finish, request_id="", cached_tokens=0)
    assert ours == replace(wanted.finish, request_id="", cached_tokens=0)


def assert_same(found: Answer, wanted: Answer) -> None:
    """Equal tokens up to the first tie, equal log-probs up to the order of sums."""
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        if ours.token_id != theirs.token_id:
            (_, best), (_, second) = theirs.top
            assert best - second <= SAME_LOGPROB, f"{ours} instead of {theirs}"
            return
        assert ours.logprob == pytest.approx(theirs.logprob, abs=SAME_LOGPROB)
