"""Decode steps and prefills over every mix of formats, their kernels emulated on a CPU."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_emulation import (
    PAGE,
    PAGES,
    EmulatedLibrary,
    make_step,
    new_cache,
    put,
    use_emulation,
)
from cuda_plain import plain_hidden, plain_logits
from halfbyte.engine.graphs import HopperExecutor, make_inputs
from halfbyte.formats.nvfp4 import encode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.repack import TileFormat, tile_nvfp4, tile_rows
from halfbyte.model.cuda.launches import AllReduce, CudaModel, SharedBuffers, head_logits
from halfbyte.model.cuda.prefill import Prefill
from halfbyte.model.cuda.prefill_batch import Chunk, PrefillBatch
from halfbyte.model.cuda.weights import (
    CudaLayer,
    CudaLinear,
    CudaWeights,
)
from halfbyte.model.parallel import Solo
from halfbyte.model.rope import RotaryTable
from hopper import hopper_config

CPU = torch.device("cpu")
TEXT = hopper_config(layers=2).text
# What a product's sums are of: f64 here, f32 there, so that a bf16 value may fall to the other side
# of a tie, and an e4m3 one after it, which is 6 % of it.
BOUND = 0.12  # a scale that is left out makes 0.5 and more

Kind = str  # bf16, fp8 (static), fp8_token, nvfp4
KINDS = ("bf16", "fp8", "fp8_token", "nvfp4")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """One thread: thousands of small operations would wait for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mix(NamedTuple):
    qkv: Kind
    o: Kind
    gate_up: Kind
    down: Kind
    head: Kind


MIXES = [
    Mix("fp8", "fp8", "nvfp4", "nvfp4", "bf16"),  # as shipped
    Mix("nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4"),
    Mix("fp8_token", "fp8_token", "fp8_token", "fp8_token", "fp8_token"),
    Mix("fp8_token", "fp8_token", "nvfp4", "nvfp4", "fp8"),
    Mix("fp8", "nvfp4", "fp8_token", "fp8", "fp8_token"),
]


def made(kind: Kind, out: int, in_: int, seed: int, *, is_fast: bool) -> CudaLinear:
    """A linear of random weights, as the loader makes it; outputs are about as large as inputs."""
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(out, in_, generator=generator) / math.sqrt(in_)
    ones_O = torch.ones(out)
    if kind == "bf16":
        return CudaLinear(tile_rows(w_OI.to(torch.bfloat16), ones_O, "bf16"))
    if kind.startswith("fp8"):
        scale_O = w_OI.abs().amax(-1) / 448.0
        codes_OI = (w_OI / scale_O[:, None]).to(torch.float8_e4m3fn)
        format_: TileFormat = "fp8"
        return CudaLinear(
            tile_rows(codes_OI, scale_O, format_), None if kind == "fp8_token" else 8.0 / 448.0
        )
    codes_OI2, scale_OB, tensor_scale = encode_nvfp4(
        w_OI.to(torch.bfloat16), nvfp4_tensor_scale(w_OI.abs().amax())
    )
    weight = tile_nvfp4(codes_OI2, scale_OB, tensor_scale * ones_O, is_fast=is_fast)
    return CudaLinear(weight, 4.0)  # extreme maxima: a power of two that must cancel


