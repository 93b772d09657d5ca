"""A figure keeps its number: text is made of it in one place, and a record gives it back whole."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.bench.cpu_decode import cpu_figures
from halfbyte.bench.gpu import engine_figures
from halfbyte.bench.serving import serving_figures
from halfbyte.cli.demo_steps import demo_figures
from halfbyte.errors import CheckpointError
from halfbyte.figures import (
    Against,
    Figure,
    Topic,
    Unit,
    figure_fields,
    number,
    parse_record,
    read_record,
)

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**12), 10**12)
figures = st.builds(
    Figure,
    st.text(),
    numbers,
    st.sampled_from(get_args(Unit)),
    st.sampled_from(get_args(Topic)),
    st.dictionaries(st.text(), st.text() | numbers, max_size=3),
    st.lists(st.builds(Against, st.text(), numbers, st.booleans()), max_size=2).map(tuple),
    st.booleans(),
)


@given(st.lists(figures, max_size=4))
def test_a_record_gives_back_the_very_figures(given_figures: list[Figure]) -> None:
    text = json.dumps({"figures": [figure_fields(figure) for figure in given_figures]})
    assert parse_record(json.loads(text)).figures == tuple(given_figures)


@given(figures)
def test_every_figure_can_be_written(figure: Figure) -> None:
    assert figure.value_text and isinstance(figure.against_text + figure.conditions_text, str)


@given(st.floats(1e-6, 1e9) | st.integers(1, 10**9))
def test_three_digits_are_right_and_whole_numbers_exact(value: float) -> None:
    shown = float(number(value).replace(",", ""))
    assert shown == value if value == round(value) else math.isclose(shown, value, rel_tol=0.005)


@pytest.mark.parametrize(
    ("value", "text"),
    [(20.948, "20.9"), (4336.2, "4,336"), (0.09326, "0.0933"), (0, "0"), (8192, "8,192"),
     (1.652, "1.65"), (-3.25, "-3.25"), (99.96, "100.0")],
)  # fmt: skip
def test_numbers_as_pages_show_them(value: float, text: str) -> None:
    assert number(value) == text


GOOD: dict[str, Any] = {"name": "decode", "value": 1, "unit": "ms", "topic": "decode"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD | {"unit": "furlongs"}, r"figures\[1\]\.unit is 'furlongs'"),
        (GOOD | {"topic": None}, r"figures\[1\]\.topic is None"),
        (GOOD | {"value": "1"}, r"value is '1'; it must be a finite number"),
        (GOOD | {"value": True}, "must be a finite number"),
        (GOOD | {"value": math.inf}, "must be a finite number"),
        (GOOD | {"colour": "red"}, "unknown fields: colour"),
        (GOOD | {"conditions": {"batch": [1]}}, "object of texts and numbers"),
        (GOOD | {"conditions": []}, "object of texts and numbers"),
        (GOOD | {"against": {"what": "x", "value": 1}}, "against is .* must be a list"),
        (GOOD | {"against": [{"what": "x"}]}, r"against\[0\] lacks value"),
        ({"name": "decode"}, "lacks value, unit, topic"),
        ("decode", "must be an object"),
    ],
)
def test_what_is_no_figure_is_named(row: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_record({"figures": [GOOD, row]})


def test_figures_in_our_records_are_those_of_their_results() -> None:
    """What a page shows and the raw results beside it cannot drift apart."""
    made: dict[str, Callable[[Mapping[str, Any]], list[Figure]]] = {
        "cpu_decode": lambda r: cpu_figures(r["tokens_per_s"], "halfbyte mixed"),
        "demo": lambda r: demo_figures(r["summary"]),
        "engine-h100": engine_figures,
        "engine-h200": engine_figures,
        "engine-h200-nvfp4": engine_figures,
        "engine-h200-per-token": engine_figures,
        "serving": lambda r: serving_figures(r, r["streams"]),
    }
    for name, make in made.items():
        record = read_record(RECORDS / f"{name}.json")
        assert list(record.figures) == make(record.results), name
