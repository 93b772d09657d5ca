from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
    speculating,
)
from halfbyte.engine.core import Engine
from halfbyte.engine.request import FinishEvent, GenerationRequest, SamplingParams, TokensEvent
from halfbyte.errors import RequestError
from tolerances import SAME_LOGPROB

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 33, 64, 90))]
SHARED = prompt_of(48, 99)


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def solo(request: pytest.FixtureRequest, tiny: Path) -> tuple[str, list[Answer]]:
    """Each prompt's answer when it is alone and computed in one piece."""
    engine = load(tiny, kv_cache=request.param, prefix_cache=False)
    return request.param, [run_alone(engine, prompt) for prompt in PROMPTS]


def together(engine: Engine, order: Sequence[int]) -> list[Answer]:
    answers = run(engine, [request(str(index), PROMPTS[index]) for index in order])
    return [answers[str(index)] for index in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"max_batch_tokens": 7, "max_sequences": 7},
        {"max_batch_tokens": 64, "max_sequences": 3},
        {"block_tokens": 4, "target_gap_ms": "none"},
        # Room for little more than one sequence: answers are preempted and computed again.
        # Prompts go in as fast as they can, so that the clock does not decide how many.
        {
            "kv_cache_tokens": 160,
            "max_sequences": 7,
            "block_tokens": 4,
            "prefix_cache": False,
            "target_gap_ms": "none",
        },
    ],
    ids=["batch", "uncached", "chunks", "queue", "blocks", "preempted"],
)
def test_answer_does_not_depend_on_company(
    tiny: Path, solo: tuple[str, list[Answer]], options: dict[str, Any]
) -> None:
    kv_cache, wanted = solo
    engine = load(tiny, kv_cache=kv_cache, **options)
    for found, alone in zip(together(engine, [3, 0, 6, 1, 5, 2, 4]), wanted, strict=True):
        assert_same(found, alone)
    if options.get("kv_cache_tokens") == 160:
        assert engine.stats().preemptions > 0


def test_guesses_change_no_greedy_answer_on_any_kernels(
    tiny: Path, solo: tuple[str, list[Answer]]
) -> None:
    """As company: equal up to a tie. Equality to the bit is in test_speculate."""
    kv_cache, wanted = solo
    guesses = {str(i): answer.token_ids for i, answer in enumerate(wanted)}
    engine = speculating(tiny, Mixed(guesses), kv_cache=kv_cache)
    for found, alone in zip(together(engine, range(7)), wanted, strict=True):
        assert_same(found, alone)
    assert engine.stats().accepted_tokens > 0


def test_cached_prefix_gives_the_same_answer(tiny: Path) -> None:
    engine = load(tiny)
    prompts = [[*SHARED, *prompt_of(5, seed)] for seed in range(4)]
    first = [run_alone(engine, prompt) for prompt in prompts]
    again = [run_alone(engine, prompt) for prompt in prompts]
    plain = load(tiny, prefix_cache=False)
    for prompt, one, two in zip(prompts, first, again, strict=True):
        wanted = run_alone(plain, prompt)
        assert_same(one, wanted)
        assert_same(two, wanted)
    assert [a.finish.cached_tokens for a in first if a.finish] == [0, 48, 48, 48]
    assert [a.finish.cached_tokens for a in again if a.finish] == [48, 48, 48, 48]


def test_whole_prompt_in_the_cache_still_gives_logits(tiny: Path) -> None:
    engine = load(tiny)
    first, again = run_alone(engine, SHARED), run_alone(engine, SHARED)
    assert_same(again, first)
    assert again.finish is not None and again.finish.cached_tokens == 32


def test_answers_of_one_prompt_share_its_blocks(tiny: Path) -> None:
    engine = load(tiny)
    params = replace(GREEDY, temperature=1.0, seed=1)
    requests = [request(str(i), SHARED, replace(params, seed=i)) for i in range(8)]
    answers = run(engine, requests)
    assert [a.finish.cached_tokens for a in answers.values() if a.finish] == [0, *[32] * 7]
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 8


def test_answer_is_cached_for_the_next_turn(tiny: Path) -> None:
    engine = load(tiny)
    answer = run_alone(engine, SHARED, replace(GREEDY, max_tokens=40))
    turn = run_alone(engine, [*SHARED, *answer.token_ids, 7, 8, 9])
    # The last generated token is never computed: 87 of 88 known positions, five full blocks.
    assert turn.finish is not None and turn.finish.cached_tokens == 80
    assert_same(turn, run_alone(load(tiny), [*SHARED, *answer.token_ids, 7, 8, 9]))


