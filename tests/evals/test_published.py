"""Whose items a folder holds: all of a set, a part of it, or others."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evals.tasks import gpqa, mmlu_pro
from halfbyte.evals.tasks import published as subject
from halfbyte.evals.tasks.aime import BENCHMARK as AIME
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.data import Provenance
from halfbyte.evals.tasks.gpqa import BENCHMARK as GPQA
from halfbyte.evals.tasks.published import (
    NOT_COMPARED,
    Published,
    compared,
    content_hash,
    published,
)

LOCAL = Provenance("somebody's/folder", None, {})
SET = [content_hash(f"question {n}", n) for n in range(30)]


@given(st.text(), st.text())
def test_layout_of_an_item_does_not_matter_and_its_words_do(text: str, other: str) -> None:
    spread = "  ".join(f"${c}\n" for c in text)
    assert content_hash(spread, 1) == content_hash(text, 1)
    words = ["".join(c for c in t.casefold() if c.isalnum()) for t in (text, other)]
    assert (content_hash(text) == content_hash(other)) == (words[0] == words[1])
    assert content_hash(text, "x") != content_hash(text + "x")


def found_in(known: Published, hashes: list[str]) -> Provenance:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "published", lambda _: known)
        return compared(LOCAL, "any", hashes)


@given(st.sets(st.integers(0, 29)), st.integers(0, 40))
def test_a_set_is_told_item_by_item(taken: set[int], foreign: int) -> None:
    hashes = [SET[n] for n in taken] + [content_hash("made up", n) for n in range(foreign)]
    found = found_in(Published(30, frozenset(SET), 30), hashes)
    if foreign:
        assert f"other than published: {foreign} of {len(hashes)} items" in found.note
        assert not found.checked
    elif len(taken) < 30:
        assert found.note == f"part of the published items: {len(taken)} of 30"
    else:
        assert (found.note, found.checked) == ("", "all 30")


@given(st.lists(st.integers(0, 29), min_size=1, max_size=60))
def test_one_item_asked_again_and_again_is_no_part_of_a_set(asked: list[int]) -> None:
    found = found_in(Published(30, frozenset(SET), 30), [SET[n] for n in asked])
    if (different := len(set(asked))) < len(asked):
        assert (
            found.note == f"other than published: {len(asked)} items, of which {different} differ"
        )
    else:
        assert found.checked


# 400 items, of which two pairs say the same, and at most eight of which authors may have corrected.
BIG = [content_hash("big", n) for n in range(398)]
CORRECTED = Published(400, frozenset(BIG), 398, changing=8)


@given(st.integers(0, 20), st.integers(0, 396))
def test_a_few_corrected_items_are_counted_and_do_not_make_another_set(
    other: int, missing: int
) -> None:
    whole = [*BIG, *BIG[:2]]
    hashes = [content_hash("corrected", n) for n in range(other)] + whole[other + missing :]
    found, count = found_in(CORRECTED, hashes), len(hashes)
    if other > min(8, count // 50):
        assert found.note == f"other than published: {other} of {count} items are not of the set"
        assert not found.checked
    elif missing:
        assert found.note.startswith("part of the published items: ")
    else:
        assert not found.note
        assert found.checked == (f"{400 - other} of 400" if other else "all 400")


def test_more_items_than_published_are_another_set() -> None:
    added = [*BIG, *BIG[:2], *(content_hash("added", n) for n in range(3))]
    assert found_in(CORRECTED, added).note == "other than published: 403 items, not 400"


def test_a_note_of_the_files_is_kept_and_a_pinned_revision_is_not_doubted() -> None:
    noted = Provenance("folder", None, {}, note="made up for tests")
    assert compared(noted, "aime2025", SET).note.startswith("made up for tests; other")
    pinned = Provenance("hub", "abc", {})
    assert compared(pinned, "aime2025", SET) is pinned


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
    assert note == "other than published: 4 items, of which 1 differ"


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
    assert (found.note, found.checked) == (NOT_COMPARED, "")
    few = GPQA.load(made_up_gpqa(tmp_path / "few", 4)).provenance
    assert few.note == f"4 of 198 items, {NOT_COMPARED}"
    many = GPQA.load(made_up_gpqa(tmp_path / "many", 448)).provenance
    assert many.note == "other than published: 448 items, not 198"
    # The file that is published is known by its hash, whatever stands in it.
    (digest,) = found.sha256.values()
    by_file = Published(198, frozenset(), 198, files=frozenset({digest}))
    monkeypatch.setattr(subject, "published", lambda _: by_file)
    known = GPQA.load(options).provenance
    assert (known.note, known.checked) == ("", "the published file")
    (tmp_path / "a/gpqa_diamond/more.jsonl").write_text("")  # a second file is not that file
    assert GPQA.load(options).provenance.note == NOT_COMPARED
    (tmp_path / "a/gpqa_diamond/more.jsonl").unlink()
    # Once hashes are made from a copy of the set, each item is told by them.
    lines = (tmp_path / "a/gpqa_diamond/items.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    by_item = Published(198, frozenset(map(gpqa.content, rows)), 198)
    monkeypatch.setattr(subject, "published", lambda _: by_item)
    assert GPQA.load(options).provenance.checked == "all 198"
    other = made_up_gpqa(tmp_path / "b", 198, "Which other?")
    assert GPQA.load(other).provenance.note.startswith("other than published: 198 of 198")


def test_what_is_known_of_the_sets_is_hashes_alone() -> None:
    sizes = {"aime2025": 30, "aa_lcr": 100, "scicode": 80, "mmlu_pro": 12_032, "mmmu_pro": 1_730}
    for name, size in sizes.items():
        known = published(name)
        assert known.of == size and len(known.items) == known.distinct <= size
        assert all(len(item) == 12 and int(item, 16) >= 0 for item in known.items)
        assert known.changing <= size // 50
    # The authors' 159 double questions of health and law.
    assert 12_032 - published("mmlu_pro").distinct == 159
    private = published("gpqa_diamond")
    assert private.of == 198 and not private.items and len(private.files) == 1


def test_questions_of_the_real_set_are_known_and_changed_ones_are_not() -> None:
    here = Path(__file__).parents[1] / "data" / "evals" / "mmlu_pro" / "items.jsonl"
    rows = [json.loads(line) for line in here.read_text().splitlines()]
    known = published("mmlu_pro")
    assert rows and all(mmlu_pro.content(row) in known.items for row in rows)
    other = [{**row, "answer": "A" if row["answer"] != "A" else "B"} for row in rows]
    assert not any(mmlu_pro.content(row) in known.items for row in other)
