"""Records of kernels say in figures what their rows hold, each product and batch once."""

import json
from pathlib import Path

import pytest

from halfbyte.bench.gpu import kernel_figures
from halfbyte.figures import read_record

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"


@pytest.mark.parametrize("name", ["kernels-h100", "kernels-h200"])
def test_a_record_has_the_figures_of_its_rows(name: str) -> None:
    record = read_record(RECORDS / f"{name}.json")
    assert list(record.figures) == kernel_figures(record.results)
    products = {(row["linear"], row["format"], row["tokens"]) for row in record.results["rows"]}
    assert len(record.figures) == len(products) > 0
    ceiling = record.results["ceilings"]["copy_tb_per_s"]
    assert all(figure.against[0].value == ceiling for figure in record.figures)


def test_the_fastest_block_shape_counts() -> None:
    rows = [
        {"linear": "o", "format": "fp8", "tokens": 1, "block": str(rate), "tb_per_s": rate}
        for rate in (1.0, 3.0, 2.0)
    ]
    results = json.loads(json.dumps({"ceilings": {"copy_tb_per_s": 4.0}, "rows": rows}))
    [figure] = kernel_figures(results)
    assert figure.value_text == "3 TB/s" and "0.75x" in figure.against_text