@pytest.mark.parametrize("chunk_tokens", [1, 16, 512])
def test_generate_then_score_agrees(tiny: Path, chunk_tokens: int) -> None:
    engine = load(tiny)
    answer = run_alone(engine, PROMPTS[3], replace(GREEDY, max_tokens=30))
    text = [*PROMPTS[3], *answer.token_ids]
    logprobs = torch.cat(list(engine.score(text, chunk_tokens))).log_softmax(-1)
    assert logprobs.shape == (len(text), 512)
    for index, ours in enumerate(answer.logprobs):
        scored = logprobs[len(PROMPTS[3]) + index - 1, ours.token_id].item()
        assert ours.logprob == pytest.approx(scored, abs=SAME_LOGPROB)
    engine.check()
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_abandoned_scoring_frees_its_blocks(tiny: Path) -> None:
    engine = load(tiny)
    chunks = engine.score(SHARED, chunk_tokens=4)
    next(chunks)
    assert engine.stats().free_blocks < engine.stats().total_blocks
    engine.check()
    chunks.close()
    engine.check()
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_prompt_logprobs_equal_scoring_and_ignore_the_cache(tiny: Path) -> None:
    engine = load(tiny, max_batch_tokens=64)
    run_alone(engine, PROMPTS[6])
    params = replace(GREEDY, prompt_logprobs=3, max_tokens=2)
    answer = run_alone(engine, PROMPTS[6], params)
    assert answer.prompt_logprobs is not None
    scored = torch.cat(list(engine.score(PROMPTS[6]))).log_softmax(-1)
    assert [item.token_id for item in answer.prompt_logprobs] == PROMPTS[6][1:]
    for row, item in enumerate(answer.prompt_logprobs):
        assert item.logprob == pytest.approx(scored[row, item.token_id].item(), abs=SAME_LOGPROB)
        assert len(item.top) == 3 and item.top[0][1] >= item.top[1][1] >= item.top[2][1]


def test_stop_token_ends_an_answer_and_is_not_in_it(tiny: Path) -> None:
    engine = load(tiny)
    plain = run_alone(engine, PROMPTS[4])
    stop = plain.token_ids[4]
    index = plain.token_ids.index(stop)
    params = replace(GREEDY, stop_token_ids=(stop,))
    answer = run_alone(engine, PROMPTS[4], params)
    assert answer.token_ids == plain.token_ids[:index]
    assert answer.finish is not None
    assert (answer.finish.reason, answer.finish.stop_token_id) == ("stop", stop)
    assert answer.finish.completion_tokens == index + 1
    longer = run_alone(engine, PROMPTS[4], replace(params, min_tokens=index + 3))
    assert longer.finish is not None and longer.finish.completion_tokens >= index + 3


def test_end_of_the_model_ends_an_answer_unless_ignored(tiny: Path) -> None:
    def say_end(item: GenerationRequest, generated: Sequence[int], logits_V: torch.Tensor) -> None:
        logits_V[2 if len(generated) == 3 else 9] = 100.0

    engine = load(tiny, say_end)
    answer = run_alone(engine, SHARED, replace(GREEDY, ignore_eos=False))
    assert answer.token_ids == [9, 9, 9]
    assert answer.finish is not None and answer.finish.stop_token_id == 2
    assert run_alone(engine, SHARED).token_ids == [9, 9, 9, 2, *[9] * 8]


def test_answer_is_cut_where_the_context_ends(tiny: Path) -> None:
    engine = load(tiny, max_model_len=20)
    answer = run_alone(engine, PROMPTS[1], replace(GREEDY, max_tokens=None))
    assert answer.finish is not None and answer.finish.reason == "length"
    assert len(answer.token_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "params", "code", "message"),
    [
        ([5] * 160, GREEDY, "context_length_exceeded", "160 tokens; at most 159"),
        ([], GREEDY, "empty_prompt", "no tokens"),
        ([512], GREEDY, "invalid_token_id", "token id 512"),
        ([-1], GREEDY, "invalid_token_id", "token id -1"),
        ([5], replace(GREEDY, temperature=float("nan")), "invalid_value", "temperature is nan"),
        ([5], replace(GREEDY, top_p=0.0), "invalid_value", "top_p is 0"),
        ([5], replace(GREEDY, logprobs=21), "invalid_value", "logprobs is 21"),
        ([5], replace(GREEDY, logit_bias={512: 1.0}), "invalid_value", "token id 512"),
        ([5], replace(GREEDY, logit_bias={5: 101.0}), "invalid_value", "is 101.0"),
        ([5], replace(GREEDY, min_tokens=13), "invalid_value", "min_tokens is 13"),
    ],
)
def test_impossible_request_is_refused(
    tiny: Path, prompt: list[int], params: SamplingParams, code: str, message: str
) -> None:
    engine = load(tiny)
    with pytest.raises(RequestError, match=message) as caught:
        engine.add(request("a", prompt, params))
    assert caught.value.code == code
    assert not engine.has_work()


