"""The command that times the engine on Pocket: what it writes, not how fast it is."""

import json
from pathlib import Path

from pocket.speed import main

MODEL = Path(__file__).resolve().parents[2] / "pocket" / "model"


def test_a_record_holds_times_alone_and_together(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    main(
        [str(MODEL), f"--out={out}", "--rounds=1", "--answer-tokens=6", "--users=3", "--threads=1"]
    )
    record = json.loads(out.read_text())
    found = record["medians"]
    assert set(found) == {
        "load_s", "prefill", "decode", "alone_per_processor_s",
        "decode_of_3", "3_with_prompts", "3_per_processor_s",
    }  # fmt: skip
    assert all(value > 0 for value in found.values())
    assert 0 <= record["others_share"] <= 1 and record["machine"]["cores"] >= 1
