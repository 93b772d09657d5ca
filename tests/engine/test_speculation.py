"""Speculation changes when tokens are computed, never which.

`Mixed` guesses from the plain answer and spoils some guesses, so every pattern of accepted and
fallen proposals occurs, whatever the model would have been guessed to say.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_driver import (
    GREEDY,
    Answer,
    Mixed,
    assert_equal,
    drain,
    load,
    needs_exact_kernels,
    prompt_of,
    request,
    run,
    run_alone,
    speculating,
)
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.engine.core import Engine
from halfbyte.engine.plan.sequence import Sequence as EngineSequence
from halfbyte.engine.plan.speculation import Lookup, Pace
from halfbyte.engine.request import FinishEvent, GenerationRequest, SamplingParams
from halfbyte.errors import UnsupportedError
from halfbyte.model.tiny import write_tiny_checkpoint
from tolerances import CHI_SQUARE_P

pytestmark = needs_exact_kernels

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 33, 64, 90))]
SHARED = prompt_of(48, 99)
FREE = replace(GREEDY, temperature=1.0, seed=3)


def known_answers(wanted: dict[str, Answer]) -> dict[str, Sequence[int]]:
    return {name: answer.token_ids for name, answer in wanted.items()}


PARAMETERS = {
    "greedy": replace(GREEDY, max_tokens=24),
    "sampled": replace(FREE, max_tokens=24),
    "filtered": replace(FREE, max_tokens=24, top_p=0.9, top_k=40, min_p=0.01, temperature=0.8),
    "penalized": replace(
        FREE, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2, max_tokens=24
    ),
    "biased": replace(FREE, logit_bias={7: 5.0, 9: -100.0}, banned_token_ids=(8, 11)),
    "least": replace(FREE, min_tokens=8, stop_token_ids=tuple(range(3, 120)), max_tokens=24),
    "scored": replace(GREEDY, prompt_logprobs=2, max_tokens=20),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False, "kv_cache": "bf16"},
        {"max_batch_tokens": 24, "max_sequences": 7},
        {"block_tokens": 4, "max_sequences": 3},
        {"block_tokens": 1},
        # Room for little more than one sequence: answers are preempted, blocks are short. Prompts
        # go in as fast as they can, so that the clock does not decide how many.
        {
            "kv_cache_tokens": 160,
            "max_sequences": 7,
            "block_tokens": 4,
            "target_gap_ms": "none",
        },
    ],
    ids=["batch", "bf16", "chunks", "queue", "blocks", "preempted"],
)
def test_every_answer_equals_the_plain_one(tiny: Path, options: dict[str, Any]) -> None:
    """All kinds of requests at once, some of them not speculating, over prompts of all lengths."""
    requests = {
        f"{kind}-{index}": (PROMPTS[index], params)
        for index, (kind, params) in enumerate(PARAMETERS.items())
    }
    requests |= {f"shared-{i}": (SHARED, replace(FREE, seed=i)) for i in range(4)}
    items = [request(name, *rest) for name, rest in requests.items()]
    wanted = run(load(tiny, **options), items)
    guesses = known_answers(wanted)
    del guesses["greedy-0"], guesses["shared-1"]
    guesser = Mixed(guesses)
    engine = speculating(tiny, guesser, **options)
    found = run(engine, items)
    for name, answer in found.items():
        assert_equal(answer, wanted[name])
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.proposed_tokens
    assert stats.free_blocks == stats.total_blocks
    assert sorted(guesser.forgotten) == list(range(len(items)))
    if options.get("kv_cache_tokens") == 160:
        assert stats.preemptions > 0


@settings(max_examples=25, deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 5]),
        frequency_penalty=st.sampled_from([0.0, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.sampled_from([None, 0, 3]),
        stop_token_ids=st.sampled_from([(), tuple(range(3, 60))]),
        ignore_eos=st.booleans(),
    ),
    length=st.integers(1, 40),
    most=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_request_equals_the_plain_one(
    tiny_engines: tuple[Engine, Callable[[Any, int], Engine]],
    params: SamplingParams,
    length: int,
    most: int,
    seed: int,
) -> None:
    plain, speculating_by = tiny_engines
    prompt = prompt_of(length, seed)
    wanted = run_alone(plain, prompt, params)
    engine = speculating_by(Mixed({"alone": wanted.token_ids}, seed), most)
    assert_equal(run_alone(engine, prompt, params), wanted)
    assert engine.stats().free_blocks == engine.stats().total_blocks


@pytest.fixture(scope="module")
def tiny_engines(tiny: Path) -> tuple[Engine, Callable[[Any, int], Engine]]:
    return load(tiny), lambda guesser, most: speculating(tiny, guesser, most=most, block_tokens=4)


def test_steps_are_saved_where_guesses_are_right(tiny: Path) -> None:
    wanted = run_alone(load(tiny), SHARED, replace(GREEDY, max_tokens=41))
    guesser = Mixed({"alone": wanted.token_ids})
    guesser.random.random = lambda: 1.0  # type: ignore[method-assign]
    engine = speculating(tiny, guesser)
    assert_equal(run_alone(engine, SHARED, replace(GREEDY, max_tokens=41)), wanted)
    # The prompt gives the first token; each further step five.
    assert engine.stats().steps == 1 + 8
    assert engine.stats().accepted_tokens == engine.stats().proposed_tokens == 32


def test_answers_without_a_seed_are_drawn_afresh(tiny: Path) -> None:
    params = replace(GREEDY, temperature=1.5, logprobs=None)
    engine = speculating(tiny, Mixed({str(i): [9] * 12 for i in range(4)}))
    answers = run(engine, [request(str(i), SHARED, params) for i in range(4)])
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 4


SMALL = 4  # tokens of the small vocabulary, ids from 20


def small_probabilities(last: int) -> NDArray[np.float64]:
    logits = np.array([0.0, 1.0, -0.5, 0.7]) * (1.0 + (last % SMALL) / 3)
    weights: NDArray[np.float64] = np.exp(np.roll(logits, last % SMALL))
    weights /= weights.sum()
    return weights


def say_small(item: GenerationRequest, generated: Sequence[int], logits_V: torch.Tensor) -> None:
    last = generated[-1] if generated else 20
    logits_V.fill_(-torch.inf)
    logits_V[20 : 20 + SMALL] = torch.from_numpy(np.log(small_probabilities(last))).float()


class Fixed:
    """Guesses always the same tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def confidence(self, sequence: EngineSequence) -> int | None:
        return 0

    def guess(self, wanted: Sequence[tuple[EngineSequence, int]]) -> list[list[int]]:
        return [list(self.token_ids[:count]) for _, count in wanted]

    def forget(self, sequence: EngineSequence) -> None:
        pass


