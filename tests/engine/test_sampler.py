import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from halfbyte.engine.draw import IMPOSSIBLE, uniform
from halfbyte.engine.plan.sequence import Sequence
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import Sampler, logprobs_of
from halfbyte.kernels import reference
from tolerances import CHI_SQUARE_P

VOCAB = 1000
# A distribution over the first tokens whose order is not that of the ids; the rest is a thin tail.
PROBS = torch.full((VOCAB,), 0.1 / (VOCAB - 6))
PROBS[:6] = torch.tensor([0.05, 0.30, 0.20, 0.25, 0.02, 0.08])
LOGITS = PROBS.log()


def sequence(
    params: SamplingParams, seed: int = 0, prompt: tuple[int, ...] = (1,), generated: int = 0
) -> Sequence:
    made = Sequence(GenerationRequest("a", prompt, params), arrival=0, seed=seed, max_tokens=99)
    for _ in range(generated):
        made.append(2)
    return made


def choose(params: SamplingParams, logits: torch.Tensor = LOGITS, **more: Any) -> int:
    sampler = Sampler(logits.shape[-1], (0,))
    return sampler.choose(logits[None].clone(), [sequence(params, **more)])[0].token_id


def draw_many(params: SamplingParams, count: int = 4000) -> Counter[int]:
    """One batch of as many sequences with other seeds each."""
    sampler = Sampler(VOCAB, (0,))
    sequences = [sequence(params, seed=seed) for seed in range(count)]
    return Counter(c.token_id for c in sampler.choose(LOGITS.repeat(count, 1), sequences))


def chi_square_p(observed: Counter[int], probs: dict[int, float]) -> float:
    """P of a deviation this large, by the Wilson-Hilferty approximation."""
    total = observed.total()
    statistic = sum((observed[i] - total * p) ** 2 / (total * p) for i, p in probs.items())
    degrees = len(probs) - 1
    spread = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def normalized(kept: dict[int, float]) -> dict[int, float]:
    total = sum(kept.values())
    return {token_id: p / total for token_id, p in kept.items()}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {**{i: float(PROBS[i]) for i in range(6)}, -1: 0.1}),
        ({"temperature": 0.5}, None),
        ({"top_k": 3}, normalized({1: 0.30, 3: 0.25, 2: 0.20})),
        # The first tokens that together reach 0.5: the one that crosses stays.
        ({"top_p": 0.5}, normalized({1: 0.30, 3: 0.25})),
        ({"top_p": 0.56}, normalized({1: 0.30, 3: 0.25, 2: 0.20})),
        # Of what top-k leaves (0.75), not of everything.
        ({"top_k": 3, "top_p": 0.72}, normalized({1: 0.30, 3: 0.25})),
        ({"min_p": 0.25}, normalized({1: 0.30, 3: 0.25, 2: 0.20, 5: 0.08})),
        # Reaches past the candidates: the thin tail is most of the last tenth.
        ({"top_p": 0.95}, None),
    ],
)
def test_draws_follow_the_distribution(
    changes: dict[str, Any], wanted: dict[int, float] | None
) -> None:
    observed = draw_many(replace(SamplingParams(), **changes))
    if changes.get("temperature"):
        wanted = normalized({i: float(PROBS[i]) ** 2 for i in range(VOCAB)})
        wanted = {i: wanted[i] for i in range(6)}
        wanted[-1] = 1 - sum(wanted.values())
    if changes.get("top_p") == 0.95:
        wanted = normalized({**{i: float(PROBS[i]) for i in range(6)}, -1: 0.05})
    assert wanted is not None
    if -1 in wanted:
        observed = Counter({i: observed[i] for i in range(6)}) + Counter(
            {-1: sum(count for i, count in observed.items() if i >= 6)}
        )
    assert set(observed) <= set(wanted)
    assert chi_square_p(observed, wanted) > CHI_SQUARE_P


def test_uniform_numbers_are_uniform_and_repeatable() -> None:
    values = [uniform(seed, index) for seed in range(40) for index in range(100)]
    assert all(0 <= value < 1 for value in values)
    bins = Counter(int(value * 10) for value in values)
    assert chi_square_p(bins, dict.fromkeys(range(10), 0.1)) > CHI_SQUARE_P
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_chi_square_sees_a_wrong_distribution() -> None:
    observed = draw_many(SamplingParams(top_k=2))
    assert chi_square_p(observed, {1: 0.5, 3: 0.5}) < CHI_SQUARE_P


