"""Margins say where they came from; a further look is planned or made with fresh repeats."""

import json
from pathlib import Path

import pytest

from evals.test_compare import all_right, grid, write_arm
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.evals.config import (
    JudgeConfig,
    RunConfig,
    RunSampling,
    differing,
    differing_judges,
    seed_for,
)
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.judging.comparison import write_comparison
from halfbyte.evals.judging.looks import (
    Margin,
    margin_of,
    next_look,
    parse_margins,
    read_comparison,
)
from halfbyte.evals.judging.render import format_comparison

THIRD_OF_FIVE = {"number": 3, "planned": 5, "level": 0.01}


def arms(folder: Path, items: int, shift: int = 0, lost: int = 0) -> tuple[Path, Path]:
    settings = {"temperature": 0.7, **({"seed_shift": shift} if shift else {})}
    worse = grid(items, 1, lambda i, r: float(i >= lost))
    return (
        write_arm(folder, f"b{shift}", all_right(items), settings=settings),
        write_arm(folder, f"c{shift}", worse, settings=settings),
    )


def compared(folder: Path, name: str, pair: tuple[Path, Path], **options: object) -> Path:
    file = folder / f"{name}.json"
    write_comparison(file, compare_runs(*pair, **options))  # type: ignore[arg-type]
    return file


def test_margins_record_where_they_came_from(tmp_path: Path) -> None:
    pair = arms(tmp_path, 400)
    assert compare_runs(*pair).benchmarks["gpqa_diamond"].margin_origin == "default"
    file = tmp_path / "margins.yaml"
    file.write_text("gpqa_diamond: 2.0\nmacro: 3\n")
    given = parse_margins([], file)
    assert given == {"gpqa_diamond": Margin(0.02, "file"), "macro": Margin(0.03, "file")}
    comparison = compare_runs(*pair, given)
    assert comparison.benchmarks["gpqa_diamond"].margin_origin == "file"
    assert (comparison.macro_margin, comparison.macro_margin_origin) == (0.03, "file")
    assert compare_runs(*pair).macro_margin_origin == "default"
    # The mean's margin is one like the others: given with the comparison, it is shown as that.
    flagged = compare_runs(*pair, parse_margins(["macro=50"], None))
    assert "50.0 (flag)" in format_comparison(flagged)
    # A flag comes last, and is named as one.
    assert parse_margins(["gpqa_diamond=1.5"], file)["gpqa_diamond"] == Margin(0.015, "flag")


def test_margins_nobody_gave_are_those_of_the_documentation() -> None:
    shown = {name: 100 * margin_of(name, {}).value for name in ("gpqa_diamond", "macro", "own")}
    assert shown == {"gpqa_diamond": 1.0, "macro": 1.0, "own": 1.5}


def test_a_margin_for_nobody_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(path) for path in arms(tmp_path, 40)]
    assert main(["compare-evals", *pair, "--margin", "gpqa=2"]) == 2
    error = capsys.readouterr().err
    assert "'gpqa'" in error and "gpqa_diamond, macro" in error
    assert main(["compare-evals", *pair, "--margin", "gpqa_diamond=2"]) == 3
    assert "2.0 (flag)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["gpqa", "gpqa=", "gpqa=x", "gpqa=nan", "gpqa=0", "gpqa=-1",
                                  "gpqa=101", "gpqa=inf"])  # fmt: skip
def test_what_is_no_margin_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=POINTS"):
        parse_margins([text], None)


@pytest.mark.parametrize("text", ["- 1", "gpqa: true", "gpqa: [1]", "{"])
def test_a_file_without_margins_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"m\.yaml"):
        parse_margins([], file)


def test_planned_looks_share_the_level(tmp_path: Path) -> None:
    """330 items without a change are GO at 5 %; of two planned looks each has 2.5 %."""
    once = compare_runs(*arms(tmp_path, 330))
    assert (once.look.level, once.verdict) == (0.05, "GO")
    first = compare_runs(*arms(tmp_path, 330), looks=2)
    assert (first.look.number, first.look.level, first.verdict) == (1, 0.025, "INCONCLUSIVE")
    file = compared(tmp_path, "first", arms(tmp_path, 330), looks=2)
    # More of the same items may be added: that was planned.
    second = compare_runs(*arms(tmp_path, 500), after=file)
    assert (second.look.number, second.look.level, second.verdict) == (2, 0.025, "GO")
    file = compared(tmp_path, "second", arms(tmp_path, 330), after=file)
    # What the forecasts reckon with: the level of the look to come, if there may be one.
    levels = [once.look.next_level, first.look.next_level, second.look.next_level]
    assert levels == [0.01, 0.025, None]
    middle = next_look(file, {**json.loads(file.read_text()), "look": THIRD_OF_FIVE}, {}, [0])
    assert (middle.number, middle.next_level) == (4, 0.01)
    with pytest.raises(UsageError, match="last of 2 planned looks"):
        compare_runs(*arms(tmp_path, 500), after=file)
    with pytest.raises(UsageError, match="--looks 0"):
        compare_runs(*arms(tmp_path, 330), looks=0)


