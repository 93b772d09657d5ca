"""What `bench engine` measures is what the engine runs, shown over a twin of the kernels."""

from pathlib import Path

import torch

from cuda_twin import twin_engine, twin_runner
from engine_driver import request, run
from halfbyte.bench.engine_bench import Point, sequences_of, step_ms
from halfbyte.engine.plan.sequence import Work
from halfbyte.engine.request import SamplingParams
from hopper import hopper_config, write_fp8


def test_measured_steps_give_the_tokens_of_the_engine(tmp_path: Path) -> None:
    directory = write_fp8(tmp_path / "fp8", hopper_config(2))
    runner, config = twin_runner(directory)
    torch.manual_seed(0)
    sequences = sequences_of(Point(3, 20), 515, config.num_pages)
    assert len({page for one in sequences for page in one.blocks}) == 30
    prompts = [list(one.token_ids) for one in sequences]
    # What the benchmark leaves to chance, so that the tokens mean something.
    runner.run([Work(one, 0, 20) for one in sequences])
    samples, seen = step_ms(runner, sequences, 7)
    assert len(samples) == 7 and all(sample > 0 for sample in samples)
    found = [one.token_ids[21:] for one in sequences]
    assert seen == {token_id for answer in found for token_id in answer[:7]}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = run(
        twin_engine(directory),
        [request(str(i), prompt, params) for i, prompt in enumerate(prompts)],
    )
    assert found == [answers[str(i)].token_ids for i in range(3)]


def test_a_second_measurement_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    runner, config = twin_runner(write_fp8(tmp_path / "fp8", hopper_config(2)))
    sequences = sequences_of(Point(2, 20), 515, config.num_pages)
    for num_known in (21 + 4, 21 + 8):
        step_ms(runner, sequences, 3)
        assert [len(one.token_ids) for one in sequences] == [num_known] * 2
        assert not any(one.num_pending for one in sequences)