def test_tiny_temperature_is_greedy_not_nan() -> None:
    assert choose(SamplingParams(temperature=1e-6), LOGITS * 100) == 1


def test_greedy_takes_the_best() -> None:
    assert choose(SamplingParams(temperature=0.0)) == 1


def test_bias_penalties_and_bans_move_the_choice() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert choose(replace(greedy, logit_bias={5: 5.0})) == 5
    assert choose(replace(greedy, banned_token_ids=(1,))) == 3
    # Token 2 has been generated three times; its logit lies 0.4 below the best.
    raised = LOGITS.clone()
    raised[2] += 1.0
    assert choose(greedy, raised, generated=3) == 2
    assert choose(replace(greedy, presence_penalty=0.7), raised, generated=3) == 1
    assert choose(replace(greedy, presence_penalty=0.5), raised, generated=3) == 2
    assert choose(replace(greedy, frequency_penalty=0.25), raised, generated=3) == 1
    assert choose(replace(greedy, frequency_penalty=0.25), raised, generated=1) == 2


def test_repetition_penalty_counts_the_prompt_and_lowers_both_signs() -> None:
    greedy = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    logits = torch.zeros(VOCAB) - 10
    logits[1], logits[2] = 3.0, 2.0
    assert choose(greedy, logits, prompt=(1,)) == 2
    assert choose(greedy, logits, prompt=(1, 2)) == 1
    logits[1], logits[2] = -3.0, -4.0
    assert choose(greedy, logits, prompt=(1,)) == 2


def test_minimum_length_bans_every_end() -> None:
    logits = LOGITS.clone()
    logits[0], logits[7] = 50.0, 40.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(7,))
    assert choose(params, logits, generated=1) == 1
    assert choose(params, logits, generated=2) == 0
    assert choose(replace(params, ignore_eos=True), logits, generated=1) == 0


def test_nothing_allowed_is_said() -> None:
    everything = tuple(range(VOCAB))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, banned_token_ids=everything)
        assert choose(params) == IMPOSSIBLE


class Only:
    """A mask that allows some tokens, and leaves bits beyond the vocabulary set."""

    def __init__(self, allowed: set[int]) -> None:
        self._allowed = allowed
        self.num_fills = 0

    def allows(self, token_id: int) -> bool:
        return token_id in self._allowed

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        self.num_fills += 1
        bitmask[:] = 0
        bitmask[-1] = np.uint32(0xFFFFFFFF) << np.uint32(VOCAB % 32)
        for token_id in self._allowed:
            bitmask[token_id // 32] |= np.uint32(1) << np.uint32(token_id % 32)

    def accept(self, token_id: int) -> None:
        raise AssertionError("the sampler does not accept")

    def is_finished(self) -> bool:
        return False


@given(st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=60), st.booleans())
def test_masks_leave_exactly_what_they_allow(allowed: set[int], twice: bool) -> None:
    """Tokens they allow keep their logits bit for bit, and one mask leaves no trace in the next."""
    sampler = Sampler(VOCAB, (0,))
    if twice:
        sampler._mask(LOGITS.clone(), GenerationRequest("b", (1,), SamplingParams(), Only({7})))
    logits = LOGITS.clone()
    sampler._mask(logits, GenerationRequest("a", (1,), SamplingParams(), Only(allowed)))
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    kept[list(allowed)] = True
    assert torch.equal(logits[kept], LOGITS[kept])
    assert torch.isinf(logits[~kept]).all() and (logits[~kept] < 0).all()
    # What runs on another device makes the same of the same bits.
    closed = LOGITS.clone()
    reference.mask_logits(closed, torch.from_numpy(sampler._masks._buffers[0].view(np.int32)))
    assert torch.equal(closed, logits)


