"""The command that answers held-out items with the engine and records what was right."""

import json
from pathlib import Path

import pytest
from pocket.evaluate import main

MODEL = Path(__file__).resolve().parents[2] / "pocket" / "model"


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_record_says_what_was_right_and_in_which_cache(cache: str, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    main([str(MODEL), f"--out={out}", "--items=3", "--kinds=languages", f"--kv-cache={cache}"])
    record = json.loads(out.read_text())
    assert record["kv_cache"] == {"auto": "bf16", "fp8": "fp8"}[cache]
    found = record["kinds"]["languages"]
    assert found["n"] == 3 and found["right"] >= 2
    assert found["by_effort"] == {"none": {"n": 3, "right": found["right"]}}
