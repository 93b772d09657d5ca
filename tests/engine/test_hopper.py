"""The Hopper device and the engine that runs ahead, over a twin of the kernels in plain ops.

What rows, pages, places for tokens and choices mean is tested here; kernels and graphs are in
`test_cuda_engine`, on a GPU.
"""

import itertools
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cuda_twin import TwinExecutor, twin_engine
from engine_driver import GREEDY, Answer, drain, load, prompt_of, request, run, run_alone
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.graphs import (
    MAX_ROWS,
    graph_sizes,
    look_up,
    make_inputs,
    size_for,
    unpack,
)
from halfbyte.engine.hopper import HopperDevice, prefill_batch
from halfbyte.engine.load import check_limits
from halfbyte.engine.pinned import PinnedRing
from halfbyte.engine.plan.pacing import FreePacer
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.plan.step import PageTable, lay_out
from halfbyte.engine.request import (
    FinishEvent,
    GenerationRequest,
    ImageInput,
    SamplingParams,
)
from halfbyte.errors import UsageError
from halfbyte.model.tiny import write_tiny_checkpoint
from hopper import hopper_config, write_fp8
from tolerances import SAME_LOGPROB

PLAIN = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def device_of(engine: Engine) -> HopperDevice:
    assert isinstance(engine._runner.device, HopperDevice)
    return engine._runner.device


def launches_of_device(device: HopperDevice) -> list[int]:
    assert isinstance(device.executor, TwinExecutor)
    return device.executor.replayed


def launches_of(engine: Engine) -> list[int]:
    return launches_of_device(device_of(engine))


# Graph sizes and rows.


def test_every_number_of_rows_has_a_graph_of_less_than_twice_its_size() -> None:
    sizes = graph_sizes(64, deterministic=False)
    for num_rows in range(1, MAX_ROWS + 1):
        size = size_for(num_rows, sizes)
        assert size is not None and num_rows <= size < 2 * num_rows + 1
        assert not any(num_rows <= other < size for other in sizes)


def test_what_fits_no_graph_goes_elsewhere() -> None:
    assert size_for(MAX_ROWS + 1, graph_sizes(64, deterministic=False)) is None
    assert graph_sizes(3, deterministic=True) == (64,)
    assert graph_sizes(65, deterministic=True) == (128,)
    with pytest.raises(UsageError, match="deterministic"):
        check_limits(EngineConfig(deterministic=True, max_sequences=129, max_batch_tokens=2048))


def sequence_of(tokens: SequenceOf[int], blocks: list[int], slot: int | None) -> Sequence:
    sequence = Sequence(
        GenerationRequest(str(slot), tuple(tokens), PLAIN), arrival=0, seed=0, max_tokens=9
    )
    sequence.blocks, sequence.slot = blocks, slot
    return sequence


def test_rows_of_a_graph_are_padded_with_rows_that_do_no_harm(hopper: Path) -> None:
    device = device_of(twin_engine(hopper))
    inputs, table = device.executor.inputs, PageTable(64, 10, 16)
    first, second = sequence_of([5, 6], [7], 0), sequence_of([1] * 17, [2, 3], 1)
    second.reserve(2)
    inputs.last_tokens[2] = 11
    step = lay_out([Work(first, 0, 2), Work(second, 17, 1)], table)
    results = device.run(step, None)
    assert results.logits_RV.shape == (2, 515) and launches_of_device(device) == [4]
    assert inputs.packed_5T[:, :4].tolist() == [
        [5, 6, 0, 0],
        [-1, -1, 2, -1],
        [0, 1, 17, 0],
        [112, 113, 49, -1],
        [0, 0, 1, 0],
    ]
    assert inputs.table[:2, :2].tolist() == [[7, 0], [2, 3]]