def test_request_id_in_use_is_refused(tiny: Path) -> None:
    engine = load(tiny)
    engine.add(request("a", SHARED))
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("a", SHARED))
    drain(engine, {"a": Answer([], [])})
    engine.add(request("a", SHARED))


@pytest.mark.parametrize("steps", range(8))
def test_abort_in_any_state_leaks_no_block(tiny: Path, steps: int) -> None:
    """Two sequences run at a time, so there are waiting, prefilling and generating ones."""
    engine = load(tiny, max_sequences=2, max_batch_tokens=20, prefix_cache=False)
    answers = {str(i): Answer([], []) for i in range(4)}
    for item in answers:
        engine.add(request(item, SHARED))
    for _ in range(steps):
        for event in engine.step():
            answers[event.request_id].take(event)
    for item, answer in answers.items():
        ended = engine.abort(item)
        if ended is None:
            assert answer.finish is not None
            continue
        assert ended.reason == "abort"
        assert ended.completion_tokens == len(answer.token_ids)
        engine.check()
    assert not engine.has_work()
    assert engine.stats().free_blocks == engine.stats().total_blocks
    assert engine.abort("0") is None


def test_two_engines_in_one_process_do_not_meet(tiny: Path) -> None:
    first, second = load(tiny), load(tiny, kv_cache="bf16", block_tokens=4)
    wanted = [run_alone(engine, SHARED) for engine in (load(tiny), load(tiny, kv_cache="bf16"))]
    answers = [{"a": Answer([], [])}, {"a": Answer([], [])}]
    for engine in (first, second):
        engine.add(request("a", SHARED))
    while first.has_work() or second.has_work():
        for engine, found in zip((first, second), answers, strict=True):
            for event in engine.step():
                found["a"].take(event)
    for found, alone in zip(answers, wanted, strict=True):
        assert_same(found["a"], alone)


def test_seed_gives_the_same_tokens_in_any_company(tiny: Path) -> None:
    engine = load(tiny)
    params = replace(GREEDY, temperature=1.0, seed=7, top_p=0.9, logprobs=None)
    alone = run_alone(engine, PROMPTS[2], params)
    others = [
        request(str(i), PROMPTS[i], replace(params, seed=i, top_p=1.0 - i / 20)) for i in range(6)
    ]
    company = run(engine, [*others[:3], request("it", PROMPTS[2], params), *others[3:]])
    assert company["it"].token_ids == alone.token_ids
    assert run_alone(engine, PROMPTS[2], replace(params, seed=8)).token_ids != alone.token_ids


def test_without_a_seed_answers_differ(tiny: Path) -> None:
    engine = load(tiny)
    params = replace(GREEDY, temperature=1.5)
    answers = run(engine, [request(str(i), SHARED, params) for i in range(4)])
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 4


