"""Generated pages come from records, and stale ones are noticed."""

import json
from pathlib import Path

import pytest
from tools import docs

from halfbyte.bench.record import own_command, write
from halfbyte.errors import CheckpointError
from halfbyte.figures import Against, Figure, read_record

PAGE = "before\n<!-- generated: figures -->\nold\n<!-- end generated -->\nafter\n"


def make_root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(PAGE)
    write(
        tmp_path / "benchmarks" / "records" / "quick.json",
        name="quick",
        question="How quick?",
        command="halfbyte bench quick",
        figures=[
            Figure(
                "decode",
                41.0,
                "tokens/s",
                "decode",
                {"users": 2},
                (Against("peer", 17.0),),
                is_headline=True,
            ),
            Figure("prefill", 812.4, "tokens/s", "prefill"),
        ],
        results={"rounds": 3},
        samples={"decode_s": [0.1, 0.2]},
    )
    return tmp_path


RECORDS = sorted((Path(__file__).parents[1] / "benchmarks" / "records").glob("*.json"))


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
    assert not [word for word in read_record(path).command.split() if word.startswith("/")]


def test_block_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    stale = docs.stale_pages(root)
    text = stale[root / "README.md"]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    row = "| decode | users 2 | 41 tokens/s | peer: 17 tokens/s (2.41x) |"
    assert row in text
    # README shows headlines, the benchmarks' page all figures, neither shows bookkeeping.
    assert "812" not in text and "rounds" not in text
    page = stale[root / "benchmarks" / "README.md"]
    assert row in page and "| prefill |  | 812 tokens/s |  |" in page and "rounds" not in page


def test_fresh_pages_are_not_stale_and_a_changed_record_is(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    for path, text in docs.stale_pages(root).items():
        path.write_text(text)
    assert docs.stale_pages(root) == {}
    record = root / "benchmarks" / "records" / "quick.json"
    record.write_text(record.read_text().replace('"value": 41.0', '"value": 40.0'))
    assert set(docs.stale_pages(root)) == {root / "README.md", root / "benchmarks" / "README.md"}


def test_unknown_block_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="nonsense"):
        docs.render(PAGE.replace("figures", "nonsense"), {})


def test_record_keeps_every_sample_and_the_machine(tmp_path: Path) -> None:
    record = read_record(make_root(tmp_path) / "benchmarks" / "records" / "quick.json")
    assert record.samples == {"decode_s": [0.1, 0.2]}
    assert record.machine.versions["torch"]
    assert record.machine.cores is not None and record.machine.cores >= 1


def test_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(CheckpointError, match=r"x\.json.*lacks command"):
        read_record(path)


def test_readme_shows_eight_figures() -> None:
    assert sum(len(read_record(path).headlines) for path in RECORDS) == 8


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_no_published_figure_is_told_twice(path: Path) -> None:
    figures = read_record(path).figures
    assert len({docs.cells(figure) for figure in figures}) == len(figures)
    keys = {(figure.name, figure.conditions_text) for figure in figures}
    assert len(keys) == len(figures)