def test_a_prefill_takes_leading_single_rows_apart() -> None:
    inputs = make_inputs(5, 4, 3, torch.device("cpu"))
    table, ring = PageTable(4, 4, 4), PinnedRing(torch.device("cpu"))
    works = [
        Work(sequence_of([1] * 6, [4, 9], 2), 5, 1),
        Work(sequence_of([1] * 2, [3], 0), 1, 1),
        Work(sequence_of([1] * 9, [5, 6, 1], 3), 2, 6),
        Work(sequence_of([1] * 3, [8], 1), 2, 1),
    ]
    batch = prefill_batch(inputs, lay_out(works, table), 4, ring, None)
    assert batch.singles is not None
    assert batch.singles.block_table_SP.tolist() == [[4, 9], [3, 0]]
    assert batch.singles.context_lengths_S.tolist() == [6, 2]
    chunks = [
        (one.first_row, one.num_rows, one.start, one.pages_P.tolist()) for one in batch.chunks
    ]
    assert chunks == [(2, 6, 2, [5, 6]), (8, 1, 2, [8])]
    alone = prefill_batch(inputs, lay_out(works[2:], table), 4, ring, None)
    assert alone.singles is None and len(alone.chunks) == 2
    singles = prefill_batch(inputs, lay_out(works[:2], table), 4, ring, None)
    assert singles.singles is not None and not singles.chunks


def test_tokens_of_the_last_step_are_looked_up() -> None:
    inputs = make_inputs(3, 4, 3, torch.device("cpu"))
    inputs.last_tokens.copy_(torch.tensor([11, 12, -1]))
    inputs.packed_5T[0, :4] = torch.tensor([5, 0, 0, 8])
    inputs.packed_5T[1, :4] = torch.tensor([-1, 1, 2, -1])
    inputs.packed_5T[4, :4] = torch.tensor([0, 2, 1, 0])
    inputs.table[2] = 6
    rows = unpack(inputs, 4)
    # Where the last step found no token, any valid one will do: the answer has ended.
    assert rows.token_ids_T.tolist() == [5, 12, 0, 8]
    assert rows.block_table_TP.dtype == torch.int32 and rows.block_table_TP[1].tolist() == [6] * 4
    assert rows.context_lengths_T.tolist() == [1] * 4
    assert look_up(torch.tensor([3]), torch.tensor([-1]), torch.tensor([9])).tolist() == [3]


def test_pinned_memory_is_not_reused_while_it_may_be_read() -> None:
    ring = PinnedRing(torch.device("cpu"))
    rng = np.random.default_rng(0)
    pending = ring.fetch(torch.arange(5))
    for size in rng.integers(0, 3000, 10):
        ints, floats = rng.integers(0, 99, size), rng.random((2, 3))
        sent_ints, sent_floats = ring.send(ints, floats)
        assert torch.equal(sent_ints, torch.from_numpy(ints))
        assert torch.equal(sent_floats, torch.from_numpy(floats))
    assert pending.wait() == [0, 1, 2, 3, 4]
    assert ring.fetch(torch.empty(0, dtype=torch.int64)).wait() == []


# Whole answers.


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hopper") / "fp8"
    return write_fp8(directory, hopper_config(2))


def assert_same_answer(found: Answer, wanted: Answer) -> None:
    """Same tokens and end; log-probs, where both have them, up to the order of sums."""
    assert found.token_ids == wanted.token_ids
    assert found.finish is not None and wanted.finish is not None
    assert found.finish.reason == wanted.finish.reason
    assert found.finish.completion_tokens == wanted.finish.completion_tokens
    assert found.finish.stop_token_id == wanted.finish.stop_token_id
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=SAME_LOGPROB)


