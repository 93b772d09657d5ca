"""The report: whole, self-contained, and honest about what is absent."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from halfbyte.card import report
from halfbyte.card.facts import compare_arms, read_arm, spans
from halfbyte.card.plots import LabelledInterval, intervals, shares
from halfbyte.card.report import render_report
from halfbyte.errors import UsageError
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import (
    FORMAT,
    GradedAttempt,
    RunRecord,
    record_row,
    write_run,
)
from halfbyte.json_lines import JsonLines

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)


def write_arm(folder: Path, arm: str, right: int, name: str = "ifbench") -> Path:
    """Twenty answers, the first `right` of them right, one truncated."""
    records = [
        GradedAttempt(
            f"{arm}-run", arm, name, "p", "h", f"i{i}", f"i{i}", "<b>&law" if i % 2 else "math",
            0, 1, f"<script>alert({i})</script> answer of {arm}", "", "stop", 5, 7, 2, 0.5, "A",
            "B", float(i < right), "ok" if i < right else ("length" if i == 19 else "wrong"), {},
            None, 0,
        )
        for i in range(20)
    ]  # fmt: skip
    journal = JsonLines(folder / arm / name / "samples.jsonl")
    for one in records:
        journal.append(record_row(one))
    journal.close()
    identity = {
        "name": name, "title": "IFBench", "full_items": 300, "prompt_id": "p",
        "prompts_sha256": "h", "scorer": "s", "source": "allenai/IFBench_test", "licence": "ODC",
        "notes": ["20 of 300 items"], "max_tokens": 9,
        "provenance": {"source": "kept", "revision": None, "sha256": {"f": "ab" * 32}, "note": ""},
    }  # fmt: skip
    expected = [(r.item_id, 0) for r in records]
    result = summarise(
        identity, records, expected=expected, partial=False, has_groups=False, wall_s=2.0
    )
    settings = {
        "temperature": 0.7, "top_p": 0.95, "reasoning_effort": "high", "max_tokens": 9,
    }  # fmt: skip
    run = RunRecord(
        FORMAT, f"{arm}-run", arm, "model<>", "u", {}, {}, settings, None, None, {}, "x86",
        "halfbyte evaluate", "then", "now", {name: result},
    )  # fmt: skip
    write_run(folder / arm / "run.json", run)
    return folder / arm


@pytest.fixture
def page(tmp_path: Path) -> str:
    arms = [read_arm(write_arm(tmp_path, name, n)) for name, n in (("fp8", 12), ("mixed", 9))]
    return render_report(arms, compare_arms(arms))


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"""(src|href)\s*=|@import|url\(|<script""", page)


def test_answers_cannot_inject_markup(page: str) -> None:
    assert "&lt;script&gt;alert(9)&lt;/script&gt;" in page
    assert "&lt;b&gt;&amp;law" in page
    assert "model&lt;&gt;" in page


def test_page_says_what_was_not_measured_and_what_cannot_be_concluded(page: str) -> None:
    assert page.count("not measured") >= 12  # six of the seven benchmarks, both arms
    assert "neither equality nor a loss has been shown" in page
    assert "would decide" in page
    for number in ("60.00", "45.00", "-15.00", "20 of 300"):
        assert number in page


@pytest.mark.parametrize(
    "kind, said",
    [
        ("GO", "A loss larger than the margin is ruled out on IFBench."),
        ("NO-GO", "A loss larger than the margin is shown on IFBench."),
        ("loss shown", "On IFBench a loss is shown, but not whether it is larger than the margin."),
        ("too wide", "neither equality nor a loss has been shown."),
        ("blocked", "On IFBench no verdict may be read; the reason stands in the table below."),
    ],
)
def test_the_conclusion_says_what_the_verdict_says(tmp_path: Path, kind: str, said: str) -> None:
    arms = [read_arm(write_arm(tmp_path, name, 12)) for name in ("fp8", "mixed")]
    comparison = compare_arms(arms)
    assert comparison is not None
    given: dict[str, Any] = (
        {"verdict": kind, "reason": ""}
        if "GO" in kind
        else {"verdict": "INCONCLUSIVE", "reason": kind}
    )
    rows = {name: replace(row, **given) for name, row in comparison.benchmarks.items()}
    page = render_report(arms, replace(comparison, benchmarks=rows, **given))
    conclusion = re.sub(r"<[^>]+>", " ", page.partition("<h2>Accuracy")[0])
    assert said in conclusion
    verdict = given["verdict"]
    assert f'<p><span class="verdict {verdict}">{verdict}</span>' in page
    others = {"ruled out", "is shown on", "a loss is shown", "neither", "no verdict may"}
    assert sum(text in conclusion for text in others) == 1
    assert "its margin is 1.0." in conclusion


def test_a_checkpoints_note_is_printed_once_above_the_scores(tmp_path: Path) -> None:
    arms = [read_arm(write_arm(tmp_path, name, n)) for name, n in (("fp8", 12), ("mixed", 9))]
    note = {"note": "an untrained <tower>"}
    noted = [replace(arm, run=replace(arm.run, checkpoint=note)) for arm in arms]
    for given in (noted, noted[:1]):
        page = render_report(given, compare_arms(given))
        assert page.count("<b>Note:</b> an untrained &lt;tower&gt;.") == 1
        assert page.index("an untrained") < page.index("<h2>Accuracy")
    assert "<b>Note:" not in render_report(arms, compare_arms(arms))


def test_truncated_answers_are_shown_beside_accuracy(page: str) -> None:
    assert "truncated" in page and "unextracted" in page
    assert re.search(r'class="share length"[^>]*><title>length 5.0 %', page)


def test_answers_of_gated_items_are_not_shown(tmp_path: Path) -> None:
    arms = [
        read_arm(write_arm(tmp_path, name, n, name="gpqa_diamond"))
        for name, n in (("fp8", 12), ("mixed", 9))
    ]
    page = render_report(arms, compare_arms(arms))
    assert "answer of" not in page
    assert "the authors ask" in page


def test_one_run_alone_makes_a_report_and_three_do_not(tmp_path: Path) -> None:
    arms = [read_arm(write_arm(tmp_path, name, 5)) for name in "abc"]
    assert "Difference</h2>" not in render_report(arms[:1], compare_arms(arms[:1]))
    with pytest.raises(UsageError, match="3 runs"):
        compare_arms(arms)


def test_plots_survive_missing_ends_and_equal_values() -> None:
    nan = float("nan")
    text = intervals(
        [LabelledInterval("a", nan, 1.0, nan, ""), LabelledInterval("b", 1.0, 1.0, 1.0, "")],
        title="t",
        unit="u",
    )
    assert "nan" not in text
    assert intervals([], title="t", unit="u") == ""
    assert "nan" not in shares([("x", [("ok", 0.0)])], title="t")


def test_an_a_a_page_says_whether_the_seeds_differ(tmp_path: Path) -> None:
    folders = [write_arm(tmp_path, name, 12) for name in ("fp8", "again")]
    arms = [read_arm(folder) for folder in folders]
    comparison = compare_arms(arms)
    assert comparison is not None
    same = replace(comparison, is_a_a=True)
    assert "A/A run with the same seeds" in render_report(arms, same)
    shifted = replace(same, seed_shifts=[0, 1])
    assert "A/A run, which shows the noise floor" in render_report(arms, shifted)
    assert "A/A run" not in render_report(arms, comparison)


def test_spans() -> None:
    assert spans([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"
    assert spans([]) == ""


def test_incomplete_arm_is_named_as_such(tmp_path: Path) -> None:
    folder = write_arm(tmp_path, "fp8", 12)
    arm = read_arm(folder)
    result = replace(
        arm.run.benchmarks["ifbench"], status="incomplete", score=None, reason="2 are missing"
    )
    run = replace(arm.run, benchmarks={"ifbench": result})
    page = render_report([replace(arm, run=run)], None)
    assert "incomplete" in page and "2 are missing" in page
    json.dumps(page)


def test_every_note_says_whose_it_is(tmp_path: Path) -> None:
    """The same note of both arms stands once, one of a single arm with its name."""
    arms = [read_arm(write_arm(tmp_path, "fp8", 12)), read_arm(write_arm(tmp_path, "mixed", 10))]
    for arm in arms:
        result = arm.run.benchmarks["ifbench"]
        noted = replace(result, notes=("common",), reason=f"reason of {arm.run.arm}")
        arm.run.benchmarks["ifbench"] = noted  # type: ignore[index]
    notes = report._score_notes(arms)
    assert notes == [
        "IFBench, both arms: common",
        "IFBench, fp8: reason of fp8",
        "IFBench, mixed: reason of mixed",
    ]
    assert report._score_notes(arms[:1]) == ["IFBench, fp8: common", "IFBench, fp8: reason of fp8"]


def test_items_are_told_by_revision_content_or_file(tmp_path: Path) -> None:
    arm = read_arm(write_arm(tmp_path, "fp8", 12))
    result = arm.run.benchmarks["ifbench"]
    for known, said in (
        ({"revision": "r9"}, "r9"),
        ({"revision": None, "checked": "all 300"}, "by content (all 300)"),
        ({"revision": None, "checked": ""}, "none; by hash of the files"),
    ):
        told = replace(result, provenance=known)
        arm.run.benchmarks["ifbench"] = told  # type: ignore[index]
        assert said in report._asked(arm).rows[0]


def test_plots_show_their_numbers_to_whoever_points_at_them(page: str) -> None:
    dots = re.findall(r"<circle[^>]*>(<title>[^<]+</title>)?", page)
    assert dots and all(dots)


def test_wide_things_scroll_in_boxes_of_their_own_and_print_whole(page: str) -> None:
    assert page.count("<svg") == len(re.findall(r'<div class="scroll">\s*<svg', page))
    assert "@media print" in page and "details-content" in page
