"""Generated pages come from records, and stale ones are noticed."""

import json
from pathlib import Path

import pytest

from halfbyte.bench import docs
from halfbyte.bench.record import own_command, read, write
from halfbyte.errors import CheckpointError

PAGE = "before\n<!-- generated: speed -->\nold\n<!-- end generated -->\nafter\n"


def make_root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(PAGE)
    write(
        tmp_path / "benchmarks" / "records" / "quick.json",
        name="quick",
        question="How quick?",
        command="halfbyte bench quick",
        results={"headlines": [{"what": "decode", "figure": "41 tokens/s", "against": "17"}]},
        samples={"decode_s": [0.1, 0.2]},
    )
    return tmp_path


RECORDS = sorted((Path(__file__).parents[2] / "benchmarks" / "records").glob("*.json"))


def test_a_recorded_command_names_no_folder_of_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "records" / "a b.json"
    words = ["-m", "bench", "serve", str(tmp_path / "demo"), f"--record={record}", "/models/big"]
    monkeypatch.setattr("sys.argv", words)
    assert own_command() == "halfbyte bench serve demo '--record=records/a b.json' /models/big"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_published_commands_can_be_run_elsewhere(path: Path) -> None:
    assert not [word for word in read(path)["command"].split() if word.startswith("/")]


def test_block_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    stale = docs.stale_pages(root)
    text = stale[root / "README.md"]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| decode | 41 tokens/s | 17 |" in text


def test_fresh_pages_are_not_stale_and_a_changed_record_is(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    for path, text in docs.stale_pages(root).items():
        path.write_text(text)
    assert docs.stale_pages(root) == {}
    record = root / "benchmarks" / "records" / "quick.json"
    record.write_text(record.read_text().replace("41 tokens/s", "40 tokens/s"))
    assert set(docs.stale_pages(root)) == {root / "README.md", root / "benchmarks" / "README.md"}


def test_unknown_block_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="nonsense"):
        docs.render(PAGE.replace("speed", "nonsense"), {})


def test_record_keeps_every_sample_and_the_machine(tmp_path: Path) -> None:
    record = read(make_root(tmp_path) / "benchmarks" / "records" / "quick.json")
    assert record["samples"] == {"decode_s": [0.1, 0.2]}
    assert record["machine"]["versions"]["torch"]
    assert record["machine"]["cores"] >= 1


def test_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(CheckpointError, match=r"x\.json.*lacks command"):
        read(path)
