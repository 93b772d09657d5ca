"""Quota, selection, shortfall, modes and the record of a drawn blend."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.calibrate.blend import Blend, Source, load_blend
from halfbyte.calibrate.chat_text import load_chat_text
from halfbyte.calibrate.draw import (
    CalibrationData,
    draw,
    draw_rows,
    share_out,
    share_splits,
    write_rows,
)
from halfbyte.calibrate.overlap import read_prompts
from halfbyte.calibrate.sources import DataAccess
from halfbyte.chat.tokens import load_chat
from halfbyte.errors import CheckpointError, UsageError

ROWS = Path(__file__).parent.parent / "data" / "calibrate"


def _write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _texts(path: Path, count: int, word: str = "row") -> None:
    _write(path, [{"text": f"{word} number {n}", "uuid": f"{word}-{n}"} for n in range(count)])


def _blend(folder: Path, *patterns: str, **changes: Any) -> Blend:
    sources = [Source(path=pattern) for pattern in patterns]
    return replace(Blend("test", sources, samples=4, folder=folder), **changes)


def _taken(data: CalibrationData) -> dict[str, list[int]]:
    return {
        f"{member['name']}/{split['name']}": split["rows"]
        for member in data.provenance["members"]
        for split in member["splits"]
    }


# --- quota


def test_quota_of_1024_rows_is_that_of_the_reference() -> None:
    members = share_out(1024, [1.0] * 7)
    assert members == [147, 147, 146, 146, 146, 146, 146]
    assert share_splits(members[1], 2) == [73, 74]
    assert share_splits(members[2], 4) == [36, 36, 36, 38]
    assert share_splits(members[4], 5) == [29, 29, 29, 29, 30]
    assert share_splits(members[6], 18) == [8] * 17 + [10]


@given(
    st.integers(0, 5000),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
)
def test_weights_share_out_every_row(count: int, weights: list[float]) -> None:
    shares = share_out(count, weights)
    assert sum(shares) == count
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) <= 1 + 1e-6


@given(st.integers(0, 5000), st.integers(1, 30))
def test_equal_weights_are_divmod(count: int, number: int) -> None:
    base, rest = divmod(count, number)
    assert share_out(count, [2.5] * number) == [base + 1] * rest + [base] * (number - rest)


# --- selection


def test_first_takes_the_first_rows_and_reads_no_further(tmp_path: Path, tekken: Path) -> None:
    _texts(tmp_path / "a.jsonl", 100)
    data = draw(_blend(tmp_path, "a.jsonl", select="first"), tekken)
    assert _taken(data) == {"a.jsonl/a": [0, 1, 2, 3]}
    assert data.provenance["members"][0]["splits"][0]["read"]["rows"] == 4


def test_reservoir_is_seeded_and_a_larger_one_contains_the_smaller(
    tmp_path: Path, tekken: Path
) -> None:
    _texts(tmp_path / "a.jsonl", 500)
    four = _taken(draw(_blend(tmp_path, "a.jsonl"), tekken))["a.jsonl/a"]
    again = _taken(draw(_blend(tmp_path, "a.jsonl"), tekken))["a.jsonl/a"]
    forty = _taken(draw(_blend(tmp_path, "a.jsonl", samples=40), tekken))["a.jsonl/a"]
    other = _taken(draw(_blend(tmp_path, "a.jsonl", seed=1), tekken))["a.jsonl/a"]
    assert four == again == forty[:4]
    assert len(set(forty)) == 40
    assert four != other


def test_reservoir_takes_every_row_about_equally_often(tmp_path: Path, tekken: Path) -> None:
    _texts(tmp_path / "a.jsonl", 20)
    counts = [0] * 20
    text = load_chat_text(tekken, "template")
    for seed in range(60):
        data = draw_rows(_blend(tmp_path, "a.jsonl", seed=seed), text)
        for row in _taken(data)["a.jsonl/a"]:
            counts[row] += 1
    # 240 draws over 20 rows, 12 each: chi-square with 19 degrees of freedom, 0.999 quantile.
    assert sum((count - 12) ** 2 / 12 for count in counts) < 43.8


def test_only_the_window_is_read(tmp_path: Path, tekken: Path) -> None:
    _texts(tmp_path / "a.jsonl", 50)
    data = draw(_blend(tmp_path, "a.jsonl", window=10), tekken)
    assert max(_taken(data)["a.jsonl/a"]) < 10
    assert data.provenance["members"][0]["splits"][0]["read"]["rows"] == 10


# --- shortfall


def test_a_short_split_hands_its_rest_to_its_siblings_then_to_others(
    tmp_path: Path, tekken: Path
) -> None:
    _texts(tmp_path / "one" / "a.jsonl", 1)
    _texts(tmp_path / "one" / "b.jsonl", 5)
    _texts(tmp_path / "two" / "c.jsonl", 100)
    taken = _taken(draw(_blend(tmp_path, "one", "two", samples=8), tekken))
    assert {name: len(rows) for name, rows in taken.items()} == {
        "one/a": 1,
        "one/b": 3,
        "two/c": 4,
    }
    taken = _taken(draw(_blend(tmp_path, "one", "two", samples=40), tekken))
    assert {name: len(rows) for name, rows in taken.items()} == {
        "one/a": 1,
        "one/b": 5,
        "two/c": 34,
    }


def test_too_few_rows_in_all_is_said_not_hidden(tmp_path: Path, tekken: Path) -> None:
    _texts(tmp_path / "a.jsonl", 3)
    data = draw(_blend(tmp_path, "a.jsonl", samples=10), tekken)
    assert len(data.rows) == 3
    assert data.provenance["samples"] == 10
    assert data.provenance["num_rows"] == 3


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=3),
    samples=st.integers(1, 30),
)
def test_all_rows_that_there_are_are_found(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], samples: int
) -> None:
    text = load_chat_text(ROWS.parent / "chat" / "tekken", "template")
    folder = tmp_path_factory.mktemp("sizes")
    for m, splits in enumerate(sizes):
        for s, size in enumerate(splits):
            _texts(folder / f"m{m}" / f"s{s}.jsonl", size)
    blend = _blend(folder, *(f"m{m}" for m in range(len(sizes))), samples=samples)
    there = sum(map(sum, sizes))
    if there == 0:
        with pytest.raises(UsageError, match="gave no row"):
            draw_rows(blend, text)
        return
    data = draw_rows(blend, text)
    assert len(data.rows) == min(samples, there)
    for rows in _taken(data).values():
        assert len(set(rows)) == len(rows)


# --- awkward rows


def test_broken_rows_are_counted_and_named_up_to_one_percent(tmp_path: Path, tekken: Path) -> None:
    good: list[Any] = [{"text": f"row {n}"} for n in range(200)]
    _write(tmp_path / "a.jsonl", [*good[:7], '{"text": ', *good[7:]])
    data = draw(_blend(tmp_path, "a.jsonl"), tekken)
    broken = data.provenance["members"][0]["splits"][0]["broken"]
    assert broken["rows"] == 1
    assert broken["first"][0].startswith("a.jsonl:8: it is not JSON")
    _write(tmp_path / "a.jsonl", [*good, *['{"text": '] * 3])
    with pytest.raises(CheckpointError, match=r"3 of 203 rows are broken.*a\.jsonl:201"):
        draw(_blend(tmp_path, "a.jsonl"), tekken)


def test_empty_and_refused_rows_are_replaced_and_counted(tmp_path: Path, tekken: Path) -> None:
    refused = {
        "messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]
    }
    rows = [{"text": "  "}, {"messages": []}, refused, *({"text": f"row {n}"} for n in range(4))]
    _write(tmp_path / "a.jsonl", rows)
    data = draw(_blend(tmp_path, "a.jsonl", select="first"), tekken)
    split = data.provenance["members"][0]["splits"][0]
    assert split["rows"] == [3, 4, 5, 6]
    assert split["empty"] == 2
    assert split["refused_by_template"]["rows"] == 1
    assert split["refused_by_template"]["first"].startswith("a.jsonl:3: ")


def test_evaluation_items_are_dropped_and_counted(tmp_path: Path, tekken: Path) -> None:
    item = "What is the remainder when the sum of the first one hundred primes is divided by seven"
    rows = [{"messages": [{"role": "user", "content": f"Please: {item}?"}]}]
    _write(tmp_path / "a.jsonl", [*rows, *({"text": f"row {n}"} for n in range(9))])
    blend = _blend(tmp_path, "a.jsonl", samples=10)
    assert len(draw(blend, tekken).rows) == 10
    data = draw(blend, tekken, evaluation_prompts=[item])
    assert len(data.rows) == 9
    assert data.provenance["members"][0]["splits"][0]["overlapping"] == 1
    assert data.provenance["overlap"]["prompts"] == 1


# --- text


def _decoded(data: CalibrationData, directory: Path) -> list[str]:
    vocabulary = load_chat(directory).vocabulary
    return [vocabulary.decode(row, keep_control=True) for row in data.rows]


def test_template_rows_hold_what_serving_sees(tekken: Path) -> None:
    blend = _blend(ROWS, "agentic__search.jsonl", "math__low.jsonl", "instruction*", samples=9)
    blend = replace(blend, tokens_per_sample=4096)
    texts = _decoded(draw(blend, tekken), tekken)
    calls = [text for text in texts if "[TOOL_CALLS]web_search[ARGS]{" in text]
    assert len(calls) == 3
    for text in calls:
        assert "[AVAILABLE_TOOLS]" in text
        assert "[THINK]I should look this up.[/THINK]" in text
    for text in texts:
        assert ('"reasoning_effort": "high"' in text) == ("[THINK]" in text)
        assert ('"reasoning_effort": "none"' in text) == ("[THINK]" not in text)
        assert text.startswith("<s>") and text.endswith("</s>")


def test_a_row_that_ends_with_a_call_ends_there(tmp_path: Path, tekken: Path, chatml: Path) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    _write(tmp_path / "a.jsonl", [{"messages": messages}])
    blend = _blend(tmp_path, "a.jsonl", samples=1)
    (text,) = _decoded(draw(blend, tekken), tekken)
    assert text.endswith('[INST]go[/INST][TOOL_CALLS]f[ARGS]{"x": 1}</s>')
    (text,) = _decoded(draw(blend, chatml), chatml)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>")


def test_plain_rows_are_contents_joined_by_newlines(tmp_path: Path, tekken: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "reasoning_content": "hidden"},
        {"role": "assistant", "content": "A [/INST]"},
    ]
    _write(tmp_path / "a.jsonl", [{"messages": messages}])
    data = draw(_blend(tmp_path, "a.jsonl", mode="plain", samples=1), tekken)
    assert _decoded(data, tekken) == ["<s>S\nU\n\nA [/INST]"]
    control = load_chat(tekken).vocabulary.control_names
    assert sum(token in control for token in data.rows[0]) == 1


def test_packed_rows_are_full_and_hold_whole_documents(tmp_path: Path, tekken: Path) -> None:
    _texts(tmp_path / "a.jsonl", 300, "apple")
    _texts(tmp_path / "b.jsonl", 300, "bread")
    blend = _blend(tmp_path, "a.jsonl", "b.jsonl", mode="packed", samples=6, tokens_per_sample=100)
    data = draw(blend, tekken)
    assert [len(row) for row in data.rows] == [100] * 6
    text = "".join(_decoded(data, tekken))
    documents = [document for document in text.split("</s>") if document]
    assert all(document.startswith("<s>") for document in documents)
    apples = ["apple" in document for document in documents]
    # Shuffled across the sources, half of the tokens from each.
    assert apples != sorted(apples) and apples != sorted(apples, reverse=True)
    assert [member["num_tokens"] for member in data.provenance["members"]] == [300, 300]


def test_rows_are_cut_and_never_padded(tekken: Path) -> None:
    data = draw(_blend(ROWS, "math*", "science*", samples=7, tokens_per_sample=40), tekken)
    assert max(map(len, data.rows)) == 40
    pad = load_chat(tekken).vocabulary.control["<pad>"]
    assert not any(pad in row for row in data.rows)


# --- the whole blend, and its record


def test_the_seven_sets_from_a_folder_laid_out_as_on_the_hub(
    hub_folder: Path, tekken: Path
) -> None:
    blend = replace(load_blend("nemotron-v3"), samples=14)
    data = draw(blend, tekken, access=DataAccess(folder=hub_folder))
    assert len(data.rows) == 14
    members: list[Mapping[str, Any]] = data.provenance["members"]
    assert [member["dataset"].split("/")[0] for member in members] == ["nvidia"] * 7
    assert [member["taken_rows"] for member in members] == [3, 2, 2, 2, 2, 1, 2]
    assert members[3]["splits_left_out"]["tool_calling"] == "line 1095 is not valid JSON"


def test_the_same_blend_gives_the_same_bytes(hub_folder: Path, tekken: Path) -> None:
    blend = replace(load_blend("nemotron-v3"), samples=14)
    one = draw(blend, tekken, access=DataAccess(folder=hub_folder))
    two = draw(blend, tekken, access=DataAccess(folder=hub_folder))
    assert one == two
    assert json.loads(json.dumps(one.provenance)) == one.provenance
    other = hub_folder / "nvidia" / "Nemotron-SFT-SWE-v2" / "data" / "agentless.jsonl"
    other.write_text(other.read_text().replace("minutes", "seconds"))
    three = draw(blend, tekken, access=DataAccess(folder=hub_folder))
    assert three.provenance["rows_sha256"] != one.provenance["rows_sha256"]


def test_a_missing_data_set_is_named_with_the_way_out(tmp_path: Path, tekken: Path) -> None:
    with pytest.raises(UsageError, match="Instruction-Following-Chat-v2 is not under"):
        draw(load_blend("nemotron-v3"), tekken, access=DataAccess(folder=tmp_path))
    with pytest.raises(UsageError, match="or allow the hub"):
        draw(load_blend("nemotron-v3"), tekken)


def test_a_model_without_a_template_takes_plain_text_only(
    tmp_path: Path, chatml: Path, hub_folder: Path
) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        if (chatml / name).exists():
            (tmp_path / name).write_bytes((chatml / name).read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    blend = _blend(ROWS, "math*", samples=3)
    with pytest.raises(CheckpointError, match="no chat template"):
        draw(blend, tmp_path)
    assert len(draw(replace(blend, mode="plain"), tmp_path).rows) == 3


def test_drawing_needs_no_torch() -> None:
    code = "import halfbyte.calibrate.draw, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- files


def test_rows_written_are_the_rows_that_calibration_reads(tmp_path: Path, tekken: Path) -> None:
    tokens = pytest.importorskip("halfbyte.calibrate.tokens")
    data = draw(_blend(ROWS, "math*", samples=3), tekken)
    write_rows(data, tmp_path / "rows.safetensors")
    read = tokens.read_token_rows(tmp_path / "rows.safetensors")
    assert tuple(tuple(row.tolist()) for row in read) == data.rows
    record = json.loads((tmp_path / "rows.safetensors.json").read_text("utf-8"))
    assert record == data.provenance


def test_strings_of_evaluation_files_are_found_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"a": "one", "b": [{"c": "two"}], "n": 3}\n\n"three"\n')
    assert list(read_prompts(path)) == ["one", "two", "three"]
    path.write_text("{")
    with pytest.raises(UsageError, match=r"items\.jsonl:1"):
        list(read_prompts(path))