def weights_of(mix: Mix, *, is_fast: bool = False, seed: int = 0) -> CudaWeights:
    text = TEXT
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    generator = torch.Generator().manual_seed(seed)

    def norm() -> Tensor:
        return (1.0 + 0.1 * torch.randn(text.width, generator=generator)).to(torch.bfloat16)

    def linear(kind: Kind, out: int, in_: int, place: int) -> CudaLinear:
        return made(kind, out, in_, seed * 1000 + place, is_fast=is_fast)

    def layer(index: int) -> CudaLayer:
        return CudaLayer(
            norm(),
            linear(mix.qkv, query + 2 * kv, text.width, index * 4),
            linear(mix.o, text.width, query, index * 4 + 1),
            norm(),
            linear(mix.gate_up, 2 * text.mlp_width, text.width, index * 4 + 2),
            linear(mix.down, text.width, text.mlp_width, index * 4 + 3),
            k_scale=0.02,
            v_scale=0.03,
        )

    embedding = torch.randn(text.vocab_size, text.width, generator=generator).to(torch.bfloat16)
    head = linear(mix.head, text.vocab_size, text.width, 99)
    layers = tuple(layer(index) for index in range(text.num_layers))
    return CudaWeights(text, embedding, layers, norm(), head)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check_decoding(
    library: EmulatedLibrary, weights: CudaWeights, size: int, steps: int, **more: Any
) -> None:
    step = make_step(library, weights, new_cache(TEXT, size), size, **more)
    tokens = torch.randint(0, TEXT.vocab_size, (steps, size))
    with torch.inference_mode():
        for position in range(steps):
            put(step, tokens[position], position)
            step.run()
    rotary = RotaryTable(TEXT, CPU).at
    hidden_TD = step.read_hidden()
    assert hidden_TD.dtype == torch.bfloat16 and hidden_TD.shape == (size, TEXT.width)
    for row in {0, size - 1}:
        wanted_TV = plain_logits(weights, rotary, tokens[:, row])
        found_V = step._logits_TV[row, : TEXT.vocab_size]
        assert relative(found_V, wanted_TV[-1]) < BOUND
        wanted_TD = plain_hidden(weights, rotary, tokens[:, row])
        assert relative(hidden_TD[row], wanted_TD[-1]) < BOUND


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_decoding_follows_the_plain_model(
    mix: Mix, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, weights = use_emulation(monkeypatch), weights_of(mix, is_fast=is_fast)
    for size in (1, 3):
        check_decoding(library, weights, size, steps=4)


@settings(max_examples=6)
@given(
    mix=st.builds(Mix, *[st.sampled_from(KINDS)] * 5),
    is_fast=st.booleans(),
    size=st.sampled_from([1, 2, 9, 17, 33]),
    is_spread=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_mix_of_formats_decodes(
    mix: Mix, is_fast: bool, size: int, is_spread: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        library, weights = use_emulation(monkeypatch), weights_of(mix, is_fast=is_fast, seed=seed)
        # Sums over ranks of which the others give nothing.
        more = {"all_reduce": lambda tensor: None} if is_spread else {}
        check_decoding(library, weights, size, steps=2, **more)


def check_prefill(
    library: EmulatedLibrary,
    weights: CudaWeights,
    count: int,
    formats: frozenset[TileFormat] | None,
    all_reduce: AllReduce | None,
) -> None:
    cache = new_cache(TEXT, 1)
    step = make_step(library, weights, cache, 1)
    rotary = RotaryTable(TEXT, CPU).at
    model = CudaModel(library, weights, cache, rotary, SharedBuffers(), all_reduce)
    prefill = Prefill(model, 64, decoded_formats=formats)
    tokens_T = torch.randint(0, TEXT.vocab_size, (count + 1,))
    positions_T = torch.arange(count)
    slots_T = step.block_table_TP[0].long()[positions_T // PAGE] * PAGE + positions_T % PAGE
    chunk = Chunk(0, count, 0, step.block_table_TP[0])
    with torch.inference_mode():
        residual_TD = prefill.forward(
            PrefillBatch(tokens_T[:count], positions_T, slots_T, (chunk,))
        )
        found_TV = head_logits(library, weights.head, prefill.normed(residual_TD))
        put(step, tokens_T[count:], count)
        step.run()
    wanted_TV = plain_logits(weights, RotaryTable(TEXT, CPU).at, tokens_T)
    assert relative(found_TV[:, : TEXT.vocab_size], wanted_TV[:-1]) < BOUND
    assert relative(step._logits_TV[0, : TEXT.vocab_size], wanted_TV[-1]) < BOUND


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_prompt_follows_the_plain_model(
    mix: Mix, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded in the product and laid out for the library; whole and added up over ranks."""
    library, weights = use_emulation(monkeypatch), weights_of(mix, is_fast=is_fast)
    ways = product((None, frozenset()), (None, lambda tensor: None))
    for number, (formats, all_reduce) in enumerate(ways):
        check_prefill(library, weights, 5 + 7 * number, formats, all_reduce)


def test_an_executor_reads_a_prompt_and_goes_on_from_its_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What graphs are made of: prefill, rows of the inputs and head over one cache and buffers."""
    library, weights = use_emulation(monkeypatch), weights_of(MIXES[0])
    cache, rotary = new_cache(TEXT, 1), RotaryTable(TEXT, CPU).at
    inputs = make_inputs(2, PAGES, 1, CPU)
    executor = HopperExecutor(
        CudaModel(library, weights, cache, rotary, SharedBuffers()),
        inputs,
        Solo(),
        sizes=(1, 3),
        max_batch_tokens=64,
    )
    pages_P, count = torch.randperm(PAGES).int(), PAGE + 4
    tokens_T, positions_T = torch.randint(0, TEXT.vocab_size, (count + 1,)), torch.arange(count + 1)
    slots_T = pages_P.long()[positions_T // PAGE] * PAGE + positions_T % PAGE
    inputs.table[1] = pages_P
    # A row with a source takes the token that the step before chose, whatever stands beside it.
    inputs.last_tokens[0] = tokens_T[-1]
    # All rows of the step alike: what stands in one that is not set is anything, NaN included.
    row_5 = torch.tensor([0, 0, count, int(slots_T[-1]), 1])
    inputs.packed_5T[:, :3] = row_5[:, None]
    chunk = Chunk(0, count, 0, pages_P)
    with torch.inference_mode():
        batch = PrefillBatch(tokens_T[:-1], positions_T[:-1], slots_T[:-1], (chunk,))
        found_TV = executor.logits(executor.normed(executor.prefill(batch)))
        step = executor._make_step(3)
        step.run()
    wanted_TV = plain_logits(weights, rotary, tokens_T)
    assert relative(found_TV[:, : TEXT.vocab_size], wanted_TV[:-1]) < BOUND
    assert relative(step._logits_TV[0, : TEXT.vocab_size], wanted_TV[-1]) < BOUND
