"""Choosing tokens: ranks, inversion, and the same draw whether or not the host may look."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine import draw
from halfbyte.engine.draw import (
    IMPOSSIBLE,
    BanLists,
    choose_tokens,
    invert,
    plan_draws,
    ranked,
    ranked_by_key,
)
from halfbyte.engine.plan.sequence import Sequence
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import Sampler, is_choosable

# Many equal values, both zeros, the smallest numbers and what is banned.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-45, -1e-45, 3e38, -3e38, -torch.inf])


@settings(deadline=None, max_examples=200)
@given(st.lists(VALUES, min_size=1, max_size=40), st.integers(1, 40))
def test_ranks_are_by_value_then_by_id_however_many_are_asked_for(
    values: list[float], count: int
) -> None:
    row = torch.tensor([values, values[::-1]])
    count = min(count, len(values))
    found, ids = ranked(row, count)
    assert torch.equal(ranked_by_key(row, count), ids)
    for line, picked, best in zip(row.tolist(), ids.tolist(), found.tolist(), strict=True):
        wanted = sorted(range(len(line)), key=lambda i: (-line[i], i))[:count]
        assert picked == wanted
        assert best == [line[i] for i in wanted]


WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1e-300, 5e-324, 1e300, 0.1])


@settings(deadline=None, max_examples=300)
@given(
    st.lists(WEIGHTS, min_size=1, max_size=20),
    st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53), st.just(0.0)),
)
def test_no_index_without_weight_is_drawn(weights: list[float], uniform: float) -> None:
    row = torch.tensor([weights], dtype=torch.float64)
    index = int(invert(row, torch.tensor([[uniform]], dtype=torch.float64)))
    if any(weights):
        assert 0 <= index < len(weights) and weights[index] > 0
    else:
        assert index == IMPOSSIBLE


def test_weights_that_are_no_numbers_give_no_index() -> None:
    rows = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [0.0, 0.0]], dtype=torch.float64)
    uniform = torch.full((3, 1), 0.5, dtype=torch.float64)
    assert invert(rows, uniform)[:, 0].tolist() == [IMPOSSIBLE] * 3


VOCAB = 700


def sequence_of(params: SamplingParams, seed: int = 0) -> Sequence:
    request = GenerationRequest(str(seed), (1, 2, 3), params)
    return Sequence(request, arrival=seed, seed=seed, max_tokens=100)


def on_device(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """As an engine that runs ahead chooses: without a look at any value."""
    plan = plan_draws(sequences)
    BanLists("cpu").apply(logits_RV, [one.request.params.banned_token_ids for one in sequences])
    sent = [torch.from_numpy(array) for array in plan.arrays] if plan.draws else []
    tokens: list[int] = choose_tokens(logits_RV, plan, sent, may_look=False).tolist()
    return tokens


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 5, 300, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    banned_token_ids=st.sampled_from([(), (0,), (5, 6, 7), tuple(range(300))]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 10_000), st.sampled_from([1.0, 6]))
def test_device_and_sampler_choose_the_same_tokens(
    params: list[SamplingParams], seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), VOCAB, generator=generator) * spread
    sequences = [sequence_of(p, seed + i) for i, p in enumerate(params)]
    assert all(map(is_choosable, sequences))
    sampler = Sampler(VOCAB, (2,))
    wanted = [choice.token_id for choice in sampler.choose(logits.clone(), sequences)]
    assert on_device(logits, sequences) == wanted


def test_rows_without_a_token_are_marked_and_leave_others_alone() -> None:
    params = [SamplingParams(temperature=t, top_p=p) for t in (0.0, 1.0) for p in (1.0, 0.5)]
    sequences = [sequence_of(p, i) for i, p in enumerate(params * 3)]
    logits = torch.randn(12, VOCAB)
    logits[4:8] = -torch.inf
    logits[8:12] = torch.nan
    tokens = on_device(logits, sequences)
    assert tokens[4:] == [IMPOSSIBLE] * 8
    assert all(0 <= token < VOCAB for token in tokens[:4])


def test_what_needs_the_host_is_not_choosable() -> None:
    plain = SamplingParams(temperature=0.7)
    assert is_choosable(sequence_of(plain))
    for change in (
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 1},
    ):
        assert not is_choosable(sequence_of(replace(plain, **change))), change
    late = sequence_of(replace(plain, min_tokens=1))
    late.append(7)
    assert is_choosable(late)


def test_places_are_counted_as_tokens_when_the_draw_is_numbered() -> None:
    ahead, behind = (sequence_of(SamplingParams(seed=5)) for _ in range(2))
    ahead.reserve(0)
    behind.append(9)
    assert (plan_draws([ahead]).numbers_5R == plan_draws([behind]).numbers_5R).all()
    ahead.settle(9)
    assert ahead.token_ids == behind.token_ids


def test_ban_lists_come_and_go() -> None:
    bans = BanLists("cpu")
    for start in range(200):
        shared = (start % VOCAB, (start + 1) % VOCAB)
        lists = [(start % VOCAB,), (), shared, shared, ()]
        logits = torch.zeros(len(lists), VOCAB)
        bans.apply(logits, lists)
        for row, banned in enumerate(lists):
            assert set(torch.isinf(logits[row]).nonzero()[:, 0].tolist()) == set(banned)
    nothing = torch.zeros(0, VOCAB)
    bans.apply(nothing, [])


@pytest.mark.parametrize("top_k", [1, 40, 256, 300])
def test_a_bounded_top_k_sorts_no_vocabulary(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    inside = draw.ranked

    def noted(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(count)
        return inside(logits_RV, count)

    monkeypatch.setattr(draw, "ranked", noted)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=0.9)
    for chosen in ([params], [params, replace(params, top_k=0)]):
        sequences = [sequence_of(one, i) for i, one in enumerate(chosen)]
        on_device(torch.randn(len(sequences), VOCAB), sequences)
    assert counts == [max(256, top_k), VOCAB]
