"""Journals and the small texts around a run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.test_compare import record as sample_record
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.evals import records as records_module
from halfbyte.evals.judging.plan import format_eval_plan, plan_run
from halfbyte.evals.reasoning import split_reasoning
from halfbyte.evals.records import (
    BenchmarkResult,
    RunRecord,
    is_name,
    lock_run,
    newest,
    read_attempts,
    read_journal,
    read_records,
    read_run,
    record_row,
    time_spent,
)
from halfbyte.evals.tasks.suite import find_benchmarks
from halfbyte.evals.types import Attempt
from halfbyte.json_lines import JsonLines


@pytest.mark.parametrize("torn", [b'{"b": 2', b"{", b'{"b": "\xc3'])
def test_torn_line_is_cut_off_and_writing_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "j.jsonl"
    journal = JsonLines(path)
    journal.append({"a": "é" * 100_000})
    journal.close()
    with path.open("ab") as file:
        file.write(torn)
    assert len(list(read_journal(path))) == 1
    journal = JsonLines(path)
    journal.append({"c": "\ud800"})  # a lone surrogate, as broken servers send
    journal.close()
    assert [next(iter(row)) for row in read_journal(path)] == ["a", "c"]


def test_a_file_without_any_whole_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a": ' + b"1" * 200_000)
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_time_spent_counts_killed_sessions_and_not_the_nights_between(tmp_path: Path) -> None:
    assert time_spent(tmp_path) == 0.0
    for name, key, times in (
        ("sessions", "started", (100.0, 500.0, 900.0)),
        ("attempts", "ended", (110.0, 130.0, 520.0)),
    ):
        journal = JsonLines(tmp_path / f"{name}.jsonl")
        for one in times:
            journal.append({key: one})
        journal.close()
    assert time_spent(tmp_path) == 30.0 + 20.0


def test_newest_grading_is_read(tmp_path: Path) -> None:
    for name in ("samples", "samples.regrade-2", "samples.regrade-10"):
        (tmp_path / f"{name}.jsonl").touch()
    found = newest(tmp_path, "samples", "jsonl")
    assert found is not None and found.name == "samples.regrade-10.jsonl"
    with pytest.raises(UsageError, match=r"run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "content, sent, answer, reasoning",
    [
        ("B", "because", "B", "because"),
        ("<think>because</think>\nB", "", "B", "because"),
        ("[THINK]because[/THINK]B", "", "B", "because"),
        ("because</think>B", "", "B", "because"),
        ("<think>because it", "", "", "because it"),
        ("The <think> tag is a mark. B", "", "The <think> tag is a mark. B", ""),
        ("`<think>` opens it. B", "", "`<think>` opens it. B", ""),
        ("The [/THINK] token ends it. B", "a", "The [/THINK] token ends it. B", "a"),
        ("<think>a</think>B", "b", "<think>a</think>B", "b"),
        ("<think>a</think>So </think>B", "", "So </think>B", "a"),
        ("<think>a</think>B\n<think>or C", "", "", "a\nor C"),
        ("<think>a `</think>` b</think>B", "", "B", "a `</think>` b"),
        ("[think]a[/think]B", "", "B", "a"),
        ("<thinking>a</thinking>B", "", "B", "a"),
        ("a</think>B</think>", "", "B</think>", "a"),
        (" \n<think>\n\n</think>\n\nB", "", "B", ""),
        ("<think>a</think>B<think>c</think>", "", "B", "a\nc"),
        ("", "", "", ""),
    ],
)
def test_reasoning_is_split_off_in_every_form(
    content: str, sent: str, answer: str, reasoning: str
) -> None:
    assert split_reasoning(content, sent) == (answer, reasoning)


def test_plan_names_cost_and_what_can_be_seen() -> None:
    lines = plan_run(find_benchmarks(["gpqa_diamond"]), 16, None, 5_000.0, None)
    (line,) = lines
    assert line.output_tokens == 198 * 16 * 9_000
    assert line.hours == pytest.approx(198 * 16 * 9_000 / 5_000 / 3600)
    # SE 0.70 points; 1.97 + 0.84 of them show four times out of five, two-sided.
    assert line.standard_error == pytest.approx(0.0070, abs=1e-5)
    assert line.shown == pytest.approx(0.0208, abs=1e-4)
    assert "planning" in format_eval_plan(lines)
    with_prompts = plan_run(
        find_benchmarks(["gpqa_diamond"]), 16, None, 5_000.0, None, prompt_throughput=10_000.0
    )
    assert with_prompts[0].hours == pytest.approx(lines[0].hours + 198 * 16 * 350 / 10_000 / 3600)
    with pytest.raises(UsageError, match="plans nothing"):
        plan_run(find_benchmarks(["gpqa_diamond"]), 16, None, 0.0, None)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "a/b", "a\\b", ".", "..", "", "a\nb", "a\x1b[2J", "x" * 101]
)
def test_a_name_is_never_a_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_name(name)
    command = ["evaluate", "http://127.0.0.1:9", "--arm", name, "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert "an arm is named by" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    result = {field.name: None for field in dataclasses.fields(BenchmarkResult)}
    run = {field.name: None for field in dataclasses.fields(RunRecord)}
    row = {**run, "format": 1, "benchmarks": {name: result}}
    (tmp_path / "run.json").write_text(json.dumps(row))
    with pytest.raises(UsageError, match="not a path"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["fp8", "127.0.0.1:8000", "größer 2", "a..b", "中"])
def test_names_that_are_names_stay(name: str) -> None:
    assert is_name(name)


HOLDER = """
import sys
from pathlib import Path
from halfbyte.evals.records import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_has_one_writer_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    source = str(Path(records_module.__file__).parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"in use: process {holder.pid} runs or grades there"),
            lock_run(folder),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock_run(folder):
        assert (folder / "run.lock").read_text() == f"{os.getpid()}\n"
    assert (folder / "run.lock").read_text() == ""