MIXED_PARAMS = (
    PLAIN,
    SamplingParams(temperature=0.8, seed=1, max_tokens=20),
    SamplingParams(temperature=1.0, top_p=0.9, seed=2, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=0.6, top_k=20, min_p=0.02, seed=3, max_tokens=5),
    SamplingParams(temperature=0.0, banned_token_ids=tuple(range(200)), max_tokens=9),
    SamplingParams(temperature=0.7, seed=4, banned_token_ids=(7, 8), min_tokens=6, max_tokens=14),
    SamplingParams(temperature=0.0, stop_token_ids=tuple(range(0, 515, 9)), max_tokens=40),
    SamplingParams(temperature=0.0, max_tokens=1),
)
HOST_PARAMS = (
    SamplingParams(temperature=0.0, logprobs=2, max_tokens=8),
    SamplingParams(temperature=0.5, seed=6, repetition_penalty=1.3, max_tokens=10),
    SamplingParams(temperature=0.0, prompt_logprobs=1, max_tokens=6),
    SamplingParams(temperature=0.0, logit_bias={5: 4.0}, max_tokens=6),
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 9, "max_sequences": 5},
        {"max_sequences": 2, "block_tokens": 4},
        {"prefix_cache": False, "target_gap_ms": "none", "max_batch_tokens": 512},
        # Little room: answers are preempted and computed again, and nothing runs ahead then.
        {"kv_cache_tokens": 160, "max_sequences": 7, "block_tokens": 4, "prefix_cache": False},
        {"deterministic": True},
    ],
    ids=["batch", "chunks", "queue", "prefill", "preempted", "deterministic"],
)
@pytest.mark.parametrize("with_host", [False, True], ids=["device", "host"])
def test_answers_are_those_of_the_plain_device(
    hopper: Path, options: dict[str, Any], with_host: bool
) -> None:
    params = MIXED_PARAMS + (HOST_PARAMS if with_host else ())
    lengths = itertools.cycle((1, 15, 16, 17, 33, 64, 90, 130))
    requests = [
        request(str(i), prompt_of(length, i), p)
        for i, (p, length) in enumerate(zip(params, lengths, strict=False))
    ]
    plain_options = {k: v for k, v in options.items() if k != "deterministic"}
    wanted = run(load(hopper, mode="fp8_declared", **plain_options), requests)
    engine = twin_engine(hopper, **options)
    found = run(engine, requests)
    for key, answer in wanted.items():
        assert_same_answer(found[key], answer)
    if options.get("deterministic"):
        assert set(launches_of(engine)) == {64}
    if "target_gap_ms" in options:
        assert device_of(engine).num_prefills > 0
    assert device_of(engine).num_replays > 0
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_the_next_step_is_launched_before_the_last_is_read(hopper: Path) -> None:
    engine = twin_engine(hopper)
    engine.add(request("a", prompt_of(5), PLAIN))
    seen, events = [], 0
    while engine.has_work():
        events += len(engine.step())
        seen.append(len(launches_of(engine)))
    # After the first call two steps are launched; nothing is launched for what cannot be wanted.
    assert seen == [*range(2, 13), 12] and events == 13


def test_what_answers_read_of_their_contexts_is_not_put_down_to_prompts(hopper: Path) -> None:
    engine = twin_engine(hopper, target_gap_ms="none")
    seen: list[tuple[int, int, float]] = []

    class Noted(FreePacer):
        def observe(
            self, seconds: float, num_decodes: int, num_prompt_tokens: int, row_tokens: float = 0.0
        ) -> None:
            seen.append((num_decodes, num_prompt_tokens, row_tokens))

    engine._pacer = Noted()
    run(engine, [request(str(i), prompt_of(40, i), PLAIN) for i in range(2)])
    assert [row_tokens for _, prompt, row_tokens in seen if prompt] == [2 * 40 * 20.0]
    assert len(seen) > 2 and not any(row_tokens for _, prompt, row_tokens in seen if not prompt)


