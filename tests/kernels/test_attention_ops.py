"""Paged attention: every CPU implementation against dense attention in float64."""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bounded import assert_bounded
from halfbyte.kernels import native, reference
from halfbyte.kernels.dispatch import SPAN_TOKENS, implementations
from halfbyte.kernels.paged import PagedContext

NATIVE = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason="no C compiler on this machine"
)
E4M3 = torch.float8_e4m3fn
CASES = range(24)


@pytest.fixture(params=["matrix unit", "vectors"])
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native attention with and without the matrix unit; the same twice where there is none."""
    before = native.allow_tiles(request.param == "matrix unit")
    yield request.param
    native.allow_tiles(before)


@dataclass
class Batch:
    """A ragged batch over caches whose unused slots hold NaN."""

    q_TNH: Tensor
    k_cache: Tensor
    v_cache: Tensor
    scales: tuple[float, float]
    table: Tensor
    lengths: Tensor
    starts: Tensor
    softmax_scale: float

    def run(self, attention) -> Tensor:  # type: ignore[no-untyped-def]
        context = PagedContext(
            *(self.k_cache, self.v_cache, *self.scales),
            *(self.table, self.lengths, self.starts, self.softmax_scale),
        )
        return attention(self.q_TNH, context)  # type: ignore[no-any-return]

    def alone(self, sequence: int, num_queries: int) -> "Batch":
        """The last queries of one sequence, as a batch of their own."""
        stop = int(self.starts[sequence + 1])
        return Batch(
            self.q_TNH[stop - num_queries : stop],
            *(self.k_cache, self.v_cache, self.scales, self.table[sequence : sequence + 1]),
            self.lengths[sequence : sequence + 1],
            torch.tensor([0, num_queries], dtype=torch.int32),
            self.softmax_scale,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Each sequence's keys and values gathered token by token, then attention in `dtype`."""
        out = []
        page_tokens, kv_heads = self.k_cache.shape[1:3]
        group = self.q_TNH.shape[1] // kv_heads
        for s, length in enumerate(self.lengths.tolist()):
            q = self.q_TNH[int(self.starts[s]) : int(self.starts[s + 1])].to(dtype)
            at = [(int(self.table[s, t // page_tokens]), t % page_tokens) for t in range(length)]
            if not len(q):
                continue
            k = torch.stack([self.k_cache[page, slot].to(dtype) for page, slot in at])
            v = torch.stack([self.v_cache[page, slot].to(dtype) for page, slot in at])
            k = (k * self.scales[0]).repeat_interleave(group, 1)
            v = (v * self.scales[1]).repeat_interleave(group, 1)
            scores = torch.einsum("jnh,cnh->njc", q, k) * self.softmax_scale
            hidden = torch.ones(len(q), length).triu(length - len(q) + 1).bool()
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out.append(torch.einsum("njc,cnh->jnh", weights, v))
        return torch.cat(out)


def make_batch(
    seed: int,
    head_dims: Sequence[int] = (16, 24, 32, 64, 128),
    earlier_tokens: Sequence[int] = (0, 1, 15, 16, 17, 255, 256, 300),
) -> Batch:
    """Random geometry; queries and contexts around page, tile and split ends; pages shuffled."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    head_dim, kv_heads = dice.choice(head_dims), dice.choice([1, 2, 3])
    heads, page_tokens = kv_heads * dice.choice([1, 3, 4, 12]), dice.choice([1, 4, 16, 32])
    queries = [dice.choice([1, 1, 2, 7, 0, 40]) for _ in range(dice.choice([1, 3, 5]))]
    queries[0] = max(queries[0], 1)
    earlier = [dice.choice(earlier_tokens) for _ in queries]
    lengths = [new + old for new, old in zip(queries, earlier, strict=True)]
    needed = [-(-length // page_tokens) for length in lengths]
    dtype = dice.choice([E4M3, E4M3, torch.bfloat16])
    scales = (0.013, 0.02) if dtype == E4M3 else (1.0, 1.0)
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    shape = (len(free), page_tokens, kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan")).to(dtype) for _ in range(2))
    table = torch.full((len(queries), max(needed)), -1, dtype=torch.int32)
    for s, length in enumerate(lengths):
        for page in range(needed[s]):
            table[s, page] = free.pop()
        position = torch.arange(length)
        slots = table[s].long()[position // page_tokens] * page_tokens + position % page_tokens
        k, v = torch.randn((2, length, kv_heads, head_dim), generator=generator).bfloat16()
        reference.store_kv(k, v, k_cache, v_cache, slots, *scales)
    q = torch.randn((sum(queries), heads, head_dim), generator=generator).bfloat16()
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lengths_S = torch.tensor(lengths, dtype=torch.int32)
    return Batch(q, k_cache, v_cache, scales, table, lengths_S, starts, head_dim**-0.5)


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("name", implementations("paged_attention"))
def test_any_ragged_batch_equals_dense_attention(name: str, seed: int) -> None:
    batch = make_batch(seed)
    result = batch.run(implementations("paged_attention")[name])
    assert_bounded(result, batch.dense(torch.bfloat16), batch.dense(torch.float64))


# Contexts about the ends of splits and of spans (1,024 tokens); widths that the matrix unit takes.
LONG: dict[str, Sequence[int]] = {
    "head_dims": (64, 64, 128, 192, 256),
    "earlier_tokens": (0, 31, 255, 300, 1000, 1023, 1024, 2300),
}


@NATIVE
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("seed", range(12))
def test_long_contexts_equal_dense_attention(seed: int) -> None:
    batch = make_batch(seed, **LONG)
    result = batch.run(native.paged_attention)
    assert_bounded(result, batch.dense(torch.bfloat16), batch.dense(torch.float64))


@NATIVE
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("seed", [*CASES, *range(100, 112)])
def test_a_query_gets_the_same_bits_alone_in_chunks_and_on_one_thread(seed: int) -> None:
    batch = make_batch(seed) if seed in CASES else make_batch(seed, **LONG)
    together = batch.run(native.paged_attention)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(batch.run(native.paged_attention), together)
    finally:
        torch.set_num_threads(threads)
    for s in range(len(batch.lengths)):
        stop = int(batch.starts[s + 1])
        for count in {1, (stop - int(batch.starts[s])) // 2} - {0}:
            if stop - count >= int(batch.starts[s]):
                alone = batch.alone(s, count).run(native.paged_attention)
                assert torch.equal(alone, together[stop - count : stop])


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("seed", [*range(4), *range(100, 112)])
@pytest.mark.parametrize("name", implementations("attend_spans"))
def test_attention_in_parts_has_the_bits_of_attention_in_one(name: str, seed: int) -> None:
    batch = make_batch(seed) if seed in CASES else make_batch(seed, **LONG)
    whole = batch.run(implementations("paged_attention")[name])
    attend = implementations("attend_spans")[name]
    num_spans = -(-int(batch.lengths.max()) // SPAN_TOKENS)
    for size in range(1, num_spans + 1):
        totals = torch.full((*batch.q_TNH.shape[:2], batch.q_TNH.shape[2] + 2), float("nan"))
        for first in range(0, num_spans, size):
            spans = range(first, min(first + size, num_spans))
            out = batch.run(functools.partial(attend, spans=spans, totals=totals))
        assert torch.equal(out, whole)


@NATIVE
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("poison", ["keys", "queries"])
def test_nan_reaches_the_queries_that_see_it_and_no_other(poison: str) -> None:
    k_cache, v_cache = torch.randn(2, 40, 16, 1, 64).to(E4M3)
    q = torch.randn(30, 3, 64).bfloat16()
    if poison == "keys":
        k_cache[38, 5] = float("nan")  # token 613, which queries 13 to 29 see
        expected = torch.arange(30) >= 13
    else:
        q[13] = float("nan")
        expected = torch.arange(30) == 13
    context = PagedContext(
        *(k_cache, v_cache, 1.0, 1.0, torch.arange(40, dtype=torch.int32)[None]),
        *(torch.tensor([630]).int(), torch.tensor([0, 30]).int(), 0.125),
    )
    out = native.paged_attention(q, context)
    assert torch.equal(out.isnan().any(-1).any(-1), expected)


@NATIVE
def test_scores_far_apart_do_not_overflow() -> None:
    k_cache = torch.zeros(40, 16, 1, 64).bfloat16()
    v_cache = torch.randn(40, 16, 1, 64).bfloat16()
    k_cache[37, 3] = 200.0  # one token takes all the weight, in the third split
    q = torch.full((1, 1, 64), 200.0).bfloat16()
    table = torch.arange(40, dtype=torch.int32)[None]
    context = PagedContext(
        *(k_cache, v_cache, 1.0, 1.0, table),
        *(torch.tensor([640]).int(), torch.tensor([0, 1]).int(), 1.0),
    )
    out = native.paged_attention(q, context)
    assert torch.equal(out[0, 0], v_cache[37, 3, 0])


@NATIVE
def test_wide_heads_and_wide_groups_go_to_torch() -> None:
    for heads, head_dim in ((1, 320), (40, 16)):
        q = torch.randn(2, heads, head_dim).bfloat16()
        cache = torch.randn(1, 16, 1, head_dim).bfloat16()
        rest = (1.0, 1.0, torch.zeros(1, 1).int(), torch.tensor([9]).int())
        starts = torch.tensor([0, 2]).int()
        context = PagedContext(cache, cache, *rest, starts, 0.1)
        out = native.paged_attention(q, context)
        assert torch.equal(out, reference.paged_attention(q, context))