def test_attempts_are_read_as_they_were_written(tmp_path: Path) -> None:
    attempt = Attempt("b", "i", 1, 2, "00", "text", "", "stop", 3, 4, 0, 0.5, max_tokens=9)
    journal = JsonLines(tmp_path / "attempts.jsonl")
    journal.append(dataclasses.asdict(attempt))
    journal.append({**dataclasses.asdict(attempt), "colour": "red"})
    journal.close()
    rows = read_attempts(tmp_path / "attempts.jsonl")
    assert next(rows) == attempt
    with pytest.raises(UsageError, match="line 2 is damaged: it does not read as Attempt"):
        next(rows)


@pytest.mark.parametrize("line", [b"[1]", b"3", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "j.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 1}\n')
    with pytest.raises(UsageError, match="line 2 is damaged"):
        list(read_journal(file))
    # Of 200,000 bytes before a torn end the last whole line is kept.
    file.write_bytes(b'{"a": "' + b"x" * 200_000 + b'"}\n' + b"y" * 70_000)
    JsonLines(file).close()
    assert file.stat().st_size == 200_010


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    one = sample_record("g-1", 0, 1.0, "g")
    journal = JsonLines(tmp_path / "samples.jsonl")
    journal.append(record_row(one))
    journal.close()
    assert list(read_records(tmp_path / "samples.jsonl")) == [one]


@pytest.mark.parametrize("size", [1, 10, 65_530, 65_536, 65_540, 140_000])
def test_a_torn_end_is_cut_in_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "j.jsonl"
    whole = b'{"a": "' + b"x" * size + b'"}\n'
    for torn in (b"", b"{", b"y" * 65_536, b"y" * 65_537):
        path.write_bytes(whole + torn)
        JsonLines(path).close()
        assert path.read_bytes() == whole