def test_an_unplanned_look_needs_fresh_repeats(tmp_path: Path) -> None:
    file = compared(tmp_path, "first", arms(tmp_path, 100))
    with pytest.raises(UsageError, match="fresh repeats"):
        compare_runs(*arms(tmp_path, 1000), after=file)
    fresh = compare_runs(*arms(tmp_path, 1000, shift=7), after=file)
    assert (fresh.look.number, fresh.look.level, fresh.verdict) == (2, 0.01, "GO")
    assert fresh.look.next_level is None
    # What 5 % would pass the level that is left does not.
    assert compare_runs(*arms(tmp_path, 400, shift=7)).verdict == "GO"
    short = compared(tmp_path, "short", arms(tmp_path, 400, shift=7), after=file)
    assert json.loads(short.read_text())["verdict"] == "INCONCLUSIVE"
    with pytest.raises(UsageError, match="nobody had planned"):
        compare_runs(*arms(tmp_path, 1000, shift=8), after=short)


def test_a_look_after_a_verdict_or_with_another_margin_is_refused(tmp_path: Path) -> None:
    done = compared(tmp_path, "done", arms(tmp_path, 1000))
    with pytest.raises(UsageError, match="ended GO"):
        compare_runs(*arms(tmp_path, 1000, shift=1), after=done)
    open_ = compared(tmp_path, "open", arms(tmp_path, 100))
    with pytest.raises(UsageError, match="gpqa_diamond: 1 and 5"):
        compare_runs(*arms(tmp_path, 100, shift=1), {"gpqa_diamond": 0.05}, after=open_)
    for text in ("", "{", "no"):
        (tmp_path / "no.json").write_text(text)
        with pytest.raises(UsageError, match="cannot be read as a comparison"):
            compare_runs(*arms(tmp_path, 100, shift=1), after=tmp_path / "no.json")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UsageError, match="not what"):
        compare_runs(*arms(tmp_path, 100, shift=1), after=tmp_path / "no.json")


def test_what_an_earlier_look_asked_cannot_be_dropped(tmp_path: Path) -> None:
    first = arms(tmp_path, 100)
    for name in "bc":
        write_arm(tmp_path, f"{name}0", all_right(100), "ifbench")
    file = compared(tmp_path, "first", first)
    second = compare_runs(*arms(tmp_path, 1000, shift=1), after=file)
    assert "earlier look" in second.left_out["ifbench"]
    assert second.verdict == "INCONCLUSIVE"


def test_a_shift_changes_every_seed_and_zero_changes_none() -> None:
    names = [("pocket", f"i{i}", r) for i in range(50) for r in range(4)]
    plain = [seed_for(*name) for name in names]
    assert plain == [seed_for(*name, 0) for name in names]
    shifted = [seed_for(*name, 1) for name in names]
    assert not set(plain) & set(shifted)
    assert len(set(shifted)) == len(names)


def test_a_shift_is_part_of_a_runs_settings_but_parts_no_arms(tmp_path: Path) -> None:
    config = RunConfig(tmp_path, "a", ())
    assert "seed_shift" not in config.settings()
    assert RunConfig(tmp_path, "a", (), seed_shift=3).settings()["seed_shift"] == 3
    baseline, _ = arms(tmp_path, 400)
    again, _ = arms(tmp_path, 400, shift=3)
    comparison = compare_runs(baseline, again)
    assert list(comparison.seed_shifts) == [0, 3]


def test_settings_that_differ_are_named_and_equal_ones_are_not() -> None:
    assert differing({"a": 1, "b": 2}, {"b": 2, "a": 1}) == []
    assert differing({"a": 1, "b": 2}, {"a": 3, "b": 2}) == ["a: 1 and 3"]
    assert differing({"b": 2}, {"c": None, "a": 0}) == ["a: None and 0", "b: 2 and None"]


def test_where_a_judge_is_served_makes_no_other_judge() -> None:
    one = {"model": "q", "url": "http://a", "revision": "1"}
    assert differing_judges(one, {**one, "url": "http://b"}) == []
    assert differing_judges(one, {**one, "revision": "2"}) == ["revision: '1' and '2'"]
    assert differing_judges({}, one) == ["model: None and 'q'", "revision: None and '1'"]


def test_one_file_is_no_comparison_if_any_part_is_missing(tmp_path: Path) -> None:
    parts = {
        "look": {}, "verdict": "INCONCLUSIVE", "margins": {}, "seed_shifts": [0, 0],
        "baseline_run": "a", "candidate_run": "b",
    }  # fmt: skip
    file = tmp_path / "first.json"
    file.write_text(json.dumps(parts))
    assert read_comparison(file) == parts
    for name in parts:
        file.write_text(json.dumps({key: value for key, value in parts.items() if key != name}))
        with pytest.raises(UsageError, match="not what `halfbyte compare-evals --out` writes"):
            read_comparison(file)
    file.write_text("[]")
    with pytest.raises(UsageError, match="not what"):
        read_comparison(file)
    with pytest.raises(UsageError, match="cannot be read as a comparison"):
        read_comparison(tmp_path / "none.json")


def test_sampling_is_what_the_documentation_says() -> None:
    """docs/evaluations.md: temperature 0.7, top_p 0.95, effort high, at most 65,536 tokens."""
    plain = RunSampling()
    assert (plain.temperature, plain.top_p) == (0.7, 0.95)
    assert (plain.reasoning_effort, plain.max_tokens) == ("high", 65_536)


def test_the_record_of_a_judge_holds_no_key() -> None:
    about = JudgeConfig("http://j", "q", api_key="secret", max_tokens=5).public()
    assert "secret" not in json.dumps(about)
    assert (about["url"], about["model"], about["revision"]) == ("http://j", "q", "not stated")
    assert (about["temperature"], about["max_tokens"]) == (0.0, 5)