def test_a_stop_leaves_one_wasted_row_and_free_blocks(hopper: Path) -> None:
    alone = run_alone(load(hopper, mode="fp8_declared"), prompt_of(5), PLAIN)
    stop = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(alone.token_ids[4],))
    engine = twin_engine(hopper)
    answer = run_alone(engine, prompt_of(5), stop)
    end = alone.token_ids.index(alone.token_ids[4])
    assert answer.token_ids == alone.token_ids[:end]
    assert answer.finish is not None and answer.finish.reason == "stop"
    assert len(launches_of(engine)) == end + 2
    # What runs after it is not disturbed by the row that was launched in vain.
    again = run_alone(engine, prompt_of(5), PLAIN)
    assert again.token_ids == alone.token_ids


def test_prefixes_are_found_whose_tokens_were_once_unknown(hopper: Path) -> None:
    engine = twin_engine(hopper, block_tokens=4)
    first = run_alone(engine, prompt_of(7), PLAIN)
    longer = [*prompt_of(7), *first.token_ids]
    second = run_alone(engine, longer, PLAIN)
    assert second.finish is not None
    # All but the last token of the first answer are computed; whole blocks of them are found.
    assert second.finish.cached_tokens == (len(longer) - 1) // 4 * 4
    fresh = run_alone(load(hopper, mode="fp8_declared", block_tokens=4), longer, PLAIN)
    assert second.token_ids == fresh.token_ids


def test_aborts_at_any_moment_disturb_nobody(hopper: Path) -> None:
    prompts = [prompt_of(9 + i, i) for i in range(4)]
    plain = load(hopper, mode="fp8_declared")
    wanted = [run_alone(plain, prompt, PLAIN) for prompt in prompts]
    for moment in range(6):
        engine = twin_engine(hopper)
        answers = {str(i): Answer([], []) for i in range(4)}
        for i, prompt in enumerate(prompts):
            engine.add(request(str(i), prompt, PLAIN))
        for _ in range(moment):
            for event in engine.step():
                answers[event.request_id].take(event)
        finish = engine.abort("1")
        assert isinstance(finish, FinishEvent)
        assert finish.completion_tokens == len(answers["1"].token_ids)
        answers["1"].take(finish)
        drain(engine, answers)
        for i in (0, 2, 3):
            assert answers[str(i)].token_ids == wanted[i].token_ids
        assert engine.stats().free_blocks == engine.stats().total_blocks


