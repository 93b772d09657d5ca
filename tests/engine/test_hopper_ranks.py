"""The Hopper device over two tensor-parallel ranks: twins of the kernels, ranks as threads."""

import pickle
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_twin import twin_engine, twin_runner
from engine_driver import GREEDY, Answer, assert_same, prompt_of, request, run
from halfbyte.engine.core import Engine
from halfbyte.engine.graphs import MAX_ROWS
from halfbyte.engine.plan.step import PlannedStep
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import LogitsHook
from halfbyte.model.parallel import Communicator
from hopper import hopper_config, write_fp8
from parallel_ranks import on_ranks

PLAIN = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = replace(PLAIN, temperature=0.8, top_p=0.9, seed=3)
# Without rounding activations to FP8, which would make much of a last bit of a sum.
MODE = "weight_only"
# The last one has more rows than a graph: it is a prefill, and another's token comes along.
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 17, 60, 140))]


class Relay:
    """What `Workers` is to rank 0, over a queue to a thread."""

    failure = None
    weight_bytes = 0

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.num_replays = 0
        self.num_prefills = 0

    @contextmanager
    def running(self, step: PlannedStep) -> Iterator[None]:
        self.num_replays += step.num_rows <= MAX_ROWS
        self.num_prefills += step.num_rows > MAX_ROWS
        self.messages.put(pickle.dumps(step))
        yield

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self.messages.put(None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tmp_path_factory.mktemp("hopper") / "fp8", hopper_config())


def answers_of_two(
    directory: Path, requests: list[GenerationRequest], hook: LogitsHook | None = None
) -> tuple[dict[str, Answer], Relay]:
    relay = Relay()

    def rank(communicator: Communicator) -> dict[str, Answer]:
        if communicator.rank > 0:
            runner, _ = twin_runner(directory, communicator, mode=MODE)
            while (message := relay.messages.get()) is not None:
                runner.device.follow(pickle.loads(message))
            return {}
        try:
            runner, config = twin_runner(directory, communicator, relay, mode=MODE)
            return run(Engine(runner, config, logits_hook=hook), requests)
        finally:
            relay.close()

    return on_ranks(2, rank)[0], relay


@pytest.mark.parametrize("params", [GREEDY, PLAIN], ids=["read", "ahead"])
def test_two_ranks_answer_as_one(directory: Path, params: SamplingParams) -> None:
    """Graphs and prefills; logits read by the host, or tokens chosen a step ahead and shared."""
    requests = [request(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]
    wanted = run(twin_engine(directory, mode=MODE), requests)
    found, relay = answers_of_two(directory, requests)
    assert relay.num_prefills > 0 and relay.num_replays > 0
    for name, answer in wanted.items():
        assert found[name].token_ids == answer.token_ids
        if params is GREEDY:
            assert_same(found[name], answer)


def test_tokens_drawn_ahead_are_those_that_the_host_draws(directory: Path) -> None:
    """A hook that changes nothing makes the engine read every step's logits."""
    requests = [request(str(i), prompt, SAMPLED) for i, prompt in enumerate(PROMPTS)]
    found, _ = answers_of_two(directory, requests)
    wanted, _ = answers_of_two(directory, requests, lambda *arguments: None)
    for name, answer in wanted.items():
        assert found[name].token_ids == answer.token_ids
