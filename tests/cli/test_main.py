"""Every command of the table exists, explains itself, and fails with a sentence."""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli.main import COMMANDS, build_parser, main


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"halfbyte {name}" in text.partition("\nexample:\n")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    module = importlib.import_module(f"halfbyte.cli.{COMMANDS[name][0]}")
    parser = build_parser(name, module)
    for line in module.EXAMPLE.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["halfbyte", name]:
            assert isinstance(parser.parse_args(words[2:]), argparse.Namespace)


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantise"]) == 2
    error = capsys.readouterr().err
    assert "quantise" in error
    assert "quantize" in error


def test_no_command_prints_the_overview_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_user_errors_are_one_line_without_a_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("flag", ["--limit", "--repeats", "--max-tokens", "--concurrency"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5"])
def test_an_evaluation_of_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "plan", f"{flag}={value}"])
    assert stop.value.code == 2
    assert f"{value!r} is no whole number of at least 1" in capsys.readouterr().err


def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        EXAMPLE = ""

        @staticmethod
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            """No arguments."""

        @staticmethod
        def run(args: argparse.Namespace) -> int:
            raise BrokenPipeError

    monkeypatch.setitem(COMMANDS, "gone", ("gone", "leaves"))
    duplicated: list[int] = []
    monkeypatch.setattr(os, "dup2", lambda source, target: duplicated.append(target))
    monkeypatch.setattr(importlib, "import_module", lambda _: Gone)
    assert main(["gone"]) == 0
    assert len(duplicated) == 1


@pytest.mark.parametrize(
    ("command", "given", "wanted"),
    [
        ("serve", None, "PASSIVE"),
        ("serve", "ACTIVE", "ACTIVE"),
        ("bench serve", None, "PASSIVE"),
        ("bench cpu", None, "None"),
        ("inspect", None, "None"),
    ],
)
def test_threads_of_a_server_do_not_spin(command: str, given: str | None, wanted: str) -> None:
    """Set before torch is loaded, or OpenMP does not ask."""
    code = f"""
import contextlib, os, sys
from halfbyte.cli.main import main
was_loaded = "torch" in sys.modules
with contextlib.suppress(SystemExit):
    main([*{command.split()!r}, "/nowhere"])
print(was_loaded, os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["False", wanted]
