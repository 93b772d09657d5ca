"""Whose items a folder holds: all of a set, a part of it, or others."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evals.tasks import gpqa
from halfbyte.evals.tasks import published as subject
from halfbyte.evals.tasks.aime import BENCHMARK as AIME
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.data import Provenance
from halfbyte.evals.tasks.gpqa import BENCHMARK as GPQA
from halfbyte.evals.tasks.published import Published, compared, content_hash, published

LOCAL = Provenance("somebody's/folder", None, {})
SET = [content_hash(f"question {n}", n) for n in range(30)]


@given(st.text(), st.text())
def test_layout_of_an_item_does_not_matter_and_its_words_do(text: str, other: str) -> None:
    spread = "  ".join(f"${c}\n" for c in text)
    assert content_hash(spread, 1) == content_hash(text, 1)
    words = ["".join(c for c in t.casefold() if c.isalnum()) for t in (text, other)]
    assert (content_hash(text) == content_hash(other)) == (words[0] == words[1])
    assert content_hash(text, "x") != content_hash(text + "x")


@given(st.sets(st.integers(0, 29)), st.integers(0, 40))
def test_a_set_that_is_known_whole_is_told_item_by_item(taken: set[int], foreign: int) -> None:
    hashes = [SET[n] for n in taken] + [content_hash("made up", n) for n in range(foreign)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "published", lambda _: Published(30, frozenset(SET)))
        found = compared(LOCAL, "any", hashes, full=30)
    if foreign:
        assert f"other than published: {foreign} of {len(hashes)} items" in found.note
        assert not found.checked
    elif len(taken) < 30:
        assert found.note == f"part of the published items: {len(taken)} of 30"
    else:
        assert (found.note, found.checked) == ("", "all 30")


@pytest.mark.parametrize(
    "read, count, said",
    [
        (range(30), 30, ""),
        (range(20), 20, "part of the published items: 20 of 30"),
        (range(5, 30), 30, "other than published"),  # whole by number, known items are missing
        (range(0), 30, "other than published: none of 10 known items"),
        (range(0), 4, "other than published: none of 10 known items"),
        (range(30), 31, "other than published"),
    ],
)
def test_a_set_that_is_known_in_part_is_told_by_that_part(
    read: range, count: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "published", lambda _: Published(30, frozenset(SET[:10])))
    hashes = [SET[n] for n in read]
    hashes += [content_hash("made up", n) for n in range(count - len(hashes))]
    found = compared(LOCAL, "any", hashes, full=30)
    assert found.note.startswith(said) and bool(found.note) == bool(said)


def test_a_note_of_the_files_is_kept_and_a_pinned_revision_is_not_doubted() -> None:
    noted = Provenance("folder", None, {}, note="made up for tests")
    assert compared(noted, "aime2025", SET, full=30).note.startswith("made up for tests; other")
    pinned = Provenance("hub", "abc", {})
    assert compared(pinned, "aime2025", SET, full=30) is pinned


def test_items_made_up_for_the_real_sets_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "aime2025").mkdir()
    row = {"problem": "What is one and one?", "answer": 2}
    (tmp_path / "aime2025" / "problems.jsonl").write_text(json.dumps(row) + "\n")
    note = AIME.load(Options(data=tmp_path)).provenance.note
    assert note == "other than published: 1 of 1 items are not of the set"
    (tmp_path / "gpqa_diamond").mkdir()
    names = (
        "Record ID",
        "Question",
        "Correct Answer",
        *(f"Incorrect Answer {n}" for n in (1, 2, 3)),
    )
    item = json.dumps({name: f"{name}?" for name in names})
    (tmp_path / "gpqa_diamond" / "items.jsonl").write_text(f"{item}\n" * 4)
    note = GPQA.load(Options(data=tmp_path)).provenance.note
    assert note == "4 items, not the published 198, and not compared with them"


def made_up_gpqa(folder: Path, count: int, question: str = "Which?") -> Options:
    """Items in GPQA Diamond's columns, as many as are asked for."""
    (folder / "gpqa_diamond").mkdir(parents=True)
    rows = [
        {
            "Record ID": f"rec{n:014}",
            "Question": question,
            "Correct Answer": "this",
            **{f"Incorrect Answer {k}": f"not this {k}" for k in (1, 2, 3)},
        }
        for n in range(count)
    ]
    (folder / "gpqa_diamond" / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Options(data=folder)


def test_as_many_items_as_published_do_not_pass_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = made_up_gpqa(tmp_path / "a", 198)
    found = GPQA.load(options).provenance
    assert (found.note, found.checked) == ("not compared by content with the published items", "")
    # Once hashes are made from a copy of the set, each item is told by them.
    lines = (tmp_path / "a/gpqa_diamond/items.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    known = Published(198, frozenset(map(gpqa.content, rows)))
    monkeypatch.setattr(subject, "published", lambda _: known)
    assert GPQA.load(options).provenance.checked == "all 198"
    other = made_up_gpqa(tmp_path / "b", 198, "Which other?")
    assert GPQA.load(other).provenance.note.startswith("other than published: 198 of 198")


def test_what_is_known_of_the_sets_is_hashes_alone() -> None:
    sizes = {"aime2025": 30, "aa_lcr": 100, "scicode": 80, "mmlu_pro": 12_032, "mmmu_pro": 1_730}
    for name, size in sizes.items():
        known = published(name)
        assert known is not None and known.of == size and 0 < len(known.items) <= size
        assert all(len(item) == 12 and int(item, 16) >= 0 for item in known.items)
    assert published("gpqa_diamond") is None
