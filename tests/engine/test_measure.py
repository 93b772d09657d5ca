"""What steps cost is measured before the first request, and leaves no trace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cuda_twin import twin_engine
from engine_driver import GREEDY, prompt_of, request, run
from halfbyte.engine.core import Engine
from halfbyte.engine.hopper import HopperDevice
from halfbyte.engine.plan.pacing import FreePacer, GapPacer
from halfbyte.engine.request import SamplingParams
from hopper import hopper_config, write_fp8


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tmp_path_factory.mktemp("measured") / "fp8", hopper_config(layers=1))


def cache_of(engine: Engine) -> list[torch.Tensor]:
    return [part.float() for layer in engine._runner.device.cache.layers for part in layer]


def test_every_size_is_measured_and_nothing_else_changes(hopper: Path) -> None:
    prompts = [prompt_of(40, seed) for seed in range(3)]
    asked = [request(str(at), prompt, GREEDY) for at, prompt in enumerate(prompts)]
    untouched = twin_engine(hopper, max_batch_tokens=256, max_sequences=8, max_model_len=400)
    wanted = run(untouched, asked)
    engine = twin_engine(hopper, max_batch_tokens=256, max_sequences=8, max_model_len=400)
    before = cache_of(engine)
    engine.measure_steps()
    device = engine._runner.device
    assert isinstance(device, HopperDevice) and device.num_prefills > 0
    assert isinstance(engine._pacer, GapPacer)
    sizes = [size for size in engine._runner.step_sizes if size <= 256]
    assert list(engine._pacer.table()) == sizes
    told = engine.facts()["step_ms"]
    assert isinstance(told, dict) and list(told) == [str(size) for size in sizes]
    # All that the measured steps have stored is in block 0.
    for found, was in zip(cache_of(engine), before, strict=True):
        assert torch.equal(found[1:], was[1:])
    engine.check()
    assert {name: answer.token_ids for name, answer in run(engine, asked).items()} == {
        name: answer.token_ids for name, answer in wanted.items()
    }


class _Noted(FreePacer):
    """Notes the prompt tokens of the steps that a pacer is told about."""

    def __init__(self) -> None:
        self.prompt_tokens_of: list[int] = []

    def observe(
        self, seconds: float, num_decodes: int, num_prompt_tokens: int, row_tokens: float = 0.0
    ) -> None:
        self.prompt_tokens_of.append(num_prompt_tokens)


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, logprobs=None)])
def test_steps_that_nobody_waited_for_teach_no_times(hopper: Path, params: SamplingParams) -> None:
    """A prompt in four steps: three choose no token, and the fourth's time is that of all; tokens
    are chosen on the host, and on the device a step ahead.
    """
    engine = twin_engine(hopper, max_batch_tokens=64, max_sequences=8, max_model_len=400)
    noted = engine._pacer = _Noted()
    run(engine, [request("long", prompt_of(240), params)])
    assert noted.prompt_tokens_of and not any(noted.prompt_tokens_of)
    assert engine.stats().steps == 4 + len(noted.prompt_tokens_of)
    # One that chooses at once is timed, and those that only generate.
    noted.prompt_tokens_of.clear()
    run(engine, [request("short", prompt_of(30, seed=1), params)])
    assert noted.prompt_tokens_of[0] == 30 and not any(noted.prompt_tokens_of[1:])