@pytest.mark.parametrize("guess", [(21, 23), (20, 22)], ids=["likely", "unlikely"])
def test_sampled_answers_have_the_distribution_of_the_model(
    tmp_path: Path, guess: tuple[int, int]
) -> None:
    """Three tokens, the last two guessed: their joint distribution, and that of what replaces a
    fallen guess, are the model's own.
    """
    stats = pytest.importorskip("scipy.stats")
    write_tiny_checkpoint(tmp_path / "one", layers=1)
    engine = speculating(
        tmp_path / "one", Fixed(*guess), most=2, max_sequences=64, max_model_len=16
    )
    engine._sampler._hook = say_small
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    observed: Counter[tuple[int, ...]] = Counter()
    for batch in range(24):
        items = [
            request(f"{batch}-{i}", [5], replace(params, seed=64 * batch + i)) for i in range(64)
        ]
        observed.update(tuple(a.token_ids) for a in run(engine, items).values())
    ids = range(20, 20 + SMALL)
    counts, probabilities = [], []
    for three in product(ids, repeat=3):
        before = (20, *three[:2])
        probabilities.append(
            np.prod([small_probabilities(b)[t - 20] for b, t in zip(before, three, strict=True)])
        )
        counts.append(observed[three])
    total = sum(counts)
    assert total == 24 * 64
    assert stats.chisquare(counts, np.array(probabilities) * total).pvalue > CHI_SQUARE_P
    # The residual: second tokens that are not the guess, behind the likeliest first one.
    rest = [t for t in ids if t != guess[0]]
    fallen = [sum(n for three, n in observed.items() if three[:2] == (21, t)) for t in rest]
    residual = np.array([small_probabilities(21)[t - 20] for t in rest])
    expected = residual / residual.sum() * sum(fallen)
    assert stats.chisquare(fallen, expected).pvalue > CHI_SQUARE_P
    assert 0 < engine.stats().accepted_tokens < engine.stats().proposed_tokens


