"""Runs an engine in tests: load with small defaults, run requests, collect their answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.request import (
    Event,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.engine.sampler import LogitsHook

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)


def load(directory: Path, hook: LogitsHook | None = None, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"max_model_len": 160, "kv_cache_tokens": 640, "kv_cache": "fp8"}
    config = replace(EngineConfig(), **(defaults | options))
    return Engine.load(directory, config, logits_hook=hook)


@dataclass
class Answer:
    """Everything that came of one request."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: FinishEvent | None = None

    def take(self, event: Event) -> None:
        assert self.finish is None, "an event after the last one"
        if isinstance(event, FinishEvent):
            self.finish = event
            return
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or ()
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            self.prompt_logprobs = event.prompt_logprobs


def request(
    request_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), params, **more)


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, Answer]:
    """Run requests that arrive together, checking the books after every step."""
    answers = {}
    for item in requests:
        engine.add(item)
        answers[item.request_id] = Answer([], [])
    drain(engine, answers)
    return answers


def drain(engine: Engine, answers: dict[str, Answer]) -> None:
    while engine.has_work():
        for event in engine.step():
            answers[event.request_id].take(event)
            if isinstance(event, TokensEvent):
                assert event.token_ids or event.prompt_logprobs is not None
        engine.check()


def run_alone(
    engine: Engine, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> Answer:
    return run(engine, [request("alone", prompt, params, **more)])["alone"]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 512, (length,), generator=generator).tolist()
    return token_ids
