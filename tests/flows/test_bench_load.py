"""A small model is served and measured under load: record, page, comparison, card, Ctrl-C."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.bench.load.report import read_load
from halfbyte.bench.load.traffic import Level, Session, Trace, Turn, write_trace
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.cli.main import main
from halfbyte.evals.running.endpoint import serve
from halfbyte.figures import read_record
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

DATA = Path(__file__).parent.parent / "data" / "chat"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=800, max_positions=2048)
    write_tiny_checkpoint(path, config=dataclasses.replace(config, text=text))
    shutil.copy(DATA / "tekken" / "tekken.json", path)
    return path


@pytest.fixture(scope="module")
def url(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(directory, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


@pytest.fixture(autouse=True)
def _brief_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long they run alone says how sure a median is, which nobody asks here."""
    monkeypatch.setattr("halfbyte.bench.load.run._ALONE_S", 0.5)


SMALL = (
    "--users", "1", "3", "--requests", "2", "--prompt-tokens", "60", "--answer-tokens", "8",
    "--agents", "2", "--turns", "2", "--streams", "2", "--long-tokens", "500",
)  # fmt: skip


def test_a_checkpoint_is_served_measured_and_its_card_shows_it(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "a.json"
    flags = ["--profile", "fixed", *SMALL, "--record", record, "--write-trace", tmp_path / "t.json"]
    flags += ["--serve-flags=--max-sequences 2"]
    assert main(["bench", "load", str(directory), *map(str, flags)]) == 0
    printed = capsys.readouterr()
    assert "fixed lengths, 3 users" in printed.out
    run = read_load(record)
    assert [one.users for one in run.levels] == [1, 3]
    assert all(one.answered == one.planned and not one.failed for one in run.levels)
    assert all(one.answer_tokens == 8 for one in run.levels)
    # Words are new in each run; how many tokens they have is known on average only.
    assert all(abs((one.prompt_tokens or 0) - 60) <= 25 for one in run.levels)
    assert run.record.checkpoint == checkpoint_identity(directory)
    assert "max_sequences 2" in dict(run.facts)["server"]
    assert "<svg" in record.with_suffix(".html").read_text()
    for rows in run.record.samples.values():
        assert rows
        assert min(rows) >= 0

    card = ["card", tmp_path / "card", "--checkpoint", directory, "--records", record]
    assert main([*map(str, card), "--base-model", "some/base"]) == 0
    speed = (tmp_path / "card" / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    for figure in read_record(record).figures:
        assert f"| {figure.name} | {figure.conditions_text} | {figure.value_text} |" in speed


def test_a_trace_is_replayed_against_an_earlier_run(
    url: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert (
        main(["bench", "load", url, *SMALL, "--record", "a.json", "--write-trace", "t.json"]) == 0
    )
    first = read_load(Path("a.json"))
    assert [one.profile for one in first.levels] == ["fixed", "fixed", "agents", "beside"]
    assert not any(one.failed for one in first.levels)
    agents, beside = first.levels[2:]
    # The system prompt is found for the second agent, the history for every later turn.
    assert agents.found_share is not None
    assert agents.found_share > 0.3
    assert beside.beside is not None
    assert beside.alone is not None
    # Our server says which checkpoint it serves.
    assert first.record.checkpoint == checkpoint_identity(directory)
    assert first.record.machine.processor
    capsys.readouterr()

    words = ["bench", "load", url, "--trace", "t.json", "--record", "b.json", "--against", "a.json"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "against tiny" in printed
    assert "did not send the same traffic" not in printed
    second = read_load(Path("b.json"))
    assert second.trace == first.trace
    # What is found is the template's beginning, not the words of the first run: three blocks of 16.
    assert all(one.found_share is not None and one.found_share < 0.6 for one in second.levels[:2])
    os.unlink("b.html")
    assert main(["bench", "load", "b.json", "--against", "a.json"]) == 0
    assert "this over the other" in Path("b.html").read_text()


def test_ctrl_c_keeps_what_was_measured(url: str, tmp_path: Path) -> None:
    turn = Turn(0.0, "user", 20, 1, 4)
    levels = [Level("fixed", ((Session((turn,)),) * many,)) for many in (1, 5_000)]
    write_trace(Trace(1, tuple(levels)), tmp_path / "t.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "halfbyte", "bench", "load", url, "--trace", "t.json",
         "--record", "r.json"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    # The first level's end writes the record; the second would take minutes.
    while not (tmp_path / "r.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted: 1 of 2 levels are whole and kept" in error
    assert "was interrupted" in out
    record = json.loads((tmp_path / "r.json").read_text())
    assert [one["end"] for one in record["results"]["levels"]] == ["", "interrupted"]
    assert record["figures"]
