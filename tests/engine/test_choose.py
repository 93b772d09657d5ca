"""Choosing on the device, run on the CPU: the same tokens as the sampler from the same logits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine.choose import (
    MAX_BAN_LISTS,
    BanTable,
    can_hold,
    choose_tokens,
    is_choosable,
    plan_choice,
)
from halfbyte.engine.draw import IMPOSSIBLE
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import Sampler
from halfbyte.engine.sequence import Sequence

VOCAB = 700


def sequence_of(params: SamplingParams, seed: int = 0) -> Sequence:
    request = GenerationRequest(str(seed), (1, 2, 3), params)
    return Sequence(request, arrival=seed, seed=seed, max_tokens=100)


def on_device(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Every step of the device's path."""
    plan = plan_choice(sequences)
    table = BanTable(VOCAB, "cpu")
    table.apply(logits_RV, torch.tensor(table.rows_of(plan.bans)))
    rows = torch.tensor(plan.open_rows), torch.tensor(plan.filtered_rows)
    numbers = torch.from_numpy(plan.numbers)
    tokens: list[int] = choose_tokens(logits_RV, plan, numbers, rows).tolist()
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
    assert (plan_choice([ahead]).numbers == plan_choice([behind]).numbers).all()
    ahead.settle(9)
    assert ahead.token_ids == behind.token_ids


def test_ban_lists_come_and_go() -> None:
    table = BanTable(VOCAB, "cpu")
    for start in range(200):
        lists = [(start % VOCAB,), (), (start % VOCAB, (start + 1) % VOCAB)]
        logits = torch.zeros(3, VOCAB)
        table.apply(logits, torch.tensor(table.rows_of(lists)))
        for row, banned in enumerate(lists):
            assert set(torch.isinf(logits[row]).nonzero()[:, 0].tolist()) == set(banned)
    assert can_hold([(i,) for i in range(MAX_BAN_LISTS - 1)])
    assert not can_hold([(i,) for i in range(MAX_BAN_LISTS)])


@pytest.mark.parametrize("top_k", [1, 40, 256, 300])
def test_a_bounded_top_k_sorts_no_vocabulary(top_k: int) -> None:
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=0.9)
    assert plan_choice([sequence_of(params)]).num_candidates == max(256, top_k)
    both = [sequence_of(params), sequence_of(replace(params, top_k=0))]
    assert plan_choice(both).num_candidates == 0
