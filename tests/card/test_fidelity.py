"""The page of a comparison: all that the record says, as it says it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.card import plots
from halfbyte.card.fidelity import render_fidelity
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.fidelity.choices import Flips
from halfbyte.fidelity.comparison import (
    FidelityComparison,
    Interval,
    ModelRow,
    PairRow,
    comparison_of,
)

BASE = ModelRow("bf16", "weight_only", 269_000_000, 24.98)
FP8 = ModelRow(
    "fp8", "weight_only", 163_000_000, 25.31, kl_mean=0.01428, kl_interval=Interval(0.0133, 0.0153),
    kl_p99=0.06, top1_agreement=0.921, kl_median=0.004, top1_agreement_unsure=0.8,
    kl_by_position={"0-1k": 0.014, "1k-8k": 0.0151}, flips=Flips(100, 50, 49, 2, 1, 3),
    log_perplexity_change=0.0131, log_perplexity_change_interval=Interval(0.0032, 0.0230),
)  # fmt: skip
MIXED = replace(FP8, name="<mixed>", kl_mean=0.0933, kl_interval=None, kl_by_position=None)
FOUND = FidelityComparison(
    BASE, (FP8, MIXED), "ab" * 32, 6, 2973, 512, "full",
    pairs=(PairRow("fp8", "<mixed>", 0.079, Interval(0.072, 0.086), 0.1, None),),
)  # fmt: skip


def test_a_record_is_read_as_it_was_written() -> None:
    told = json.loads(json.dumps(FOUND.as_dict()))
    assert comparison_of(told) == FOUND
    told["candidates"][0]["checkpoint"] = "tensors:ab"  # what the command adds
    assert comparison_of(told) == FOUND


def test_the_page_shows_every_figure_and_its_numbers_on_hover() -> None:
    page = render_fidelity(json.loads(json.dumps(FOUND.as_dict())))
    for shown in ("0.01428", "0.01330 to 0.01530", "+0.0131", "+0.0032 to +0.0230", "92.10%",
                  "+0.07900", "6 of 100 answers differ", "2,973 tokens in 6 windows"):  # fmt: skip
        assert shown in page, shown
    assert "<mixed>" not in page and "&lt;mixed&gt;" in page
    dots = re.findall(r"<circle[^>]*>(<title>[^<]+</title>)?", page)
    assert len(dots) == 6 and all(dots)
    assert page.count("<svg") == len(re.findall(r'<div class="scroll">\s*<svg', page)) == 3


def test_compares_record_becomes_a_page_by_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "near.json").write_text(json.dumps(FOUND.as_dict()))
    out = tmp_path / "pages" / "near.html"
    assert main(["report", str(tmp_path / "near.json"), "--out", str(out)]) == 0
    assert "against bf16" in out.read_text()
    (tmp_path / "speed.json").write_text('{"results": {}}')
    capsys.readouterr()
    assert main(["report", str(tmp_path / "speed.json"), "--out", str(out)]) == 2
    assert "speed.json" in capsys.readouterr().err


_JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.integers(), st.text(max_size=3), st.just([]), st.just({"a": 1})
)


@given(st.sampled_from(sorted(FOUND.as_dict())), _JUNK, st.booleans())
def test_a_damaged_record_ends_in_one_sentence(name: str, junk: Any, is_row: bool) -> None:
    told = json.loads(json.dumps(FOUND.as_dict()))
    if is_row:
        told["candidates"][0][sorted(told["candidates"][0])[len(name) % 18]] = junk
    else:
        told[name] = junk
    page, said = "", "is not a comparison as `halfbyte compare --json` writes it"
    try:
        page = render_fidelity(told)
    except UsageError as failure:
        said = str(failure)
    assert "is not a comparison as `halfbyte compare --json` writes it" in said
    assert "</html>" in page or said.startswith("record is not")


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_an_axis_has_a_few_round_ticks_at_any_size(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * abs(low) or high <= low:
        return  # closer than what digits can tell apart
    ticks = plots._ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(low - span / 100 <= tick <= high + span / 100 for tick in ticks)
