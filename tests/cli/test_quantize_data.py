"""`halfbyte quantize` with one's own data: text, rows, and a mistake in them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint

CHATML = Path(__file__).parents[1] / "data" / "chat" / "chatml"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "fp8"
    write_tiny_checkpoint(path, layers=2, dialect="mistral-fp8")
    for file in CHATML.iterdir():
        shutil.copy(file, path)
    return path


ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    },
    "text": {"text": "A plain document about bridges."},
    "exchange": {"prompt": "What is a bridge?", "response": "A way over."},
}


@pytest.mark.parametrize("kind", [*ROWS, "--text"])
def test_ones_own_data_calibrates_and_the_next_step_works_as_printed(
    source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "--text":
        data = tmp_path / "own.txt"
        data.write_text("One paragraph\nof two lines.\n\n" + "Another one about rivers.\n\n" * 20)
    else:
        data = tmp_path / "own.jsonl"
        data.write_text(
            "".join(json.dumps({**ROWS[kind], "uuid": str(n)}) + "\n" for n in range(12))
        )
    out = tmp_path / "out"
    flag = "--text" if kind == "--text" else "--blend"
    words = ["quantize", source, out, "--recipe", "nvfp4-everywhere", flag, data]
    assert main([*map(str, words)]) == 0
    manifest = json.loads((out / "halfbyte-manifest.json").read_text())
    assert manifest["made_of"]["calibration"]["tokens"] > 10
    told = json.dumps(manifest["made_of"]["calibration"])
    assert data.name in told
    assert str(tmp_path) not in told
    first = capsys.readouterr().err.partition("next: ")[2].splitlines()[0]
    assert first == f"halfbyte verify {out} --against {source}"
    assert main(first.split()[1:]) == 0


def test_a_broken_row_is_named_by_file_and_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "own.jsonl"
    rows = [json.dumps(ROWS["exchange"])] * 4
    data.write_text("\n".join([*rows, '{"prompt": "Q", "reply": "A"}', "{nonsense", *rows]))
    words = ["quantize", source, tmp_path / "out", "--recipe", "nvfp4-everywhere", "--blend", data]
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert "2 of 10 rows are broken" in error
    assert "own.jsonl:5: it has neither messages nor text, nor a prompt with a response" in error
    assert "but prompt, reply" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--blend", "no.jsonl"], "no.jsonl: no such file"),
        (["--text", "no.txt"], "no.txt: no such file"),
        (["--text", "rows.jsonl"], "a .txt or .md file was expected; rows go to --blend"),
        (["--text", "a.txt", "--blend", "builtin"], "exclude each other"),
        (["--blend", "rows.csv"], "or give a .yaml file, or your rows (.jsonl,"),
    ],
)
def test_a_mistake_with_ones_data_is_a_sentence(
    source: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--recipe", "nvfp4-everywhere", *words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_help_lists_the_recipes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "medium-3.5, mixed, nvfp4-everywhere" in text
