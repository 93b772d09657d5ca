"""Tool calls are graded by the leaderboard's rules, case by case on made-up functions."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import bfcl as leaderboard
from halfbyte.errors import UsageError
from halfbyte.evals.grading.tool_calls import (
    Call,
    fault_of,
    grade_calls,
    read_answer,
    read_calls,
    write_answer,
)
from halfbyte.evals.tasks import bfcl
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.types import Conversation, Reply, Sample, ToolCall

MADE_UP = Path(__file__).parents[1] / "data" / "evals" / "made_up"
BENCHMARKS = {benchmark.name: benchmark for benchmark in bfcl.BENCHMARKS}
SAMPLES = {s.item_id: s for s in BENCHMARKS["bfcl"].load(Options(data=MADE_UP)).samples}


def says(*calls: tuple[str, Any], text: str = "") -> Reply:
    """A step; arguments that are no text are written as JSON."""
    return Reply(
        text,
        tuple(
            ToolCall(f"c{n}", name, given if isinstance(given, str) else json.dumps(given))
            for n, (name, given) in enumerate(calls)
        ),
    )


def is_right(sample: Sample, *calls: tuple[str, Any]) -> bool:
    return bfcl.grade(sample, write_answer([[says(*calls)]])).value == 1.0


TEA: dict[str, Any] = {"drink": "green tea", "cups": 2}
FENCE: dict[str, Any] = {"colours": ["red", "dark blue"], "size": {"height": 1.5, "length": 20}}
WALK: dict[str, Any] = {
    "start": [7.5, 47.6],
    "stops": [{"name": "Old Mill"}, {"name": "lake shore"}],
}
BREW = "kitchen_brew"


@pytest.mark.parametrize(
    ("item", "name", "arguments", "expected"),
    [
        (0, BREW, TEA, True),
        (0, BREW, {**TEA, "strength": 0.5}, True),
        (0, BREW, {**TEA, "strength": 0.25}, False),
        (0, BREW, {**TEA, "drink": "GREEN-TEA."}, True),
        (0, BREW, {**TEA, "drink": "tea,green"}, True),
        (0, BREW, {**TEA, "drink": "tea"}, False),
        (0, BREW, {**TEA, "cups": 3}, False),
        (0, BREW, {**TEA, "cups": "2"}, False),
        (0, BREW, {**TEA, "cups": 2.0}, False),  # a float is no integer
        (0, BREW, {**TEA, "cups": True}, False),
        (0, BREW, {"drink": "green tea"}, False),  # an argument that is not marked as optional
        (0, BREW, {"cups": 2}, False),
        (0, BREW, {**TEA, "milk": True}, False),
        (0, "kitchen.brew", TEA, False),  # the name that was sent has no dot
        (0, "brew", TEA, False),
        (1, "paint_fence", FENCE, True),
        (1, "paint_fence", {**FENCE, "twice": False}, True),
        (1, "paint_fence", {**FENCE, "twice": 0}, False),
        (1, "paint_fence", {**FENCE, "colours": ["RED", "dark-blue"]}, True),
        (1, "paint_fence", {**FENCE, "colours": ["dark blue", "red"]}, False),
        (1, "paint_fence", {**FENCE, "colours": ["red", 5]}, False),
        (1, "paint_fence", {**FENCE, "colours": "red, dark blue"}, False),
        (1, "paint_fence", {**FENCE, "size": {"length": 21, "height": 1.5}}, True),
        (1, "paint_fence", {**FENCE, "size": {"length": 20.0, "height": 1.5}}, True),  # inside: ==
        (1, "paint_fence", {**FENCE, "size": {"length": 22, "height": 1.5}}, False),
        (1, "paint_fence", {**FENCE, "size": {"height": 1.5}}, False),
        (1, "paint_fence", {**FENCE, "size": {**FENCE["size"], "depth": 1}}, False),
        (2, "plan_route", WALK, True),
        (2, "plan_route", {**WALK, "start": [7, 47]}, False),
        (2, "plan_route", {**WALK, "note": "Slowly!"}, False),
        (2, "plan_route", {**WALK, "note": "slowly."}, True),
        (2, "plan_route", {**WALK, "stops": WALK["stops"][::-1]}, False),
        (2, "plan_route", {**WALK, "stops": WALK["stops"][:1]}, False),
        (2, "plan_route", {**WALK, "stops": ["Old Mill", "Lake"]}, False),
    ],
)
def test_an_argument_is_right_or_wrong_as_the_rules_say(
    item: int, name: str, arguments: dict[str, Any], expected: bool
) -> None:
    sample = SAMPLES[f"simple_python_{item}"]
    assert is_right(sample, (name, arguments)) is expected
    assert not is_right(sample, (name, arguments), (name, arguments))


@pytest.mark.parametrize(
    ("options", "details", "right", "wrong"),
    [
        # Possible values of another type are names: they must be equal to the letter.
        (["today"], {"type": "integer"}, ["today"], ["Today", 1]),
        ([None, ""], {"type": "string"}, [None, ""], ["-", "None"]),
        ([True], {"type": "string"}, [True], ["true", False, 1]),
        ([3], {"type": "float"}, [3, 3.0], [4.0, "3"]),
        ([3.0], {"type": "float"}, [3, 3.0], ["3"]),
        ([""], {"type": "string"}, ["", "-"], ["x"]),
        ([], {"type": "array", "items": {"type": "string"}}, [], [[], ["x"]]),
        ([["a"], ""], {"type": "array", "items": {"type": "string"}}, [["A"], []], [["b"]]),
        ([{"a": ["x", ""]}], {"type": "dict"}, [{}, {"a": "X"}], [{"b": 1}, "a"]),
        ([[{"a": [1]}]], {"type": "array", "items": {"type": "dict"}}, [[{"a": 1}]], [[{}], []]),
        (["[1]"], {"type": "array", "items": {"type": "float"}}, ["[1]"], [[1.0], "1"]),
    ],
)
def test_unusual_possible_values(
    options: list[Any], details: dict[str, Any], right: list[Any], wrong: list[Any]
) -> None:
    document = {"name": "f", "parameters": {"properties": {"x": details}, "required": []}}

    def fault(value: Any) -> str | None:
        return fault_of(
            "simple_python", [document], [{"f": {"x": options}}], [Call("f", {"x": value})]
        )

    assert [value for value in right if fault(value) is not None] == []
    assert [value for value in wrong if fault(value) is None] == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([0, 1, 2]), st.data())
def test_no_value_of_an_argument_makes_the_grader_fail(item: int, data: st.DataObject) -> None:
    sample = SAMPLES[f"simple_python_{item}"]
    names = (BREW, "paint_fence", "plan_route")
    name, right = names[item], (TEA, FENCE, WALK)[item]
    changed = dict(right)
    changed[data.draw(st.sampled_from([*right, "more"]))] = data.draw(VALUES)
    assert isinstance(is_right(sample, (name, changed)), bool)


@pytest.mark.parametrize(
    "arguments", ["", "{", "[]", "null", '"text"', "3", "{'a': 1}", '{"a": 1}}']
)
def test_calls_whose_arguments_are_no_object_are_none(arguments: str) -> None:
    def graded(item: str) -> tuple[float | None, str]:
        score = bfcl.grade(SAMPLES[item], write_answer([[says((BREW, arguments))]]))
        return score.value, score.cause

    assert read_calls(says((BREW, TEA), (BREW, arguments))) is None
    assert graded("simple_python_0") == (0.0, "unparsed")
    assert graded("irrelevance_0") == (1.0, "ok")
    assert graded("live_relevance_0-0-0") == (0.0, "wrong")


def test_whether_anything_should_be_called_is_all_that_relevance_asks() -> None:
    call = says(("anything", {}))
    text = Reply("I have no tool for that.")
    for item, right, wrong in (
        ("irrelevance_0", text, call),
        ("live_irrelevance_0-0-0", Reply(""), call),
        ("live_relevance_0-0-0", call, text),
    ):
        assert bfcl.grade(SAMPLES[item], write_answer([[right]])).value == 1.0
        assert bfcl.grade(SAMPLES[item], write_answer([[wrong]])).value == 0.0


def test_calls_in_parallel_may_have_any_order() -> None:
    tea, coffee = (BREW, TEA), (BREW, {"drink": "coffee"})
    sample = SAMPLES["live_parallel_0-0-0"]
    assert is_right(sample, tea, coffee)
    assert is_right(sample, coffee, tea)
    assert not is_right(sample, tea, tea)
    assert not is_right(sample, tea)
    assert not is_right(sample, tea, coffee, coffee)
    fence = ("paint_fence", FENCE)
    assert is_right(SAMPLES["parallel_multiple_0"], coffee, fence)
    assert is_right(SAMPLES["multiple_0"], coffee)
    assert not is_right(SAMPLES["multiple_0"], fence)


def test_a_call_that_is_taken_is_not_given_back() -> None:
    # As the leaderboard matches: the first answer takes the first call that fits it.
    document = {
        "name": "f",
        "parameters": {"properties": {"x": {"type": "integer"}}, "required": []},
    }
    answers: list[dict[str, Any]] = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    one, two = Call("f", {"x": 1}), Call("f", {"x": 2})
    assert fault_of("parallel", [document], answers, [two, one]) is None
    assert fault_of("parallel", [document], answers, [one, two]) is not None


TEXTS = st.text(max_size=20)
STEPS = st.builds(
    Reply,
    TEXTS,
    st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(
        lambda calls: tuple(ToolCall(f"call-{n}", *call) for n, call in enumerate(calls))
    ),
)


@given(st.lists(st.lists(STEPS, max_size=3), max_size=3))
def test_a_stored_answer_reads_as_it_was_given(turns: list[list[Reply]]) -> None:
    assert read_answer(write_answer(turns)) == turns


def test_an_answer_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="no answer of tool calls"):
        read_answer('{"turn": 1}')


# --- what is asked


def test_documents_become_tools_with_types_of_json_schema() -> None:
    asked = BENCHMARKS["bfcl"].prompt(SAMPLES["simple_python_2"], (), Options())
    assert isinstance(asked, Conversation)
    assert asked.messages == (
        {"role": "user", "content": SAMPLES["simple_python_2"].fields["question"][0][0]["content"]},
    )
    function = asked.tools[0]["function"]
    assert function["description"] == "Plan a walk." + bfcl.LANGUAGE_HINT
    properties = function["parameters"]["properties"]
    assert function["parameters"]["type"] == "object"
    assert properties["start"] == {
        "type": "array", "items": {"type": "number"}, "description": "Longitude and latitude.",
    }  # fmt: skip
    assert properties["stops"]["items"]["type"] == "object"
    assert properties["stops"]["items"]["properties"] == {"name": {"type": "string"}}
    assert properties["note"]["type"] == "string"
    brew = leaderboard.as_tool(SAMPLES["simple_python_0"].fields["documents"][0])["function"]
    assert brew["name"] == "kitchen_brew"
    assert brew["parameters"]["properties"]["strength"] == {
        "type": "number", "format": "float",
        "description": "From 0 to 1. This is a float type value.",
    }  # fmt: skip


def test_a_document_is_not_changed_by_being_sent() -> None:
    document = SAMPLES["simple_python_1"].fields["documents"][0]
    before = json.dumps(document)
    assert leaderboard.as_tool(document) == leaderboard.as_tool(document)
    assert json.dumps(document) == before


def test_parts_are_the_whole_and_groups_share_what_they_tell() -> None:
    loaded = {name: b.load(Options(data=MADE_UP)).samples for name, b in BENCHMARKS.items()}
    parts = [s.item_id for name in bfcl.PARTS for s in loaded[name]]
    assert parts == [s.item_id for s in loaded["bfcl"]]
    assert {s.group for s in loaded["bfcl_multi_turn"]} == {"multi_turn_0"}
    assert leaderboard.related("live_simple_19-3-15", "live_simple") == "live_simple/3"
    assert leaderboard.related("simple_python_19", "simple_python") == "simple_python_19"


def test_made_up_items_are_told_from_published_ones() -> None:
    found = BENCHMARKS["bfcl"].load(Options(data=MADE_UP)).provenance
    assert "made-up items" in found.note
    assert "other than published: 19 of 19" in found.note
    assert "simulated services other than published: long_context.py" in found.note
    assert bfcl.known_of(leaderboard.GRADED).of == 4_291
    assert sum(b.full_items for b in bfcl.BENCHMARKS[1:]) == bfcl.BENCHMARKS[0].full_items


def test_the_data_is_found_in_every_form_and_its_absence_is_said(tmp_path: Path) -> None:
    import shutil
    import zipfile

    package = MADE_UP / "bfcl" / "bfcl_eval"
    wheel = tmp_path / "wheel" / "bfcl" / "bfcl_eval-1-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(package.rglob("*")):
            if file.is_file():
                archive.write(file, f"bfcl_eval/{file.relative_to(package)}")
    shutil.copytree(package / "data", tmp_path / "flat" / "bfcl")
    places = [MADE_UP, MADE_UP / "bfcl", package, package / "data", tmp_path / "wheel", wheel]
    asked = [
        [s.item_id for s in BENCHMARKS["bfcl"].load(Options(data=place)).samples]
        for place in places
    ]
    assert asked == [list(SAMPLES)] * len(places)
    live = BENCHMARKS["bfcl_live"]
    assert len(live.load(Options(data=tmp_path / "flat")).samples) == 8
    with pytest.raises(UsageError, match="not the simulated services"):
        BENCHMARKS["bfcl"].load(Options(data=tmp_path / "flat"))
    with pytest.raises(UsageError, match="pip download bfcl-eval --no-deps"):
        live.load(Options(data=tmp_path / "nothing"))
    wheel.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="is not a wheel"):
        live.load(Options(data=wheel))


@pytest.mark.parametrize(
    ("text", "match"),
    [('{"id": ', "line 1 is not JSON"), ("[1]", "an object was expected")],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "BFCL_v4_simple_python.json").write_text(text)
    with pytest.raises(UsageError, match=match):
        BENCHMARKS["bfcl_non_live"].load(Options(data=tmp_path))


def test_averages_are_those_of_the_leaderboard_and_none_is_made_of_half_a_group() -> None:
    scores = dict.fromkeys(leaderboard.GRADED, (1, 0.5))
    scores |= {"simple_python": (400, 0.9), "live_simple": (258, 0.8), "live_multiple": (1053, 0.6)}
    found = bfcl.leaderboard_averages(scores)
    assert found["non_live"] == pytest.approx((0.9 + 0.5 * 3) / 4)
    assert found["live"] == pytest.approx((258 * 0.8 + 1053 * 0.6 + 2 * 0.5) / 1313)
    assert found["irrelevance"] == found["multi_turn"] == 0.5
    assert set(bfcl.leaderboard_averages({"irrelevance": (240, 1.0)})) == set()


def test_grading_reads_no_document_of_functions_that_were_not_offered() -> None:
    score = grade_calls("simple_python", [], [], write_answer([[says((BREW, TEA))]]))
    assert (score.value, score.cause) == (0.0, "wrong")