@pytest.mark.parametrize("allowed", [{0, 1, 4}, {4, 5}, {3, 700}, set(range(2, VOCAB))])
def test_draws_under_a_mask_follow_the_masked_distribution(allowed: set[int]) -> None:
    """Also where the first draw, made without it, stands."""
    count = 4000
    masks = [Only(allowed) for _ in range(count)]
    sampler = Sampler(VOCAB, (0,))
    sequences = [
        Sequence(
            GenerationRequest("a", (1,), SamplingParams(temperature=1.0), mask),
            arrival=0,
            seed=seed,
            max_tokens=99,
        )
        for seed, mask in enumerate(masks)
    ]
    found = Counter(c.token_id for c in sampler.choose(LOGITS.repeat(count, 1), sequences))
    assert set(found) <= allowed
    wanted = normalized({token_id: float(PROBS[token_id]) for token_id in allowed})
    common = {token_id: p for token_id, p in wanted.items() if p * count > 5}
    rest = 1.0 - sum(common.values())
    if rest > 1e-6:
        common[-1] = rest
        found[-1] = sum(n for token_id, n in found.items() if token_id not in common)
    assert chi_square_p(Counter({i: found[i] for i in common}), common) > CHI_SQUARE_P
    # Masks are filled only where the first draw fell.
    stood = sum(float(PROBS[token_id]) for token_id in allowed)
    filled = sum(mask.num_fills for mask in masks)
    assert abs(filled - count * (1 - stood)) < 5 * math.sqrt(count / 4)


@pytest.mark.parametrize(
    ("params", "fills"),
    [
        (SamplingParams(temperature=0.0), 0),
        (SamplingParams(temperature=0.8, top_k=1), 0),
        (SamplingParams(temperature=0.0, banned_token_ids=(1,)), 1),
        (SamplingParams(temperature=0.0, logit_bias={2: 9.0}), 1),
    ],
    ids=["greedy", "filtered", "banned", "biased"],
)
def test_a_mask_is_filled_only_where_the_first_draw_falls(
    params: SamplingParams, fills: int
) -> None:
    mask = Only({1, 4, 5})
    sampler = Sampler(VOCAB, (0,))
    logits = LOGITS[None].clone()
    made = Sequence(GenerationRequest("a", (1,), params, mask), arrival=0, seed=1, max_tokens=9)
    (choice,) = sampler.choose(logits, [made])
    assert choice.token_id in ({1} if fills == 0 else {1, 4, 5} - set(params.banned_token_ids))
    assert mask.num_fills == fills


class Broken(Only):
    """A mask whose program fails, as foreign code may."""

    def allows(self, token_id: int) -> bool:
        raise RuntimeError("no more room")

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        raise RuntimeError("no more room")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_fails_lets_nothing_through(temperature: float) -> None:
    """Its own request ends; nothing is said that no grammar has allowed. The others go on."""
    sampler = Sampler(VOCAB, (0,))
    params = SamplingParams(temperature=temperature)
    made = [
        Sequence(GenerationRequest(name, (1,), params, mask), arrival=i, seed=1, max_tokens=9)
        for i, (name, mask) in enumerate([("a", Broken({1})), ("b", Only({4})), ("c", None)])
    ]
    broken, held, free = sampler.choose(LOGITS.repeat(3, 1), made)
    assert broken.token_id == IMPOSSIBLE
    assert held.token_id == 4 and free.token_id != IMPOSSIBLE


def test_filters_look_at_the_model_first_then_at_what_the_mask_leaves() -> None:
    """top-p 0.5 keeps 1 and 3 of the model; of what the mask leaves 3 and 5."""
    allowed = {3, 4, 5}
    sampler = Sampler(VOCAB, (0,))
    params = SamplingParams(temperature=1.0, top_p=0.5)
    sequences = [
        Sequence(
            GenerationRequest("a", (1,), params, Only(allowed)), arrival=0, seed=seed, max_tokens=9
        )
        for seed in range(4000)
    ]
    found = Counter(c.token_id for c in sampler.choose(LOGITS.repeat(4000, 1), sequences))
    # First 0.30 : 0.25; where 1 was drawn, of 0.25 : 0.02 : 0.08 the first alone reaches a half.
    assert found == {3: 4000}
    wider = replace(params, top_p=0.9)
    sequences = [
        Sequence(
            GenerationRequest("a", (1,), wider, Only(allowed)), arrival=0, seed=seed, max_tokens=9
        )
        for seed in range(4000)
    ]
    found = Counter(c.token_id for c in sampler.choose(LOGITS.repeat(4000, 1), sequences))
    # The model's 0.30 0.25 0.20 0.08 0.05 and 0.02 reach 0.9 exactly; what is refused is drawn
    # again from 0.25 : 0.08, 94 % of what the mask leaves.
    first = {token_id: float(PROBS[token_id]) / 0.9 for token_id in allowed}
    again = 1.0 - sum(first.values())
    wanted = {
        3: first[3] + again * 0.25 / 0.33,
        5: first[5] + again * 0.08 / 0.33,
        4: first[4],
    }
    assert chi_square_p(found, wanted) > CHI_SQUARE_P


