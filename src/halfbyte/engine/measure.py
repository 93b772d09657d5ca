"""Measures what steps cost on this device, once after loading: the pacer's first table.

It runs a step of each size that prompts are read with, and some deep in a context. They leave no
trace: their sequences belong to no request, and all their blocks are block 0, which whoever gets it
writes before reading.
"""

import time

import torch

from halfbyte.engine.config import EngineConfig
from halfbyte.engine.plan.pacing import StepCosts
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.runner import Runner
from halfbyte.log import logger

# Larger steps are not measured, as each would take a second on 88 layers: their cost is taken to
# grow with their rows.
_MOST_ROWS = 1024
# Rows and depth of the steps deep in a context: one that runs as a graph, where every row reads the
# context again, and one that does not.
_DEEP = ((128, 4096), (512, 16384))
# One of as few rows, so deep that it no longer runs as a graph.
_SHARED = (128, 16384)
# Prompt tokens beside answers in a step that is run ahead of all measuring.
_BESIDE = 192


def measure_costs(runner: Runner, config: EngineConfig) -> StepCosts:
    """Time a step of each size: about three seconds on 88 layers."""
    started = time.perf_counter()
    _load_kernels(runner, config)
    sizes = runner.step_sizes
    largest = min(config.max_batch_tokens, _most_tokens(config), _MOST_ROWS)
    wanted = [size for size in sizes if size <= largest]
    seconds = {size: _seconds(runner, config, 0, size) for size in wanted}
    deep_s: dict[int, float] = {}
    for rows, most in _DEEP:
        depth = min(most, _most_tokens(config) - rows)
        if rows in seconds and depth > rows:
            more_s = _seconds(runner, config, depth, rows) - seconds[rows]
            deep_s[rows] = max(more_s, 0.0) / _pairs(rows, depth)
    shared_s = None
    rows, depth = _SHARED
    if len(deep_s) == len(_DEEP) and depth + rows <= _most_tokens(config):
        last_s = deep_s[_DEEP[-1][0]]
        shared_s = _seconds(runner, config, depth, rows) - last_s * _pairs(rows, depth)
    if runner.device.saturation is not None:
        runner.device.saturation.clear()
    logger.info(
        "steps of %s rows measured in %.1f s: %s ms, and %s ns for a row and a token of context",
        ", ".join(map(str, wanted)),
        time.perf_counter() - started,
        ", ".join(f"{s * 1e3:.1f}" for s in seconds.values()),
        ", ".join(f"{s * 1e9:.1f}" for s in deep_s.values()),
    )
    return StepCosts(sizes, seconds, deep_s, shared_s)


def _pairs(num_rows: int, depth: int) -> float:
    """Pairs of a row and a token that it attends to."""
    return num_rows * (depth + num_rows / 2)


def _most_tokens(config: EngineConfig) -> int:
    """Most tokens of a sequence that fits the page table."""
    assert config.max_model_len is not None
    return config.max_model_len - 1


@torch.inference_mode()
def _load_kernels(runner: Runner, config: EngineConfig) -> None:
    """Run steps with few and with many answers beside a prompt, so that no request waits for what
    is made when first used.
    """
    room = min(config.max_batch_tokens - config.max_sequences, _most_tokens(config))
    num_tokens = min(room, _BESIDE)
    if num_tokens < 2:
        return
    for num_answers in {1, -(-config.max_sequences // 2), config.max_sequences}:
        answers = [Work(_sequence(runner, config, 2), 1, 1) for _ in range(num_answers)]
        prompt = Work(_sequence(runner, config, num_tokens), 0, num_tokens)
        runner.run([*answers, prompt]).logits_RV.sum().item()


def _sequence(runner: Runner, config: EngineConfig, num_tokens: int) -> Sequence:
    """A sequence of no request. Its tokens differ: equal ones cost less power than a text's do."""
    tokens = tuple(7919 * i % runner.device.config.vocab_size for i in range(1, num_tokens + 1))
    request = GenerationRequest("measured", tokens, SamplingParams(max_tokens=1))
    sequence = Sequence(request, arrival=-1, seed=0, max_tokens=1)
    sequence.blocks = [0] * -(-num_tokens // config.block_tokens)
    return sequence


@torch.inference_mode()
def _seconds(runner: Runner, config: EngineConfig, depth: int, num_rows: int) -> float:
    """Seconds of a step of so many rows of a sequence with `depth` tokens computed before."""
    work = Work(_sequence(runner, config, depth + num_rows), depth, num_rows)
    times = []
    for _ in range(2):  # what is made when first used is not the step's
        started = time.perf_counter()
        runner.run_alone(work).sum().item()  # reads a result, so that the step has ended
        times.append(time.perf_counter() - started)
    return min(times)
