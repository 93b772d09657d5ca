"""Rows as they really come: odd messages, odd tools, broken lines, damaged files."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.calibrate.rows import (
    BadRowError,
    Line,
    ParsedRow,
    parse_line,
    parse_row,
    read_row_lines,
)

ROWS = Path(__file__).parent.parent / "data" / "calibrate"


def _stand_in() -> Iterator[tuple[str, ParsedRow | None]]:
    for path in sorted(ROWS.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in read_row_lines(file, path.name):
                try:
                    yield f"{path.name}:{line.number}", parse_row(parse_line(line))
                except BadRowError:
                    yield f"{path.name}:{line.number}", None


def test_all_stand_in_rows_but_the_cut_one_are_understood() -> None:
    rows = dict(_stand_in())
    assert len(rows) == 27
    assert [place for place, row in rows.items() if row is None] == [
        "agentic__mixed_schema.jsonl:3"
    ]
    assert all(row.messages[-1]["role"] == "assistant" for row in rows.values() if row)


def test_null_content_and_empty_system_turns_do_not_reach_the_template() -> None:
    for _, row in _stand_in():
        for message in row.messages if row else ():
            assert isinstance(message["content"], str)
            assert message["role"] != "system" or message["content"].strip()


def test_arguments_as_object_or_string_become_the_same_call() -> None:
    def call(arguments: Any) -> ParsedRow:
        calls = [{"id": "a", "function": {"name": "f", "arguments": arguments}}]
        return parse_row({"messages": [{"role": "assistant", "tool_calls": calls}]})

    assert call({"x": 1}) == call('{"x": 1}')
    assert call(None) == call("") == call({})


def test_lists_stored_as_json_text_are_unpacked() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    tools = [{"name": "f", "parameters": {"type": "object", "title": None}}]
    plain = parse_row({"messages": messages, "tools": tools})
    assert plain == parse_row({"messages": json.dumps(messages), "tools": json.dumps(tools)})
    calls = json.dumps(messages[1]["tool_calls"])
    again = [messages[0], json.dumps({"role": "assistant", "tool_calls": calls})]
    assert plain == parse_row({"messages": again, "tools": [json.dumps(tools[0])]})
    assert plain.tools[0]["function"] == {
        "name": "f",
        "description": "",
        "parameters": {"type": "object"},
    }


def test_results_without_ids_answer_the_calls_in_order() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    results = [{"role": "tool", "content": text} for text in "ab"]
    row = parse_row({"messages": [{"role": "assistant", "tool_calls": calls}, *results]})
    made = [call["id"] for call in row.messages[0]["tool_calls"]]
    assert len(set(made)) == 2
    assert [message["tool_call_id"] for message in row.messages[1:]] == made


def test_thoughts_are_kept_and_blank_ones_are_none() -> None:
    with_thought = parse_row({"messages": [{"role": "assistant", "reasoning_content": "hm"}]})
    without = parse_row({"messages": [{"role": "assistant", "reasoning_content": " "}]})
    assert with_thought.has_reasoning and not without.has_reasoning


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"text": 3},
        {"messages": "not json"},
        {"messages": {"role": "user"}},
        {"messages": [3]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": {"function": {}}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            ]
        },
        {"messages": [], "tools": {"a": 1}},
        {"messages": [], "tools": ["not json"]},
    ],
)
def test_nonsense_is_refused_not_guessed(raw: dict[str, Any]) -> None:
    with pytest.raises(BadRowError):
        parse_row(raw)


@pytest.mark.parametrize("data", [b"[1]", b'{"a": ', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_line_is_named(data: bytes) -> None:
    with pytest.raises(BadRowError):
        parse_line(Line(1, data))


def test_line_numbers_survive_blank_lines() -> None:
    lines = list(read_row_lines(io.BytesIO(b'{"a": 1}\n\n{"b": 2}'), "x.jsonl"))
    assert [line.number for line in lines] == [1, 3]


def test_a_cut_gzip_gives_its_rows_and_then_says_so() -> None:
    rows = [json.dumps({"text": f"{n} {n**9}"}) for n in range(2000)]
    data = gzip.compress("\n".join(rows).encode())
    whole = list(read_row_lines(io.BytesIO(data), "x.jsonl.gz"))
    assert len(whole) == 2000
    cut = list(read_row_lines(io.BytesIO(data[: len(data) // 2]), "x.jsonl.gz"))
    assert cut[:10] == whole[:10]
    with pytest.raises(BadRowError, match="damaged or cut off"):
        parse_line(cut[-1])


def test_parquet_rows_are_those_of_the_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = ROWS / "instruction_following_chat__reasoning_off.jsonl"
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with path.open("rb") as file:
        read = [parse_row(parse_line(line)) for line in read_row_lines(file, path.name)]
    assert read == [parse_row(row) for row in rows]
    path.write_bytes(path.read_bytes()[:-9])
    with path.open("rb") as file:
        (line,) = read_row_lines(file, path.name)
    assert line.problem is not None and "parquet" in line.problem


@pytest.mark.parametrize(
    "row, asked, answered",
    [
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
        ({"prompt": "Q", "completion": "A"}, "Q", "A"),
        ({"instruction": "Do", "input": "this", "output": "A"}, "Do\n\nthis", "A"),
        ({"instruction": "Do", "input": "", "output": "A"}, "Do", "A"),
        ({"question": "Q", "answer": "A", "prompt": None}, "Q", "A"),
    ],
)
def test_one_exchange_in_two_columns_is_a_conversation(
    row: dict[str, Any], asked: str, answered: str
) -> None:
    expected = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    assert list(parse_row(row).messages) == expected
    with_system = parse_row({**row, "system": "Be brief."})
    assert list(with_system.messages) == [{"role": "system", "content": "Be brief."}, *expected]


@pytest.mark.parametrize(
    "row", [{}, {"prompt": "Q"}, {"prompt": 1, "response": "A"}, {"answer": "A"}, {"text": 3}]
)
def test_a_row_of_neither_kind_says_what_it_has(row: dict[str, Any]) -> None:
    with pytest.raises(BadRowError) as caught:
        parse_row(row)
    assert "nor a prompt with a response" in str(caught.value)
    assert (", ".join(sorted(row)) or "none") in str(caught.value)


@given(st.text(alphabet="ab é\n\r\t", max_size=60))
def test_paragraphs_are_the_text_without_its_blank_lines(text: str) -> None:
    lines = list(read_row_lines(io.BytesIO(text.encode()), "a.txt"))
    found = [parse_row(parse_line(line)).text for line in lines]
    assert " ".join(found).split() == text.split()
    assert all(found)
    stored = text.split("\n")
    for line, paragraph in zip(lines, found, strict=True):
        first = paragraph.split("\n")[0].strip()
        assert stored[line.number - 1].strip() == first


def test_a_text_that_is_not_utf8_is_a_bad_row_of_that_line() -> None:
    lines = list(read_row_lines(io.BytesIO(b"good\n\n\xff\xfe bad\n\nmore"), "a.md"))
    assert [line.number for line in lines] == [1, 3, 5]
    with pytest.raises(BadRowError, match="not UTF-8"):
        parse_line(lines[1])