class Alternating:
    """Allows only even tokens, then only odd ones: needs each token before the next."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allows(self, token_id: int) -> bool:
        return token_id % 2 == len(self.accepted) % 2

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        bitmask[:] = 0x55555555 << (len(self.accepted) % 2)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == len(self.accepted) % 2
        self.accepted.append(token_id)

    def is_finished(self) -> bool:
        return False


def test_masks_and_plain_requests_share_steps(hopper: Path) -> None:
    def requests() -> list[GenerationRequest]:
        return [
            request("plain", prompt_of(20), PLAIN),
            request("masked", prompt_of(8, 1), PLAIN, mask=Alternating()),
        ]

    wanted = run(load(hopper, mode="fp8_declared"), requests())
    engine = twin_engine(hopper)
    found = run(engine, requests())
    for key, answer in wanted.items():
        assert_same_answer(found[key], answer)
    assert [token % 2 for token in found["masked"].token_ids] == [0, 1] * 6


def test_late_arrivals_join_a_running_batch(hopper: Path) -> None:
    plain = load(hopper, mode="fp8_declared")
    wanted = [run_alone(plain, prompt_of(12, i), PLAIN).token_ids for i in range(6)]
    engine = twin_engine(hopper)
    answers = {}
    for i in range(6):
        engine.add(request(str(i), prompt_of(12, i), PLAIN))
        answers[str(i)] = Answer([], [])
        for event in engine.step():
            answers[event.request_id].take(event)
    drain(engine, answers)
    assert [answers[str(i)].token_ids for i in range(6)] == wanted


def test_a_hook_sees_every_row(hopper: Path) -> None:
    def always(_: GenerationRequest, __: SequenceOf[int], logits_V: torch.Tensor) -> None:
        logits_V[77] = 1e6

    answer = run_alone(twin_engine(hopper, hook=always), prompt_of(3), PLAIN)
    assert answer.token_ids == [77] * 12


def test_logits_that_are_no_numbers_end_one_answer_only(hopper: Path) -> None:
    engine = twin_engine(hopper)
    bad = SamplingParams(temperature=0.0, banned_token_ids=tuple(range(515)), max_tokens=4)
    answers = run(engine, [request("bad", prompt_of(4), bad), request("ok", prompt_of(4), PLAIN)])
    finish = answers["bad"].finish
    assert finish is not None and finish.reason == "error"
    assert "no token is possible" in (finish.message or "")
    assert len(answers["ok"].token_ids) == 12


def test_scoring_between_steps_changes_nothing(hopper: Path) -> None:
    text = prompt_of(150, 5)
    wanted = torch.cat(list(load(hopper, mode="fp8_declared").score(text, 60)))
    engine = twin_engine(hopper)
    engine.add(request("a", prompt_of(5), PLAIN))
    parts = []
    for part in engine.score(text, 60):
        engine.step()
        parts.append(part)
    whole = torch.cat(list(engine.score(text, 140)))
    for found in (torch.cat(parts), whole):
        assert torch.allclose(found.log_softmax(-1), wanted.log_softmax(-1), atol=SAME_LOGPROB)


def test_images_take_rows_behind_the_vocabulary(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "vision", layers=2, vision=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 84), dtype=np.uint8)
    prompt = [*range(20, 27), *([10, 10, 10, 12] * 2)[:-1], 13, *range(30, 40)]
    images = (ImageInput.of(pixels, 7, 8),)
    wanted = run_alone(load(tmp_path / "vision"), prompt, PLAIN, images=images)
    blind = run_alone(load(tmp_path / "vision"), prompt, PLAIN)
    assert blind.token_ids != wanted.token_ids
    cases: tuple[dict[str, Any], ...] = ({}, {"max_batch_tokens": 5, "max_sequences": 3})
    for options in cases:
        engine = twin_engine(tmp_path / "vision", **options)
        assert run_alone(engine, prompt, PLAIN, images=images).token_ids == wanted.token_ids
    # Among more rows than a graph has: the other way in.
    engine = twin_engine(tmp_path / "vision", target_gap_ms="none")
    long = request("long", prompt_of(140), PLAIN)
    answers = run(engine, [request("seen", prompt, PLAIN, images=images), long])
    assert device_of(engine).num_prefills > 0
    assert answers["seen"].token_ids == wanted.token_ids


def test_proposals_are_checked_as_on_the_plain_device(hopper: Path) -> None:
    few = tuple(token for token in range(515) if token not in (5, 6, 7))
    for params in (
        SamplingParams(temperature=0.0, max_tokens=30, banned_token_ids=few),
        SamplingParams(temperature=1.0, seed=3, max_tokens=30, banned_token_ids=few),
    ):
        prompt = [5, 6, 7, 5, 7, 6, 6, 5] * 5
        wanted = run_alone(load(hopper, mode="fp8_declared"), prompt, params)
        engine = twin_engine(
            hopper, speculative="ngram", num_speculative_tokens=4, adaptive_speculation=False
        )
        assert run_alone(engine, prompt, params).token_ids == wanted.token_ids
        assert 0 < engine.stats().accepted_tokens < engine.stats().proposed_tokens


def test_deterministic_rows_do_not_change_with_company(hopper: Path) -> None:
    """The rows of the one graph are computed alike; on a GPU `test_cuda_engine` shows it."""
    prompt = prompt_of(20)
    alone = run_alone(twin_engine(hopper, deterministic=True), prompt, GREEDY)
    engine = twin_engine(hopper, deterministic=True)
    company = [request(str(i), prompt_of(30 + i, i), GREEDY) for i in range(9)]
    answers = run(engine, [*company, request("me", prompt, GREEDY)])
    assert answers["me"].logprobs == alone.logprobs
