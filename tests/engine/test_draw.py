import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine.draw import IMPOSSIBLE, invert, ranked, ranked_by_key

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
