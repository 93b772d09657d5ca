"""The command that compares arms item by item."""

import json
from pathlib import Path

import pytest
from pocket.arms import against, main

MODEL = Path(__file__).resolve().parents[2] / "pocket" / "model"


def test_an_arm_is_compared_item_by_item_with_the_first() -> None:
    baseline = {"hard": [1, 1, 1, 0, 1, 1, 1, 1]}
    (row,) = against(baseline, {"hard": [1, 0, 0, 1, 1, 1, 1, 1]}).values()
    assert (row["items"], row["right"], row["lost"], row["won"]) == (8, 6, 2, 1)
    mean, low, high = row["difference"]
    assert mean == -12.5 and low < mean < high
    assert against(baseline, baseline)["hard"]["difference"][0] == 0


def test_a_record_holds_every_arm(tmp_path: Path) -> None:
    other = tmp_path / "again"
    other.symlink_to(MODEL)
    out = tmp_path / "record.json"
    main([str(MODEL), str(other), "--items", "instructions=4", "hard=2", f"--out={out}"])
    arms = json.loads(out.read_text())["arms"]
    assert list(arms) == ["model", "again"] and arms["model"] == arms["again"]
    assert arms["model"]["instructions"]["items"] == 4
    assert arms["model"]["hard"]["right"] == 2


@pytest.mark.parametrize("wrong", ["poetry=3", "hard", "hard=many"])
def test_kinds_that_are_none_are_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(MODEL), "--items", wrong, "--out=x.json"])
    assert "is no KIND=ITEMS of knowledge, hard" in capsys.readouterr().err
