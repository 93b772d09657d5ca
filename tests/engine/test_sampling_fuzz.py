"""Random settings against docs/api.md's order of sampling, stated again in float64 with numpy.

The statement knows nothing of candidates, batches or devices: bias, penalties, bans, temperature,
top-k, top-p, min-p over the whole vocabulary, tokens ranked by logit and equal ones by id.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from halfbyte.engine.draw import choose_tokens, plan_draws
from halfbyte.engine.plan.sequence import Sequence
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.sampler import Sampler, is_choosable
from tolerances import CHI_SQUARE_P

EOS = (2,)
PROMPT = (1, 3, 5, 5)
ANSWER = (4, 5, 6, 6)


def sequence_of(params: SamplingParams, seed: int) -> Sequence:
    request = GenerationRequest(str(seed), PROMPT, params)
    made = Sequence(request, arrival=seed, seed=seed, max_tokens=99)
    for token_id in ANSWER:
        made.append(token_id)
    return made


def stated(logits_V: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The probability of each token; zero where it must never come."""
    x = logits_V.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    for token_id in {*PROMPT, *ANSWER}:
        factor = params.repetition_penalty
        x[token_id] = x[token_id] / factor if x[token_id] > 0 else x[token_id] * factor
    for token_id, count in Counter(ANSWER).items():
        x[token_id] -= params.frequency_penalty * count + params.presence_penalty
    if params.min_tokens > len(ANSWER):
        x[[*EOS, *params.stop_token_ids]] = -np.inf
    x[list(params.banned_token_ids)] = -np.inf
    if params.temperature < 1e-5:
        greedy = np.zeros_like(x)
        greedy[x.argmax()] = 1.0
        return greedy
    order = np.argsort(-x, kind="stable")
    weights = np.exp((x[order] - x[order[0]]) / params.temperature)
    if params.top_k:
        weights[params.top_k :] = 0.0
    before = np.cumsum(weights) - weights
    if params.top_p < 1.0:
        weights[before >= params.top_p * weights.sum()] = 0.0
    weights[weights < params.min_p * weights[0]] = 0.0
    probs = np.zeros_like(x)
    probs[order] = weights / weights.sum()
    return probs


def made_up(generator: np.random.Generator) -> tuple[NDArray[np.float32], SamplingParams]:
    """Logits of some model, often with ties, and settings in every combination."""

    def one_of(*values: Any) -> Any:
        return values[generator.integers(len(values))]

    vocab = int(one_of(7, 40, 300, 1500))
    logits = generator.standard_normal(vocab).astype(np.float32) * float(one_of(0.05, 1, 4, 20))
    kind = one_of("as they are", "bf16", "few values", "all equal")
    if kind == "bf16":
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    elif kind == "few values":
        logits = np.round(logits)
    elif kind == "all equal":
        logits = np.full(vocab, logits[0], np.float32)
    banned = generator.choice(np.arange(3, vocab), size=one_of(0, 0, 1, vocab // 4), replace=False)
    biased = generator.choice(vocab, size=one_of(0, 0, 2), replace=False)
    params = SamplingParams(
        temperature=float(one_of(0.0, 1e-46, 1e-20, 1e-4, 0.3, 0.7, 1.0, 1.3, 2.0, 30.0)),
        top_k=int(one_of(0, 0, 1, 3, 20, 256, 400, 2**31, 2**63, 2**70)),
        top_p=float(one_of(1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12)),
        min_p=float(one_of(0.0, 0.0, 0.02, 0.5, 1.0)),
        presence_penalty=float(one_of(0.0, 0.0, 1.5, -1.5)),
        frequency_penalty=float(one_of(0.0, 0.0, 0.5, -0.5)),
        repetition_penalty=float(one_of(1.0, 1.0, 1.3, 0.8)),
        logit_bias={int(token_id): float(one_of(-100, -2, 3, 50)) for token_id in biased},
        banned_token_ids=tuple(map(int, banned)),
        stop_token_ids=(0,) if generator.integers(2) else (),
        min_tokens=int(one_of(0, 0, 9)),
    )
    return logits, params


def is_on_an_edge(probs_by_rounding: list[NDArray[np.float64]]) -> bool:
    """Whether f32 and f64 may disagree about what a filter keeps."""
    first, *others = probs_by_rounding
    return any(((first > 0) != (other > 0)).any() for other in others)


def check(number: int, draws: int) -> float | None:
    """Draw with one made-up setting; the chi-square's P where two tokens are likely enough."""
    generator = np.random.default_rng(number)
    logits, params = made_up(generator)
    vocab = len(logits)
    probs = stated(logits, params)
    sampler = Sampler(vocab, EOS)

    def draw(sequences: list[Sequence], rows: torch.Tensor | None = None) -> list[int]:
        rows = torch.from_numpy(logits).repeat(len(sequences), 1) if rows is None else rows
        return [choice.token_id for choice in sampler.choose(rows, sequences)]

    # Other seeds for each setting: the same uniform numbers in all of them would make one rare
    # set of numbers look like many rare results.
    seeds = range(number * draws, (number + 1) * draws)
    sequences = [sequence_of(params, seed) for seed in seeds]
    drawn = draw(sequences)
    # A seed's token is the same alone and beside a neighbour that needs other candidates.
    for seed, token_id in zip(seeds[:5], drawn, strict=False):
        beside = sequence_of(
            dataclasses.replace(params, temperature=2.0, top_p=0.9999, top_k=0, min_p=0.0), 99
        )
        pair = torch.from_numpy(np.stack([logits, generator.permutation(logits) * 0.1]))
        assert draw([sequence_of(params, seed)]) == [token_id], (number, params)
        assert draw([sequence_of(params, seed), beside], pair)[0] == token_id, (number, params)
    # The path that runs on a device takes what it serves, and makes the same draws.
    if is_choosable(sequences[0]):
        rows = torch.from_numpy(logits).repeat(draws, 1)
        rows[:, list(params.banned_token_ids)] = -torch.inf
        plan = plan_draws(sequences)
        sent = [torch.from_numpy(array) for array in plan.arrays]
        found = choose_tokens(rows, plan, sent, may_look=False)
        assert found.tolist() == drawn, (number, params)
    # Rounding of logits to f32 after bias and penalties may move a token over a filter's edge.
    edges = [probs, *(stated(logits * np.float32(1 + e), params) for e in (-2e-6, 2e-6))]
    observed = np.bincount(drawn, minlength=vocab)
    if not is_on_an_edge(edges):
        assert not observed[probs == 0].sum(), (number, params)
    likely = np.flatnonzero(probs * draws >= 10)
    if len(likely) < 2:
        return None
    counts, expected = observed[likely], probs[likely] * draws
    rest = draws - expected.sum()
    if rest > 1:
        counts, expected = np.append(counts, draws - counts.sum()), np.append(expected, rest)
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def test_sampler_follows_its_documented_order() -> None:
    found = [p for number in range(60) if (p := check(number, 200)) is not None]
    assert len(found) >= 8 and min(found) > CHI_SQUARE_P


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sampler_follows_its_documented_order_at_length() -> None:
    found = [p for number in range(1000, 1800) if (p := check(number, 2000)) is not None]
    # As many as there are, one may be as rare as this; all together are uniform.
    assert min(found) > CHI_SQUARE_P / len(found)
    assert stats.kstest(found, "uniform").pvalue > CHI_SQUARE_P
