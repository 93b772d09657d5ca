"""Volume from the 26 rows: any count, seeded, still rows that the template takes."""

import json
from itertools import islice
from pathlib import Path

import pytest

from halfbyte.calibrate.blend import Blend, Source
from halfbyte.calibrate.draw import draw
from halfbyte.calibrate.recombine import recombined_rows
from halfbyte.calibrate.rows import parse_row
from halfbyte.errors import UsageError

ROWS = Path(__file__).parent.parent / "data" / "calibrate"


def _rows() -> list[dict[str, object]]:
    return [
        json.loads(line)
        for path in sorted(ROWS.glob("*.jsonl"))
        if "mixed" not in path.name
        for line in path.read_text("utf-8").splitlines()
    ]


def test_a_made_row_depends_on_its_number_and_the_seed_only() -> None:
    few = list(recombined_rows(_rows(), 5, seed=3))
    many = list(islice(recombined_rows(_rows(), 5000, seed=3), 5))
    assert few == many
    assert few != list(recombined_rows(_rows(), 5, seed=4))


def test_made_rows_are_many_and_different() -> None:
    rows = [json.dumps(row["messages"]) for row in recombined_rows(_rows(), 400, seed=0)]
    assert len(set(rows)) > 300
    for row in recombined_rows(_rows(), 50, seed=0):
        parse_row(row)


def test_a_blend_of_made_rows_fills_any_count(tekken: Path) -> None:
    source = Source(path="science*", recombine=300, name="volume")
    blend = Blend("volume", [source], samples=250, tokens_per_sample=64, folder=ROWS)
    data = draw(blend, tekken)
    assert len(data.rows) == 250
    assert len(set(data.rows)) > 100
    assert data.rows == draw(blend, tekken).rows


def test_nothing_cannot_be_recombined() -> None:
    with pytest.raises(UsageError, match="no usable row"):
        next(recombined_rows([{}], 1, seed=0))
