"""The budget: first the layer, then the next one, then activations; refused if too small."""

from dataclasses import replace

import pytest

from halfbyte.errors import CapacityError
from halfbyte.model.tiny import tiny_config
from halfbyte.quantize import memory
from halfbyte.quantize.memory import Sums, gpu_layer_bytes, layer_peak_bytes, plan_memory, sums_of

GIB = 1 << 30
# Mistral Medium 3.5: the real widths.
MEDIUM = replace(
    tiny_config().text,
    num_layers=88,
    width=12288,
    num_heads=96,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=28672,
    vocab_size=131072,
)


def test_twelve_gib_hold_a_layer_of_the_real_model_and_the_next_one() -> None:
    plan = plan_memory(
        MEDIUM,
        longest_row_tokens=2048,
        activation_bytes=128 * 2048 * 12288 * 2,
        budget_bytes=12 * GIB,
    )
    assert plan.peak_bytes <= 12 * GIB
    assert plan.prefetch and not plan.activations_in_memory


def test_the_number_of_layers_costs_no_memory() -> None:
    assert layer_peak_bytes(MEDIUM, 2048) == layer_peak_bytes(replace(MEDIUM, num_layers=3), 2048)


def test_prefetching_comes_before_activations() -> None:
    plans = [
        plan_memory(
            MEDIUM, longest_row_tokens=512, activation_bytes=3 * GIB, budget_bytes=gib * GIB
        )
        for gib in (6, 11, 16)
    ]
    spent = [(plan.prefetch, plan.activations_in_memory) for plan in plans]
    assert spent == [(False, False), (True, False), (True, True)]
    assert [plan.peak_bytes <= gib * GIB for plan, gib in zip(plans, (6, 11, 16), strict=True)]


def test_a_budget_below_one_layer_is_refused_with_the_need() -> None:
    with pytest.raises(CapacityError, match=r"one decoder layer takes \d"):
        plan_memory(MEDIUM, longest_row_tokens=512, activation_bytes=0, budget_bytes=2 * GIB)
    free = plan_memory(MEDIUM, longest_row_tokens=512, activation_bytes=0, budget_bytes=None)
    assert free.peak_bytes > 2 * GIB


SMALL = replace(
    tiny_config().text, num_layers=1, width=64, num_heads=4, num_kv_heads=2, head_dim=16,
    mlp_width=160, vocab_size=100,
)  # fmt: skip
# By hand, bf16: q and o 64 x 64, k and v 32 x 64, gate, up and down 160 x 64.
ATTENTION, MLP = 2 * (2 * 64 * 64 + 2 * 32 * 64), 2 * 160 * 64
# A token: 16 B a value of the width, 12 of q and so on, 24 of the MLP's hidden state.
TOKEN = 16 * 64 + 12 * 64 + 24 * 160


def test_a_layer_takes_what_is_loaded_or_what_runs() -> None:
    """Beside what it costs whatever the width, which the difference of two counts leaves out."""
    few, many = (layer_peak_bytes(SMALL, tokens) for tokens in (1000, 3000))
    assert many - few >= 2000 * TOKEN
    idle = layer_peak_bytes(SMALL, 0)
    loading = ATTENTION + 3 * 2 * MLP
    assert idle >= max(loading, ATTENTION + 3 * MLP)
    wider = replace(SMALL, mlp_width=320)
    assert layer_peak_bytes(wider, 0) - idle == 3 * 2 * MLP


def test_a_gpu_holds_a_layer_its_rows_and_what_is_loaded() -> None:
    work, ahead = gpu_layer_bytes(SMALL, 100_000)
    layer = ATTENTION + 3 * MLP
    gaps = ahead / (layer + 2 * MLP)
    assert 1.0 <= gaps < 1.5  # of an allocator
    assert work == pytest.approx(gaps * (layer + 100_000 * TOKEN), rel=1e-4)
    # Without rows nothing runs and nothing is read ahead.
    alone, none = gpu_layer_bytes(SMALL, 0)
    assert none == 0 and alone >= 4 * 2 * MLP


@pytest.mark.parametrize("budget_gib", [None, 24, 48])
def test_gptq_takes_many_rows_at_once_where_a_gpu_has_room(budget_gib: int | None) -> None:
    def peak(sums: Sums) -> int:
        plan = plan_memory(
            MEDIUM,
            longest_row_tokens=2048,
            activation_bytes=0,
            budget_bytes=12 * GIB,
            on_gpu=True,
            gpu_budget_bytes=None if budget_gib is None else budget_gib * GIB,
            sums=sums,
        )
        assert plan.gpu_peak_bytes is not None
        assert budget_gib is None or plan.gpu_peak_bytes <= budget_gib * GIB
        return plan.gpu_peak_bytes

    few = sums_of((MEDIUM.width, MEDIUM.mlp_width))
    largest = MEDIUM.width * MEDIUM.mlp_width
    has_many = peak(few) > peak(Sums()) + 8 * 4 * largest
    assert has_many == (budget_gib != 24)


@pytest.mark.parametrize("available", [None, GIB, 100 * GIB])
def test_without_a_budget_three_quarters_of_what_is_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: int | None
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    least = plan_memory(MEDIUM, longest_row_tokens=0, activation_bytes=0, budget_bytes=None)
    plan = plan_memory(MEDIUM, longest_row_tokens=512, activation_bytes=20 * GIB, budget_bytes=None)
    # A layer is always held; what would be kept beside it must fit in three quarters.
    assert plan.peak_bytes >= least.peak_bytes
    assert plan.activations_in_memory == plan.prefetch == (available == 100 * GIB)