class Forced:
    """A mask that allows one sequence of tokens and then ends."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.left = list(token_ids)
        self.accepted: list[int] = []

    def allows(self, token_id: int) -> bool:
        return token_id == self.left[0]

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        bitmask[:] = 0
        token_id = self.left[0]
        bitmask[token_id // 32] = np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        assert token_id == self.left.pop(0)
        self.accepted.append(token_id)

    def is_finished(self) -> bool:
        return not self.left


def test_masks_hold_their_own_request_only(tiny: Path) -> None:
    engine = load(tiny, max_batch_tokens=64)
    free = run_alone(engine, SHARED)
    forced = [[31, 32, 63], [511, 0, 255, 64]]
    masks = [Forced(token_ids) for token_ids in forced]
    answers = run(
        engine,
        [
            request("free", SHARED),
            request("first", SHARED, mask=masks[0]),
            request("second", PROMPTS[2], replace(GREEDY, temperature=1.0), mask=masks[1]),
        ],
    )
    assert_same(answers["free"], free)
    for name, mask, wanted in zip(("first", "second"), masks, forced, strict=True):
        assert answers[name].token_ids == wanted == mask.accepted
        finish = answers[name].finish
        assert finish is not None and (finish.reason, finish.stop_token_id) == ("stop", None)


class Broken(Forced):
    def allows(self, token_id: int) -> bool:
        raise ValueError("no grammar")

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        raise ValueError("no grammar")


class Stubborn(Forced):
    def accept(self, token_id: int) -> None:
        raise ValueError("not this one")


@pytest.mark.parametrize("mask", [Broken([1, 2]), Stubborn([1, 2])])
def test_failing_mask_ends_its_own_request_only(tiny: Path, mask: Forced) -> None:
    engine = load(tiny)
    answers = run(engine, [request("bad", SHARED, mask=mask), request("good", SHARED)])
    bad, good = answers["bad"].finish, answers["good"].finish
    assert bad is not None and bad.reason == "error" and bad.message
    assert good is not None and good.reason == "length"
    assert engine.stats().free_blocks == engine.stats().total_blocks


class Failing(Forced):
    """A mask that fails after some tokens: where it is asked for one, for all, or told of one."""

    def __init__(self, token_ids: Sequence[int], after: int, asked: str) -> None:
        super().__init__(token_ids)
        self.after = after
        self.asked = asked

    def _check(self, asked: str) -> None:
        if len(self.accepted) >= self.after and asked in self.asked:
            raise ValueError(f"no grammar after {self.after}")

    def allows(self, token_id: int) -> bool:
        self._check("allows")
        return super().allows(token_id)

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        self._check("fill")
        super().fill(bitmask)

    def accept(self, token_id: int) -> None:
        self._check("accept")
        super().accept(token_id)


@pytest.mark.parametrize("speculative", [None, "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("asked", ["fill", "allows fill", "accept"])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_no_answer_goes_on_unmasked_after_its_mask_has_failed(
    tiny: Path, after: int, asked: str, temperature: float, speculative: str | None
) -> None:
    engine = load(tiny, speculative=speculative)
    forced = [31, 32, 63, 31, 32, 63, 31, 32]
    params = replace(GREEDY, temperature=temperature)
    free = run_alone(engine, SHARED)
    mask = Failing(forced, after, asked)
    answers = run(engine, [request("bad", SHARED, params, mask=mask), request("free", SHARED)])
    bad = answers["bad"]
    # A token that `accept` failed at was allowed; nothing that was not ever comes out.
    assert bad.token_ids == forced[: len(bad.token_ids)] and len(bad.token_ids) <= after + 1
    assert bad.finish is not None and bad.finish.reason == "error" and bad.finish.message
    assert_same(answers["free"], free)
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_nan_logits_are_an_error_not_a_token(tiny: Path) -> None:
    def spoil(item: GenerationRequest, generated: Sequence[int], logits_V: torch.Tensor) -> None:
        if item.request_id == "bad" and len(generated) == 2:
            logits_V[7] = float("nan")

    engine = load(tiny, spoil)
    for temperature in (0.0, 1.0):
        params = replace(GREEDY, temperature=temperature)
        answers = run(engine, [request("bad", SHARED, params), request("good", SHARED, params)])
        bad = answers["bad"].finish
        assert bad is not None and bad.reason == "error" and "NaN" in (bad.message or "")
        assert len(answers["good"].token_ids) == 12


def test_long_prompt_does_not_stop_running_answers(tiny: Path) -> None:
    engine = load(tiny, max_batch_tokens=64)
    engine.add(request("runs", SHARED, replace(GREEDY, max_tokens=60)))
    engine.step()
    engine.add(request("long", prompt_of(150)))
    answers = {"runs": Answer([], []), "long": Answer([], [])}
    while not answers["long"].token_ids:
        events = engine.step()
        assert any(isinstance(e, TokensEvent) and e.request_id == "runs" for e in events)
        for event in events:
            answers[event.request_id].take(event)
    drain(engine, answers)


def test_stats_count_what_was_done(tiny: Path) -> None:
    engine = load(tiny)
    for _ in range(2):
        run_alone(engine, SHARED)
    stats = engine.stats()
    assert (stats.requests, stats.prompt_tokens, stats.cached_tokens) == (2, 96, 32)
    assert stats.generated_tokens == 24
    assert stats.steps >= 24 and stats.step_s > 0
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.cached_blocks > 0
    engine.clear_prefix_cache()
    assert engine.stats().cached_blocks == 0
    engine.check()


def test_finish_event_is_the_last_one(tiny: Path) -> None:
    engine = load(tiny)
    engine.add(request("a", SHARED, replace(GREEDY, max_tokens=1)))
    events = engine.step()
    assert [type(event) for event in events] == [TokensEvent, FinishEvent]
    assert engine.step() == []
