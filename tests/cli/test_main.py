"""Every command of the table exists, explains itself, and fails with a sentence."""

import argparse
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfbyte.cli.main import _EXTRAS, COMMANDS, build_parser, main
from halfbyte.cli.quantize import parse_bytes
from halfbyte.model.tiny import write_tiny_checkpoint


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
    assert f"{value!r} is not a whole number of at least 1" in capsys.readouterr().err


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
    """Set before torch is loaded, or OpenMP does not ask: the process ends where that would be."""
    code = f"""
import contextlib, os, sys
from halfbyte.cli.main import main
assert "torch" not in sys.modules
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
with contextlib.suppress(SystemExit):
    main([*{command.split()!r}, "/nowhere"])
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [wanted]


def _command(run: Callable[[argparse.Namespace], int], **more: object) -> SimpleNamespace:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """No arguments."""

    return SimpleNamespace(EXAMPLE="", add_arguments=add_arguments, run=run, **more)


def _stand_in(monkeypatch: pytest.MonkeyPatch, command: SimpleNamespace) -> None:
    monkeypatch.setitem(COMMANDS, "stand-in", ("stand_in", "stands in"))
    monkeypatch.setattr(importlib, "import_module", lambda _: command)


def _raises(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_what_is_kept_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = importlib.import_module(f"halfbyte.cli.{COMMANDS[name][0]}")
    monkeypatch.setattr(module, "run", _raises(KeyboardInterrupt()))
    monkeypatch.chdir(tmp_path)
    example = next(
        shlex.split(line, comments=True)
        for line in module.EXAMPLE.replace("\\\n", " ").splitlines()
        if line.split()[:2] == ["halfbyte", name]
    )
    assert main(example[1:]) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted: ") and said.count("\n") == 1
    assert "again" in said or "same command" in said


def test_an_interrupted_run_names_the_folder_that_it_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, words in (
        ("evaluate", ["http://x", "--out", str(tmp_path / "run")]),
        ("quantize", ["source", str(tmp_path / "out"), "--recipe", "fp8"]),
    ):
        module = importlib.import_module(f"halfbyte.cli.{COMMANDS[name][0]}")
        monkeypatch.setattr(module, "run", _raises(KeyboardInterrupt()))
        assert main([name, *words]) == 130
        assert "nothing is kept" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / ".out.halfbyte-work").mkdir()
    assert main(["evaluate", "http://x", "--out", str(tmp_path / "run")]) == 130
    assert f"kept in {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["quantize", "source", str(tmp_path / "out"), "--recipe", "fp8"]) == 130
    assert f"kept in {tmp_path / '.out.halfbyte-work'}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["blend", "builtin"]])
def test_a_reader_that_left_before_the_end_hears_nothing(words: list[str]) -> None:
    """As `halfbyte --help | true`: what was printed is still in the buffer when the pipe breaks."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", *words], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["inspect_ai", "inspect_ai.model", "gguf", "huggingface_hub"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stand_in(monkeypatch, _command(_raises(ModuleNotFoundError("no", name=module))))
    assert main(["stand-in"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and module in said and "pip install '.[" in said


def test_extras_that_are_named_are_those_of_the_package() -> None:
    told = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = told["project"]["optional-dependencies"]
    assert set(_EXTRAS) <= set(extras)
    for extra, modules in _EXTRAS.items():
        brought = " ".join(extras[extra]).replace("-", "_")
        assert all(module in brought for module in modules), extra


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stand_in(monkeypatch, _command(_raises(ModuleNotFoundError("no", name="halfbyte.lost"))))
    with pytest.raises(ModuleNotFoundError):
        main(["stand-in"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 << 30), ("10GB", 10**10), ("1.5 tb", 15 * 10**11), ("4096B", 4096),
     ("500mib", 500 << 20)],
)  # fmt: skip
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "{}", "--device", "cuda", "--port", "0"],
        ["serve", "{}", "--device", "cuda:7", "--port", "0"],
        ["serve", "{}", "--device", "gpu", "--port", "0"],
        ["chat", "{}", "--device", "cuda"],
        ["bench", "engine"],
        ["bench", "kernels"],
    ],
)
def test_a_gpu_that_is_not_here_is_said_in_a_line(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    write_tiny_checkpoint(tmp_path / "tiny", layers=2)
    shutil.copy(
        Path(__file__).parents[1] / "data/chat/tekken/tekken.json",
        tmp_path / "tiny" / "tekken.json",
    )
    assert main([a.format(tmp_path / "tiny") for a in arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and ("cuda" in said or "CUDA" in said)


@pytest.mark.parametrize("text", ["12", "12.5", "1e9", " 7 ", "GiB", "nan", "nanGB", "-1GB", "0GB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bytes(text)