class Recorder:
    """A mask that allows three tokens by what came before, and remembers every call."""

    def __init__(self, length: int) -> None:
        self.calls: list[tuple[str, int]] = []
        self.length = length
        self.state = 0

    def allows(self, token_id: int) -> bool:
        self.calls.append(("allows", self.state))
        return token_id in self.allowed()

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        bitmask[:] = 0
        for token_id in self.allowed():
            bitmask[token_id // 32] |= np.uint32(1 << token_id % 32)
        self.calls.append(("fill", self.state))

    def allowed(self) -> list[int]:
        return [40 + (self.state * k) % 61 for k in (1, 2, 3)]

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed()
        self.calls.append(("accept", token_id))
        self.state = self.state * 31 + token_id

    def is_finished(self) -> bool:
        return sum(kind == "accept" for kind, _ in self.calls) >= self.length


@pytest.mark.parametrize("params", [GREEDY, FREE], ids=["greedy", "sampled"])
def test_masks_see_the_calls_they_would_see_without(tiny: Path, params: SamplingParams) -> None:
    """Guesses that the mask forbids fall; it is filled and advanced once a token, in order."""
    names = [str(i) for i in range(4)]

    def requests(masks: dict[str, Recorder]) -> list[GenerationRequest]:
        return [request(name, PROMPTS[int(name)], params, mask=masks[name]) for name in names]

    plain_masks = {name: Recorder(7 + int(name)) for name in names}
    wanted = run(load(tiny), requests(plain_masks))
    masks = {name: Recorder(7 + int(name)) for name in names}
    engine = speculating(tiny, Mixed(known_answers(wanted)), most=5)
    found = run(engine, requests(masks))
    for name in names:
        assert_equal(found[name], wanted[name])
        assert masks[name].calls == plain_masks[name].calls
    assert 0 < engine.stats().accepted_tokens < engine.stats().proposed_tokens


@pytest.mark.parametrize("steps", range(9))
def test_abort_in_any_state_leaks_no_block(tiny: Path, steps: int) -> None:
    wanted = run(load(tiny), [request(str(i), SHARED, replace(FREE, seed=i)) for i in range(4)])
    engine = speculating(
        tiny, Mixed(known_answers(wanted)), max_sequences=2, max_batch_tokens=20, block_tokens=4
    )
    answers = {str(i): Answer([], []) for i in range(4)}
    for name in answers:
        engine.add(request(name, SHARED, replace(FREE, seed=int(name))))
    for _ in range(steps):
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    for name, answer in answers.items():
        ended = engine.abort(name)
        assert answer.token_ids == wanted[name].token_ids[: len(answer.token_ids)]
        if ended is not None:
            assert ended.completion_tokens == len(answer.token_ids)
        engine.check()
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_fallen_guesses_are_in_no_cached_prefix(tiny: Path) -> None:
    """Wrong guesses fill whole blocks again and again; only what was said can be found."""
    params = replace(GREEDY, max_tokens=30)
    wanted = run_alone(load(tiny, block_tokens=4), SHARED, params)
    wrong = [(token_id + 1) % 500 + 3 for token_id in wanted.token_ids[1:10]]
    engine = speculating(tiny, Fixed(*wrong), most=9, block_tokens=4)
    assert_equal(run_alone(engine, SHARED, params), wanted)
    turn = [*SHARED, wanted.token_ids[0], *wrong, *prompt_of(4, 3)]
    again = run_alone(engine, turn, GREEDY)
    assert again.finish is not None and again.finish.cached_tokens == len(SHARED)
    assert_equal(again, run_alone(load(tiny, block_tokens=4), turn, GREEDY))
    said = run_alone(engine, [*SHARED, *wanted.token_ids, 7], GREEDY)
    assert said.finish is not None and said.finish.cached_tokens == 76
    assert_equal(said, run_alone(load(tiny), [*SHARED, *wanted.token_ids, 7], GREEDY))


def test_poisoned_cache_behind_the_known_tokens_is_never_read(tiny: Path) -> None:
    """After each step every slot that holds no known token's K and V becomes NaN."""
    params = replace(FREE, max_tokens=40)
    wanted = run_alone(load(tiny, kv_cache="bf16"), SHARED, params)
    guesser = Mixed({"alone": wanted.token_ids})
    engine = speculating(tiny, guesser, kv_cache="bf16", block_tokens=4, prefix_cache=False)
    engine.add(request("alone", SHARED, params))
    answer = Answer([], [])
    while engine.has_work():
        for event in engine.step():
            answer.take(event)
        kept = torch.zeros(engine.stats().total_blocks * 4, dtype=torch.bool)
        for sequence in engine._scheduler.running:
            for position in range(sequence.num_computed):
                kept[sequence.blocks[position // 4] * 4 + position % 4] = True
        for tensor in (tensor for pair in engine._runner.device.cache.layers for tensor in pair):
            tensor.view(-1, *tensor.shape[2:])[~kept] = float("nan")
    assert_equal(answer, wanted)
    assert engine.stats().accepted_tokens > 0


def test_full_batch_leaves_no_room_for_guesses(tiny: Path) -> None:
    wanted = run(load(tiny), [request(str(i), PROMPTS[i]) for i in range(4)])
    engine = speculating(tiny, Mixed(known_answers(wanted)), max_sequences=4, max_batch_tokens=4)
    found = run(engine, [request(str(i), PROMPTS[i]) for i in range(4)])
    for name, answer in found.items():
        assert_equal(answer, wanted[name])


def test_ngram_finds_what_is_repeated(tiny: Path) -> None:
    """The tiny model made to quote its prompt: one step a quotation of nine tokens."""

    def quote(item: GenerationRequest, generated: Sequence[int], logits_V: torch.Tensor) -> None:
        logits_V[SHARED[len(generated) % len(SHARED)]] = 100.0

    params = replace(GREEDY, max_tokens=47)
    wanted = run_alone(load(tiny, quote), SHARED, params)
    engine = load(tiny, quote, speculative="ngram", adaptive_speculation=False)
    assert engine.config.num_speculative_tokens == 8
    assert_equal(run_alone(engine, SHARED, params), wanted)
    assert engine.stats().accepted_tokens > 30
    assert engine.stats().steps < 15


def test_bad_guesses_are_given_up(tiny: Path) -> None:
    """A guesser that is always wrong costs a few steps, not every one."""
    engine = load(tiny, guesser=Fixed(3, 3, 3, 3), speculative="ngram", num_speculative_tokens=4)
    params = replace(GREEDY, max_tokens=110)
    found = run_alone(engine, SHARED, params)
    assert_equal(found, run_alone(load(tiny), SHARED, params))
    assert engine.stats().proposed_tokens < 40


def sequence_of(token_ids: Sequence[int]) -> EngineSequence:
    item = GenerationRequest("a", tuple(token_ids), SamplingParams())
    return EngineSequence(item, arrival=0, seed=0, max_tokens=99)


def best_match(token_ids: Sequence[int]) -> int:
    """Length of the longest repetition of the end, up to 16, by trying all."""
    known = len(token_ids)
    return max(
        (
            length
            for length in range(2, min(known, 17))
            for end in range(length, known)
            if token_ids[end - length : end] == token_ids[known - length :]
        ),
        default=0,
    )


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 12))
def test_lookup_guesses_what_followed(token_ids: list[int], count: int) -> None:
    lookup = Lookup()
    sequence = sequence_of(token_ids[:1])
    for token_id in token_ids[1:]:
        lookup.confidence(sequence)
        sequence.append(token_id)
    level = lookup.confidence(sequence)
    longest = best_match(token_ids)
    assert (level is None) == (longest < 2)
    if level is None:
        return
    (guess,) = lookup.guess([(sequence, count)])
    assert len(guess) == count
    # What is guessed did follow an earlier place whose end matches, repeated where text ran out.
    text = [*token_ids, *guess]
    least = (8, 4, 3, 2)[level]
    ends = [
        end
        for end in range(least, len(token_ids))
        if token_ids[end - least : end] == token_ids[len(token_ids) - least :]
    ]
    assert any(text[end : end + count] == guess for end in ends)


def test_lookup_prefers_the_longest_match_then_the_latest() -> None:
    lookup = Lookup()
    sequence = sequence_of([7, 1, 2, 30, 1, 2, 40, 9, 1, 2, 50, 7, 1, 2])
    assert lookup.confidence(sequence) == 2
    assert lookup.guess([(sequence, 2)]) == [[30, 1]]
    sequence = sequence_of([1, 2, 30, 1, 2, 40, 1, 2])
    lookup.forget(sequence)
    assert lookup.confidence(sequence) == 3
    assert lookup.guess([(sequence, 6)]) == [[40, 1, 2, 40, 1, 2]]


def test_pace_follows_cost_and_acceptance() -> None:
    pace = Pace(8)
    assert pace.num_wanted(0, 0, 1) == 0, "a plain step comes first"
    pace.observe(1.0, 1, 0)
    # Half of all guesses are taken to stand, each to cost a tenth of a step.
    assert pace.num_wanted(0, 0, 1) == 3
    for _ in range(40):
        pace.note(0, 0, 4, 4)
        pace.observe(1.04, 1, 4)
    assert pace.num_wanted(0, 0, 1) == 8
    for _ in range(40):
        pace.note(0, 0, 4, 3)
        pace.observe(3.0, 1, 4)
    assert pace.num_wanted(0, 0, 1) in (1, 2), "each guess costs half a step, three of four stand"
    for _ in range(40):
        pace.note(0, 0, 2, 0)
    wanted = [pace.num_wanted(0, 0, 1) for _ in range(64)]
    assert sum(wanted) == 2, "now and then one more try"
    # Another sequence begins with what all have taught; another class knows nothing of it.
    assert (pace.num_wanted(1, 0, 1), pace.num_wanted(1, 3, 1)) == (2, 1)
    pace.forget(0)
    pace.forget(1)
    assert not pace._rates and not pace._levels


@pytest.mark.parametrize("unit_s", [0.001, 1.0, 40.0])
def test_guesses_are_weighed_against_what_a_plain_step_takes_now(unit_s: float) -> None:
    """In any unit of time, and after steps became slower, as they do with longer contexts."""
    pace = Pace(8)
    for _ in range(10):
        pace.observe(unit_s, 1, 0)
    for _ in range(40):
        pace.note(0, 0, 4, 3)
        pace.observe(3 * unit_s, 1, 4)
    assert pace.num_wanted(0, 0, 1) == 2, "each guess costs half a step"
    for _ in range(100):
        pace.observe(2 * unit_s, 1, 0)
    assert pace.num_wanted(0, 0, 1) == 4, "now a quarter"


def test_a_crowd_on_a_busy_processor_does_not_guess() -> None:
    """Where every row costs the same, only near certainty pays."""
    pace = Pace(4)
    pace.observe(8.0, 8, 0)
    for _ in range(30):
        pace.note(0, 0, 4, 3)
        pace.observe(8.0 + 4 * 0.97, 8, 4)
    assert pace.num_wanted(0, 0, 8) == 0


def test_finished_answers_say_why(tiny: Path) -> None:
    """An end inside of confirmed guesses ends there; what follows is not said."""
    wanted = run_alone(load(tiny), SHARED, replace(GREEDY, max_tokens=30))
    stop = wanted.token_ids[7]
    index = wanted.token_ids.index(stop)
    params = replace(GREEDY, max_tokens=30, stop_token_ids=(stop,))
    guesser = Mixed({"alone": wanted.token_ids})
    guesser.random.random = lambda: 1.0  # type: ignore[method-assign]
    engine = speculating(tiny, guesser, most=9)
    found = run_alone(engine, SHARED, params)
    assert found.token_ids == wanted.token_ids[:index]
    assert found.finish is not None
    scored = found.finish.stop_logprobs
    assert scored is None or scored.token_id == stop
    finish = replace(found.finish, stop_logprobs=None)
    assert finish == FinishEvent("alone", "stop", stop, 48, 0, index + 1)


def test_a_request_that_ends_frees_what_is_remembered_of_it(tiny: Path) -> None:
    engine = load(tiny, speculative="ngram", num_speculative_tokens=4)
    answers = {str(i): Answer([], []) for i in range(3)}
    for name in answers:
        engine.add(request(name, [5, 6] * 8, replace(FREE, max_tokens=20)))
    engine.step()
    engine.abort("1")
    del answers["1"]
    for _ in range(3):
        for event in engine.step():
            if event.request_id in answers:
                answers[event.request_id].take(event)
    drain(engine, answers)
    speculator = engine._speculator
    assert speculator is not None
    assert not speculator._pace._rates and not speculator._pace._levels
    assert isinstance(speculator._guesser, Lookup)
    assert not speculator._guesser._indices and not speculator._guesser._found


# tests/flows/test_pocket.py has trained weights guess in the check.
@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.timeout(180)  # Importing the model takes most of it.
def test_the_demo_model_says_what_it_says_without(tmp_path: Path) -> None:
    """A real model, greedy and drawn, quoting and free, alone and in a batch with prefixes."""
    try:
        path = packaged_file("smollm2")
    except UnsupportedError as error:
        pytest.skip(str(error))
    import_gguf(path, tmp_path / "model")
    chat = load_chat(tmp_path / "model")
    rows = "Name: Ada, City: London\nName: Grace, City: New York\nName: Alan, City: Manchester\n"
    prompts = (
        chat.encode_prompt(rows * 3).token_ids,
        chat.encode_prompt(f"{rows * 3}Name: Ada,").token_ids,
        chat.encode([{"role": "user", "content": "Why is the sky blue?"}]).token_ids,
    )
    items = [
        request(f"{name}-{i}", prompt, replace(params, max_tokens=24))
        for i, prompt in enumerate(prompts)
        for name, params in (("greedy", SamplingParams(temperature=0.0)), ("drawn", FREE))
    ]
    options: dict[str, Any] = {"max_model_len": 256, "kv_cache_tokens": 2048}
    wanted = run(load(tmp_path / "model", **options), items)
    engine = load(tmp_path / "model", speculative="ngram", adaptive_speculation=False, **options)
    for name, answer in (run(engine, items) | run(engine, items[:1])).items():
        assert_equal(answer, wanted[name])
    stats = engine.stats()
    assert stats.accepted_tokens > 30
    assert stats.cached_tokens > 0
