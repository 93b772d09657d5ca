"""Mistakes in what is asked end before the work: one line that names them, exit code 2."""

import argparse
import importlib
from pathlib import Path

import pytest

from halfbyte.cli.main import COMMANDS, build_parser, main
from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError
from halfbyte.files import check_place
from halfbyte.model.tiny import write_tiny_checkpoint


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("demo", "bench")])
@pytest.mark.parametrize("wrong", [["--no-such-flag"], ["--log-level", "loud"]])
def test_a_wrong_flag_is_one_line(
    command: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, *wrong])
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and said.endswith(
        f"halfbyte {command} --help says what there is"
    )


def outputs() -> list[tuple[str, argparse.Action]]:
    """Every argument of a command that names a file to write."""
    found = []
    for name, (module, _) in COMMANDS.items():
        parser = build_parser(name, importlib.import_module(f"halfbyte.cli.{module}"))
        found += [(name, action) for action in parser._actions if action.type is output_file]
    return found


def test_files_to_write_are_checked_in_every_command_that_has_them() -> None:
    assert {name for name, _ in outputs()} >= {"quantize", "compare", "report", "compare-evals"}


def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "out.json", tmp_path / "file" / "deep" / "out.json"):
        with pytest.raises(UsageError, match="is not a folder"):
            check_place(wrong)
        with pytest.raises(argparse.ArgumentTypeError, match="is not a folder"):
            output_file(str(wrong))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file"):
        output_file(str(tmp_path))
    assert output_file(str(tmp_path / "new" / "out.json")) == tmp_path / "new" / "out.json"
    assert not (tmp_path / "new").exists()
    target = tmp_path / "file" / "fp8"
    for command in (
        ["quantize", "nothing", "out", "--recipe", "fp8", "--report", str(tmp_path)],
        ["compare", "a", "b", "--text", "t", "--json", str(target)],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in said
    write_tiny_checkpoint(tmp_path / "bf16", layers=1)
    # Without tokenizer files nothing could be measured either: the place is looked at first.
    assert main(["import", str(tmp_path / "bf16"), str(target), "--to", "mistral-fp8"]) == 2
    assert (
        capsys.readouterr().err.strip() == f"error: {target}: {tmp_path / 'file'} is not a folder"
    )


def test_what_was_quantized_already_is_not_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_checkpoint(tmp_path / "fp8", layers=1, dialect="mistral-fp8")
    fp8, mixed = str(tmp_path / "fp8"), str(tmp_path / "mixed")
    recipe = ["--recipe", "nvfp4-everywhere"]
    assert main(["quantize", fp8, mixed, *recipe, "--method", "none"]) == 0
    capsys.readouterr()
    for command in (["plan", mixed, *recipe], ["quantize", mixed, str(tmp_path / "more"), *recipe]):
        assert main(command) == 2
        assert "is already a Model Optimizer export" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["verify"], ["publish"]])
def test_a_folder_that_is_not_there_is_a_mistake_and_no_damage(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main([*command, missing, *(["owner/name"] if command == ["publish"] else [])]) == 2
    assert capsys.readouterr().err == f"error: {missing}: no such directory\n"
    (tmp_path / "empty").mkdir()
    if command == ["verify"]:
        assert main(["verify", str(tmp_path / "empty")]) == 1
        assert capsys.readouterr().out.count("empty: ") == 1
