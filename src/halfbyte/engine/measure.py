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
# Above the graphs, sizes between these cost as their neighbours foretell.
_LARGE = (256, 384, 512, 768, _MOST_ROWS)
# Rows and depth of the steps deep in a context: one that runs as a graph, where every row reads the
# context again, and one that does not.
_DEEP = ((128, 4096), (512, 16384))


def measure_costs(runner: Runner, config: EngineConfig) -> StepCosts:
    """Time a step of each size: about two seconds on 88 layers."""
    started = time.perf_counter()
    sizes = runner.step_sizes
    largest = min(config.max_batch_tokens, _most_tokens(config))
    wanted = [size for size in sizes if size <= largest and (size < _LARGE[0] or size in _LARGE)]
    seconds = {size: _seconds(runner, config, 0, size) for size in wanted}
    deep_s = {}
    for rows, most in _DEEP:
        depth = min(most, _most_tokens(config) - rows)
        if rows in seconds and depth > rows:
            more_s = _seconds(runner, config, depth, rows) - seconds[rows]
            deep_s[rows] = max(more_s, 0.0) / (rows * (depth + rows / 2))
    if runner.device.saturation is not None:
        runner.device.saturation.clear()
    logger.info(
        "steps of %s rows measured in %.1f s: %s ms, and %s ns for a row and a token of context",
        ", ".join(map(str, wanted)),
        time.perf_counter() - started,
        ", ".join(f"{s * 1e3:.1f}" for s in seconds.values()),
        ", ".join(f"{s * 1e9:.1f}" for s in deep_s.values()),
    )
    return StepCosts(sizes, seconds, deep_s)


def _most_tokens(config: EngineConfig) -> int:
    """Most tokens of a sequence that fits the page table."""
    assert config.max_model_len is not None
    return config.max_model_len - 1


@torch.inference_mode()
def _seconds(runner: Runner, config: EngineConfig, depth: int, num_rows: int) -> float:
    """Seconds of a step of so many rows of a sequence with `depth` tokens computed before."""
    tokens = (0,) * (depth + num_rows)
    request = GenerationRequest("measured", tokens, SamplingParams(max_tokens=1))
    sequence = Sequence(request, arrival=-1, seed=0, max_tokens=1)
    sequence.blocks = [0] * -(-len(tokens) // config.block_tokens)
    work = Work(sequence, depth, num_rows)
    times = []
    for _ in range(2):  # what is made when first used is not the step's
        started = time.perf_counter()
        runner.run_alone(work).sum().item()  # reads a result, so that the step has ended
        times.append(time.perf_counter() - started)
    return min(times)