def test_different_bans_stay_in_their_rows() -> None:
    sampler = Sampler(VOCAB, ())
    greedy = SamplingParams(temperature=0.0)
    lists: list[tuple[int, ...]] = [(1,), (), (1, 3), (1,)]
    sequences = [sequence(replace(greedy, banned_token_ids=banned)) for banned in lists]
    chosen = sampler.choose(LOGITS.repeat(4, 1), sequences)
    assert [choice.token_id for choice in chosen] == [3, 1, 2, 3]


def test_logprobs_are_of_the_model_not_of_the_sampler() -> None:
    params = SamplingParams(temperature=0.3, top_k=1, logprobs=2, logit_bias={5: 50.0})
    sampler = Sampler(VOCAB, ())
    (choice,) = sampler.choose(LOGITS[None].clone(), [sequence(params)])
    assert choice.token_id == 5 and choice.logprobs is not None
    assert choice.logprobs.logprob == pytest.approx(math.log(0.08), abs=1e-5)
    assert [token_id for token_id, _ in choice.logprobs.top] == [1, 3]


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    found = logprobs_of(LOGITS.repeat(3, 1), [1, 2, 999], [0, 2, 3])
    assert [len(item.top) for item in found] == [0, 2, 3]
    assert found[2].logprob == pytest.approx(float(LOGITS[999]), abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    top_k=st.integers(0, 20),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 30.0),
)
def test_filters_never_draw_what_they_exclude(
    top_k: int, top_p: float, min_p: float, seed: int, scale: float
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    token_id = choose(params, logits, seed=seed)
    probs = logits.double().softmax(-1)
    rank = int((probs > probs[token_id]).sum())
    assert top_k == 0 or rank < top_k
    assert probs[token_id] >= min_p * probs.max() * (1 - 1e-6)
    kept = probs.sort(descending=True).values[: top_k or VOCAB]
    whole = kept.sum() if top_k else torch.tensor(1.0)
    # Everything better than the token is short of top_p, or the token would not be needed.
    assert kept[:rank].sum() <= top_p * whole * (1 + 1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 7e-46, 1e-45, 1e-38, 1e-20, 9e-6])
def test_temperature_that_f32_cannot_divide_by_is_greedy(
    temperature: float, filters: dict[str, Any]
) -> None:
    params = replace(SamplingParams(temperature=temperature), **filters)
    assert params.is_greedy
    assert choose(params) == 1
    assert choose(replace(params, logprobs=2)) == 1


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logits_that_are_no_numbers_end_their_own_row_only(
    temperature: float, filters: dict[str, Any]
) -> None:
    params = replace(SamplingParams(temperature=temperature), **filters)
    rows = LOGITS.repeat(4, 1)
    rows[0, 5] = torch.inf
    rows[1, 5] = torch.nan
    rows[2] = -torch.inf
    choices = Sampler(VOCAB, (0,)).choose(rows, [sequence(params, seed=i) for i in range(4)])
    assert [choice.token_id for choice in choices[:3]] == [IMPOSSIBLE] * 3
    assert 0 <= choices[3].token_id < VOCAB


@pytest.mark.parametrize("top_k", [2**31, 2**63, 2**64, 10**30])
def test_top_k_beyond_every_vocabulary_is_none(top_k: int) -> None:
    params = SamplingParams(top_k=top_k, top_p=0.8)
    for seed in range(20):
        assert choose(params, seed=seed) == choose(replace(params, top_k=0), seed=seed)


def test_equal_alternatives_are_reported_in_the_order_of_their_ids() -> None:
    flat = torch.zeros(2, 500)
    for num_top in ([5, 5], [5, 20], [20, 5]):
        found = logprobs_of(flat, [7, 7], num_top)
        assert [[i for i, _ in item.top] for item in found] == [list(range(n)) for n in num_top]
